"""Names that documents and docstrings tell of are there after a bare ``import foldconv``; public names stand once."""

import ast
import functools
import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import foldconv

SOURCE = Path(foldconv.__file__).parent
ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")),
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(SOURCE.rglob("README.md")),
]
# Parts that need a framework of their own; where it is not installed, nothing can be said of their names.
FRAMEWORKS = {"foldconv.keras": "keras", "foldconv.gluon": "mxnet"}
NAME = re.compile(r"(?<![\w./-])foldconv(?:\.[A-Za-z_]\w*)+")
CODE = re.compile(r"^ *```.*?^ *```|``.+?``|`[^`\n]+`", re.DOTALL | re.MULTILINE)
RESOLVE = """
import json, sys
import foldconv
missing = []
for name in json.load(sys.stdin):
    found = foldconv
    try:
        for part in name.split(".")[1:]:
            found = getattr(found, part)
    except AttributeError:
        missing.append(name)
    except ModuleNotFoundError as error:  # a part whose host is not installed is there
        missing += [name] if error.name.startswith("foldconv") else []
print(json.dumps(missing))
"""


def in_markdown(text):
    """The names in its code blocks and spans."""
    return {name for code in CODE.findall(text) for name in NAME.findall(code)}


def in_docstrings(source):
    """The names in the docstrings of a Python file, those behind attributes included."""
    texts = (n.value.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Expr) and is_text(n.value))
    return {name for text in texts for name in NAME.findall(text)}


def is_text(node):
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def missing(names):
    """Those of the names that a fresh interpreter does not find, all asked in one."""
    command = [sys.executable, "-c", RESOLVE]
    done = subprocess.run(command, input=json.dumps(sorted(names)), capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def public_names(folder):
    imports = ast.parse((folder / "_api.py").read_text(encoding="utf-8")).body
    names = [alias for node in imports if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert [alias.name for alias in names if alias.asname != alias.name] == []  # mypy would take them for private
    return [alias.name for alias in names]


PACKAGES = {"foldconv": SOURCE, "foldconv.train": SOURCE / "lab" / "train"}
WRONG = {"foldconv.expnad", "foldconv.ops.expnad"}


@pytest.fixture(scope="module")
def told():
    """The names by the file that tells of them."""
    told = {path: in_markdown(path.read_text(encoding="utf-8")) for path in DOCUMENTS}
    return told | {path: in_docstrings(path.read_text(encoding="utf-8")) for path in SOURCE.rglob("*.py")}


@pytest.fixture(scope="module")
def absent(told):
    """Of these, of the public names, and of two wrong ones: those that are not there; one interpreter is asked."""
    unknown = tuple(part for part, framework in FRAMEWORKS.items() if importlib.util.find_spec(framework) is None)
    names = {name for found in told.values() for name in found if not name.startswith(unknown)}
    public = {f"{package}.{name}" for package, folder in PACKAGES.items() for name in public_names(folder)}
    return set(missing(names | public | WRONG))


def test_what_is_told_of_is_there(told, absent):
    assert len(set().union(*told.values())) > 30, "names are no longer found in the documents"
    wrong = {path.relative_to(ROOT): sorted(found & absent) for path, found in told.items() if found & absent}
    assert wrong == {}


def test_a_wrong_name_is_missing(absent):
    assert absent >= WRONG


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("say `foldconv.expnad(net)` or `foldconv.ops.paths`", {"foldconv.expnad", "foldconv.ops.paths"}),
        ("```python\nnet = foldconv.fold(net).foldconv.x\n```\n", {"foldconv.fold"}),
        ("a list:\n  ```\n  foldconv.save\n  ```\nfoldconv.prose, `src/foldconv.py`", {"foldconv.save"}),
    ],
)
def test_names_are_found_in_code_only(text, names):
    assert in_markdown(text) == names


def test_names_are_found_in_docstrings_only():
    source = 'def f():\n    """Like `foldconv.fold`.\n\n    >>> foldconv.a.b(1)\n    """\n    x = "foldconv.c"\n'
    assert in_docstrings(source) == {"foldconv.fold", "foldconv.a.b"}


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_written_once_and_there(package, absent):
    names = public_names(PACKAGES[package])
    assert [name for name, times in Counter(names).items() if times > 1] == []
    assert [name for name in names if f"{package}.{name}" in absent] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_type_checkers_see_what_there_is_at_run_time(package):
    names = public_names(PACKAGES[package])
    assert set(names) == set(functools.reduce(getattr, package.split(".")[1:], foldconv).__all__)
    assert "from ._api import *" in (PACKAGES[package] / "__init__.py").read_text(encoding="utf-8")
    assert not any(name.startswith("_") for name in names), "a star does not import these"


def test_every_file_of_public_names_is_tested():
    assert sorted(SOURCE.rglob("_api.py")) == sorted(folder / "_api.py" for folder in PACKAGES.values())
