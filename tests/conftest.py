"""What tests share in sessions with and without torch."""

import importlib
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
FORKS = """
import json, os, sys
import torch
while line := sys.stdin.readline():
    if not os.fork():
        break
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
else:
    os._exit(0)
code, files, environment = json.loads(line)
os.environ.update(environment)
for number, name in enumerate(files, 1):
    os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
exec(code)
"""


def seed():
    """Whatever ran before in the same process, the same numbers are drawn from here on."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:  # a session without it shares this file
        sys.modules["torch"].manual_seed(0)


def pytest_collectstart(collector):
    """Files draw when they are imported."""
    seed()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Fixtures that several tests share draw before the first of them."""
    seed()


@pytest.fixture(autouse=True)
def seeded():
    """A test draws the same numbers alone as behind the one that needed a shared fixture first."""
    seed()


@pytest.fixture(scope="session")
def python(tmp_path_factory):
    """``python(code, **environment)``: the code ended in a process of its own, where torch and nothing else is loaded.

    Torch is loaded once and forked; where nothing forks, each is a new interpreter.
    """
    if os.name == "nt":

        def start(code, **environment):
            command = [sys.executable, "-c", f"import torch\n{code}"]
            return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)

        yield start
        return
    files = [tmp_path_factory.mktemp("python") / name for name in ("stdout", "stderr")]
    with subprocess.Popen([sys.executable, "-c", FORKS], stdin=-1, stdout=-1, text=True) as process:

        def run(code, **environment):
            process.stdin.write(json.dumps((code, [*map(str, files)], environment)) + "\n")
            process.stdin.flush()
            status = int(process.stdout.readline())
            return subprocess.CompletedProcess(code, status, *(file.read_text() for file in files))

        yield run
        process.stdin.close()


@pytest.fixture(scope="session")
def page_example():
    """The one Python example of the page on other frameworks that holds a text, as a function of the text."""

    def example(text):
        page = (ROOT / "docs" / "keras-and-gluon.md").read_text(encoding="utf-8")
        examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
        (found,) = (code for code in examples if text in code)
        return found

    return example


@pytest.fixture(scope="session")
def import_example():
    """Import a module of examples/ by its name, as a script there imports its neighbour."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module


@pytest.fixture(scope="session")
def stripes(tmp_path_factory):
    """A file like mnist.npz; the class is the direction of the stripes, which is learnt in a few epochs."""
    random = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 600), ("test", 100)):
        labels = random.integers(0, 2, count).astype(np.uint8)
        images = np.zeros((count, 28, 28))
        images[:, ::4] = 180
        images[labels == 1] = images[labels == 1].transpose(0, 2, 1)
        arrays[f"x_{part}"] = (images + random.integers(0, 76, images.shape)).astype(np.uint8)
        arrays[f"y_{part}"] = labels
    path = tmp_path_factory.mktemp("data") / "mnist.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="session")
def tiny():
    """The name of a small network that methods, norms and stems all find something in, known to the zoo for a while."""
    from torch import nn

    from foldconv.lab.zoo import _registry

    def block(inputs, outputs, size, **geometry):
        conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False, **geometry)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

    def build():
        return nn.Sequential(
            *block(3, 32, 7, stride=2),
            *block(32, 8, 1),
            *block(8, 8, 3),
            nn.Conv2d(8, 8, 3, groups=8),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 5),
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_registry._BUILDERS, "tiny", build)
        yield "tiny"
