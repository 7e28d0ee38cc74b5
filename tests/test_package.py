"""What is published: the wheel and the source archive, made from this tree, and the wheel as its users have it.

In environments with the extra `package` only; `nox -s lint`, which says so, fails where it is missing.
"""

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
import yaml

import foldconv

ROOT = Path(__file__).parent.parent
if "FOLDCONV_PACKAGE" not in os.environ and importlib.util.find_spec("check_wheel_contents") is None:
    pytest.skip("the extra `package` is not installed", allow_module_level=True)
CONSUMER = """
from typing import assert_type

import foldconv
import torch
from foldconv import DOConv, DOConv2d
from torch import nn

net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), DOConv2d(8, 8, 3, padding=1, depth_multiplier=12))
rich = foldconv.expand(net, DOConv(depth_multiplier=12), exclude="2")
optimizer = torch.optim.SGD(foldconv.parameter_groups(rich, weight_decay=1e-4), lr=0.1)
images = torch.randn(2, 3, 16, 16)
loss = rich(images).sum() + foldconv.regularization(rich)
loss.backward()
plain = foldconv.fold(rich)
report = foldconv.verify(rich, plain, images)
assert_type(report.max_error, float)
assert report.ok(1e-4), report
names: list[str] = foldconv.list_methods()
print(foldconv.__file__, foldconv.summary(rich), names)
"""
WRONG = "import foldconv\n\nfoldconv.expand(3, foldconv.DOConv(depth_multiplier='12'))\nfoldconv.expnad(3)\n"


def run(*command, **settings):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **settings)
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel, which is made from the source archive, and that."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    (wheel,), (archive,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, archive


@pytest.fixture(scope="module")
def metadata(built):
    with zipfile.ZipFile(built[0]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_string(wheel.read(name).decode())


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A new environment with the wheel alone, beside which stands what is installed here (not this tree's foldconv)."""
    folder = tmp_path_factory.mktemp("installed")
    run("uv", "venv", "--python", sys.executable, folder)
    python = next(path for path in (folder / "bin" / "python", folder / "Scripts" / "python.exe") if path.exists())
    run("uv", "pip", "install", "--no-deps", "--python", python, built[0])
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "beside.pth").write_text(sysconfig.get_path("purelib"))  # a path alone: .pth files there are not followed
    return python


def test_indexes_take_both(built):
    run(sys.executable, "-m", "twine", "check", "--strict", *built)
    run(sys.executable, "-m", "check_wheel_contents", built[0])


def test_the_wheel_holds_what_the_package_does(built):
    source = ROOT / "src"
    own = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    own = {name for name in own if name.startswith("foldconv/") and "__pycache__" not in name}
    assert own >= {"foldconv/py.typed", "foldconv/lab/recipes/gluoncv/resnet50_v1b.yaml"}
    with zipfile.ZipFile(built[0]) as wheel:
        names = {name for name in wheel.namelist() if not name.endswith("/")}
    assert {name for name in names if ".dist-info/" not in name} == own
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_archive_can_be_built_and_tested(built):
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {"pyproject.toml", "README.md", "LICENSE", "CITATION.cff", "noxfile.py", "tests/test_package.py"}


@pytest.mark.parametrize(
    ("schema", "file"), [("citation-file-format", "CITATION.cff"), ("github-workflows", ".github/workflows/tests.yml")]
)
def test_files_for_others_follow_their_schemas(schema, file):
    run(sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", ROOT / file)


def test_the_workflow_runs_the_readmes_test_command():
    (job,) = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))["jobs"].values()
    command = job["steps"][-1]["run"]
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").rstrip().endswith(f"\n{command}")
    assert f"\n{command} " in (ROOT / "README.md").read_text(encoding="utf-8")
    supported = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert job["strategy"]["matrix"]["python"] == supported


def test_the_versions_agree(metadata):
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert metadata["Version"] == foldconv.__version__ == re.search(r"^version: (\S+)$", citation, re.MULTILINE)[1]


def test_the_description_leads_nowhere_wrong(metadata):
    """What is a path here is none on an index; code stays as it is."""
    text, readme = metadata.get_payload(), (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.compile(r"```.*?```", re.DOTALL)
    assert blocks.findall(text) == blocks.findall(readme) != []
    prose = blocks.sub("", text)
    assert [to for to in re.findall(r"\]\(([^)]*)\)", prose) if not to.startswith(("http://", "https://", "#"))] == []
    assert not re.search(r"<!--|<img|<picture", prose)


def test_it_runs_where_it_is_installed(installed, tmp_path):
    (tmp_path / "use.py").write_text(CONSUMER)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    out = run(installed, "use.py", cwd=tmp_path, env=environment)
    assert Path(out.partition(" ")[0]).is_relative_to(installed.parents[1])
    program = installed.with_name("foldconv" + installed.suffix)
    assert run(program, "--version", cwd=tmp_path, env=environment) == f"foldconv {foldconv.__version__}\n"
    recipes = run(program, "train", "--config", "list", cwd=tmp_path, env=environment).splitlines()
    assert "gluoncv/resnet50_v1b" in recipes


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_type_checkers_are_content_with_a_user(checker, installed, tmp_path):
    (tmp_path / "use.py").write_text(CONSUMER)
    (tmp_path / "wrong.py").write_text(WRONG)
    command = {
        "mypy": [sys.executable, "-m", "mypy", "--strict", "--python-executable", installed],
        "pyright": [sys.executable, "-m", "pyright", "--pythonpath", installed],
    }[checker]
    run(*command, "use.py", cwd=tmp_path)
    done = subprocess.run([*map(str, command), "wrong.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert all(f"wrong.py:{line}:" in done.stdout for line in (3, 4)), done.stdout
