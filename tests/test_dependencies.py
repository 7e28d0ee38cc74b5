"""Imports are light, and dependencies point one way; each shown in a fresh interpreter."""

import json
import subprocess
import sys

import pytest

LOADED = "import json, sys; print(json.dumps(sorted(m for m in sys.modules)))"
HEAVY = {
    "torchvision",
    "timm",
    "lightning",
    "sklearn",
    "matplotlib",
    "rich",
    "jsonargparse",
    "tensorflow",
    "keras",
    "mxnet",
}


def modules_after(code):
    result = subprocess.run([sys.executable, "-c", f"{code}; {LOADED}"], capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout.splitlines()[-1]))


def test_importing_foldconv_loads_torch_and_nothing_heavier():
    # Counted, not timed: on top of torch there is this one module, so importing takes no longer than importing torch.
    assert modules_after("import torch, foldconv") - modules_after("import torch") == {"foldconv"}
    assert "torch" in modules_after("from foldconv import expand")


def test_all_of_the_core_needs_torch_and_safetensors_only():
    names = "import foldconv; [getattr(foldconv, name) for name in foldconv.__all__]"
    assert not {name.partition(".")[0] for name in modules_after(names)} & HEAVY


ORDER = ["errors", "algebra", "layers", "methods", "surgery", "folding"]


@pytest.mark.parametrize("part", ORDER)
def test_a_part_does_not_import_what_stands_on_it(part):
    loaded = modules_after(f"import foldconv.{part}")
    above = {f"foldconv.{name}" for name in ORDER[ORDER.index(part) + 1 :]}
    above |= {
        f"foldconv.{name}" for name in ("verification", "serialization", "checkpoints", "testing", "cli", "train")
    }
    assert not loaded & above
    assert f"foldconv.{part}" in loaded


def test_public_parts_are_found_without_an_import_of_their_own():
    assert "foldconv.algebra.kernel" in modules_after("import foldconv; foldconv.algebra.Kernel")
    assert "foldconv.testing.checks" in modules_after("import foldconv; foldconv.testing.CHECKS")


def test_an_unknown_name_is_an_attribute_error():
    import foldconv

    with pytest.raises(AttributeError, match="module 'foldconv' has no attribute 'expnad'"):
        foldconv.expnad  # noqa: B018
    assert set(foldconv.__all__) <= set(dir(foldconv))
