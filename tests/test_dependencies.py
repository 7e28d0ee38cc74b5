"""Imports are light (fresh interpreters), and dependencies point one way (read from the source, lazy imports too)."""

import ast
import json
import re
import sys
from pathlib import Path

import pytest

import foldconv

SOURCE = Path(foldconv.__file__).parent
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

CORE = {"foldconv", "torch", "safetensors", "numpy"}  # NumPy is what safetensors writes tensors with


def rows_of(text):
    """ARCHITECTURE's list: each row's rooms by the row's name, and the rows that it stands on."""
    rows, below = {}, {}
    for line in re.search(r"<!-- rooms -->\n```\n(.*?)```", text, re.DOTALL)[1].splitlines():
        head, *rooms = re.split(r"\s{2,}", line)
        name, _, others = head.partition(":")
        rows[name], below[name] = rooms, others.split()
    return rows, below


ROWS, BELOW = rows_of((Path(__file__).parents[1] / "ARCHITECTURE.md").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def modules_after(python):
    """What is loaded after some code, in a process that had loaded torch alone."""

    def run(code):
        done = python(f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))")
        return set(json.loads(done.stdout.splitlines()[-1]))

    return run


def imports(path):
    """The modules of foldconv that a file imports, as names below the package."""
    own = [*path.relative_to(SOURCE).with_suffix("").parts]
    package = own[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            named = [*base, *(node.module.split(".") if node.module else [])]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "foldconv":
            named = node.module.split(".")[1:]
        else:
            continue
        for alias in node.names:
            inner = SOURCE.joinpath(*named, alias.name)
            found = [*named, alias.name] if inner.is_dir() or inner.with_suffix(".py").is_file() else named
            yield ".".join(found)


def room(module):
    """The longest listed name that a module lies in."""
    listed = [room for rooms in ROWS.values() for room in rooms]
    return max((r for r in listed if module == r or module.startswith(f"{r}.")), key=len, default=None)


def allowed(own):
    """The rooms that a room may import."""
    row = next(name for name, rooms in ROWS.items() if own in rooms)
    left = ROWS[row][: ROWS[row].index(own) + 1]
    return [*left, *(room for name in BELOW[row] for room in ROWS[name])]


FILES = [
    p
    for p in SOURCE.rglob("*.py")
    if p.parent != SOURCE
    or p.stem not in ("__init__", "__main__", "_api", "hub", "lightning", "mm", "train", "ultralytics", "zoo")
]


def test_every_file_is_in_a_room():
    assert [p for p in FILES if room(".".join(p.relative_to(SOURCE).with_suffix("").parts)) is None] == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_arrows_point_up_the_list(path):
    own = room(".".join(path.relative_to(SOURCE).with_suffix("").parts))
    wrong = {name for name in imports(path) if name and room(name) not in allowed(own)}
    assert not wrong, f"{own} may not import {wrong}"


# What the core takes where it is there: compilers of the fast paths, what reads files of Keras, other frameworks.
OPTIONAL = {
    "ops._numba_kernels": "llvmlite numba",
    "ops._orepa_numba": "numba",
    "ops._triton_kernels": "triton",
    "files.convert._keras_files": "h5py",
    "files.convert._keras": "keras",
    "files.convert._gluon": "mxnet",
    "testing.battery": "pytest",
    "integrations.hub": "huggingface_hub transformers",
    "integrations.lightning": "lightning",
    "integrations.mm": "mmengine",
    "integrations.ultralytics": "ultralytics",
    # Converters and runtimes, one in each file.
    "deploy.coreml": "coremltools",
    "deploy.equalize": "brevitas",
    "deploy.executorch": "executorch",
    "deploy.litert": "ai_edge_litert litert_torch",
    "deploy.ncnn": "ncnn pnnx",
    "deploy.onnx": "onnx onnxruntime",
    "deploy.openvino": "openvino",
    "deploy.quantize_executorch": "executorch torchao",
    "deploy.quantize_litert": "ai_edge_litert ai_edge_quantizer",
    "deploy.quantize_onnx": "onnx onnxruntime",
    "deploy.quantize_openvino": "nncf openvino",
}


def others_imported(path):
    """The packages beside Python's own and the core's dependencies that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        else:
            named = [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
        yield from {name.partition(".")[0] for name in named} - sys.stdlib_module_names - CORE


def test_the_core_imports_only_what_it_depends_on():
    """Imports inside functions count, which running the core with its dependencies alone might never reach."""
    modules = {".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in FILES}
    core = {name for name in modules if room(name) in ROWS["foundation"] + ROWS["torch"]}
    others = {name: " ".join(sorted(set(others_imported(modules[name])))) for name in core}
    assert {name: found for name, found in others.items() if found} == OPTIONAL


def test_no_circles():
    edges = {}
    for path in FILES:
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        edges[name] = {other for other in imports(path) if other and other != name}
    done, path = set(), []

    def visit(name):
        assert name not in path, f"a circle: {' → '.join([*path[path.index(name) :], name])}"
        if name not in done:
            path.append(name)
            for other in sorted(edges.get(name, ())):
                visit(other)
            path.pop()
            done.add(name)

    for name in sorted(edges):
        visit(name)


def test_importing_foldconv_loads_torch_and_nothing_heavier(modules_after):
    # Counted, not timed: on top of torch there are these two modules, so importing takes no longer than torch's.
    assert modules_after("import foldconv") - modules_after("") == {"foldconv", "foldconv._lazy"}
    assert "foldconv.network.expand" in modules_after("from foldconv import expand")


def test_all_of_the_core_needs_torch_and_safetensors_only(modules_after):
    names = "import foldconv; [getattr(foldconv, name) for name in foldconv.__all__]"
    assert not {name.partition(".")[0] for name in modules_after(names)} & HEAVY


@pytest.mark.parametrize("part", ROWS["torch"][:-1])
def test_a_part_does_not_load_what_stands_on_it(part, modules_after):
    loaded = modules_after(f"import foldconv.{part}")
    above = {f"foldconv.{name}" for name in [*ROWS["torch"][ROWS["torch"].index(part) + 1 :], "lab"]}
    # The room of files holds the foundation's writing, too.
    assert not loaded & above - {"foldconv.files"}


def test_public_parts_are_found_without_an_import_of_their_own(modules_after):
    assert "foldconv.algebra.kernel" in modules_after("import foldconv; foldconv.algebra.Kernel")
    assert "foldconv.testing.checks" in modules_after("import foldconv; foldconv.testing.CHECKS")
    assert "foldconv.lab.zoo" in modules_after("import foldconv; foldconv.zoo.create")
    assert "foldconv.lab.train" in modules_after(
        "from foldconv.train import TrainConfig; import foldconv.zoo as z; z.create"
    )


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'foldconv' has no attribute 'expnad'"):
        foldconv.expnad  # noqa: B018
    assert set(foldconv.__all__) <= set(dir(foldconv))
