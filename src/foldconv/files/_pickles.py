"""Pickled checkpoints: what is in them is known before torch makes anything of it, and nothing of theirs runs.

torch's ``weights_only`` reader makes tensors and plain containers. Trainers store more beside the tensors: NumPy
scalars, an `argparse.Namespace`, a configuration, a path. Nobody needs those to read weights, so each of the names in
`_INERT` becomes an object that does nothing and holds nothing; nobody calls what the name stands for, nor imports it.
"""

from __future__ import annotations

import _compat_pickle
import contextlib
import itertools
import pickletools
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import torch

from ..errors import CheckpointError, shown

_DEEPEST = 200
"""Levels of containers. Python itself dies of a dictionary's key with very many."""
_PICKLES = 5
"""In a file of before torch 1.6: magic number, protocol, system, content, keys of the storages."""
_TORCHS = {"collections.OrderedDict", "collections.Counter", "builtins.set", "builtins.complex", "builtins.bytearray"}
_TORCHS |= {"_codecs.encode"}
_MAPPINGS = (
    "collections.defaultdict",
    "yacs.config.CfgNode",
    "fvcore.common.config.CfgNode",
    "detectron2.config.config.CfgNode",
    "munch.Munch",
    "easydict.EasyDict",
    "addict.addict.Dict",
    "mmengine.config.config.ConfigDict",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
)


class Inert:
    """Stands for a value that is no tensor; its class is called what the value is."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Mapping:
    """Stands for a dictionary with a default, with attributes or with a configuration: tensors may be in it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return OrderedDict()


class _List:
    """Stands for a double-ended queue."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return []


def _inert() -> dict[str, Any]:
    """By the name in the pickle, what stands for it."""
    names: defaultdict[str, list[str]] = defaultdict(list)
    for core in ("numpy.core.", "numpy._core."):
        names["NumPy array"] += [core + "multiarray._reconstruct", core + "numeric._frombuffer"]
        names["NumPy scalar"] += [core + "multiarray.scalar"]
    names["NumPy array"] += ["numpy.ndarray"]
    numbers = ("int", "uint", "float", "complex")
    kinds = [f"{kind}{bits}" for kind, bits in itertools.product(numbers, (8, 16, 32, 64, 128))]
    names["NumPy type"] += [f"numpy.{kind}" for kind in ("dtype", "bool_", "bool", "str_", "bytes_", *kinds)]
    names["NumPy type"] += [f"numpy.dtypes.{kind.title().replace('Ui', 'UI')}DType" for kind in ("bool", "str", *kinds)]
    pickled = ("__randomstate_ctor", "__generator_ctor", "__bit_generator_ctor")
    names["NumPy generator"] += [f"numpy.random._pickle.{name}" for name in pickled]
    names["NumPy generator"] += ["numpy.random._pcg64.PCG64", "numpy.random._mt19937.MT19937"]
    names["NumPy generator"] += ["numpy.random.bit_generator.__pyx_unpickle_SeedSequence"]
    for module, kinds in {
        "argparse": ["Namespace"],
        "types": ["SimpleNamespace"],
        "datetime": ["datetime", "date", "time", "timedelta", "timezone"],
        "decimal": ["Decimal"],
        "fractions": ["Fraction"],
        "uuid": ["UUID"],
        "functools": ["partial"],
        "typing": ["Any"],
        "builtins": ["bool", "int", "float", "str", "bytes", "list", "tuple", "dict", "frozenset", "range", "slice"],
        "torch.torch_version": ["TorchVersion"],
        "omegaconf.base": ["ContainerMetadata", "Metadata"],
        "omegaconf.dictconfig": ["DictConfig"],
        "omegaconf.listconfig": ["ListConfig"],
        "omegaconf.nodes": ["AnyNode"],
        "deepspeed.runtime.fp16.loss_scaler": ["LossScaler", "DynamicLossScaler"],
        "ml_collections.config_dict.config_dict": ["ConfigDict", "FrozenConfigDict", "FieldReference"],
    }.items():
        for kind in kinds:
            names[kind] += [f"{module}.{kind}"]
    paths = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
    names["path"] += [f"{module}.{kind}" for module in ("pathlib", "pathlib._local") for kind in paths]
    # mmengine's histories name the statistics they offer by a getattr, which is not called here either.
    names["HistoryBuffer"] += ["mmengine.logging.history_buffer.HistoryBuffer", "builtins.getattr"]
    found: dict[str, Any] = {name: type(kind, (Inert,), {}) for kind, own in names.items() for name in own}
    return found | dict.fromkeys(_MAPPINGS, _Mapping) | {"collections.deque": _List}


_INERT = _inert()
_LOCK = threading.Lock()
_MODULES = 100_000
_ULTRALYTICS = "ultralytics.nn.tasks."
_ARGUMENTS = ("torch.optim.", "torch.nn.modules.loss.")
"""Of a training's, which Lightning stores among hyperparameters: no weights of a network are in them."""


class StoredModule:
    """Stands for a pickled module: what its attributes were, and nothing that acts."""

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}

    def tensors(self, path: Any) -> dict[str, Any]:
        """What the module's ``state_dict()`` was.

        Raises:
            CheckpointError: for a module that is in itself, or very many.
        """
        found: dict[str, Any] = {}
        waiting: list[tuple[str, StoredModule, int]] = [("", self, 0)]
        visits = 0
        while waiting:
            prefix, module, level = waiting.pop()
            visits += 1
            if visits > _MODULES or level > _DEEPEST:
                raise CheckpointError(
                    f"{path}: holds a network of over {_MODULES:,} modules or {_DEEPEST} levels; is it a checkpoint?"
                )
            left_out = module._of("_non_persistent_buffers_set", set)
            for kind in ("_parameters", "_buffers"):
                for name, value in module._of(kind, dict).items():
                    if isinstance(value, torch.Tensor) and not (kind == "_buffers" and name in left_out):
                        found[f"{prefix}{name}"] = value
            inside = [*module._of("_modules", dict).items()]
            for name, each in reversed(inside):
                if isinstance(each, StoredModule):
                    waiting.append((f"{prefix}{name}.", each, level + 1))
        return found

    def _of(self, name: str, kind: type) -> Any:
        value = vars(self).get("attributes", {}).get(name)
        return value if isinstance(value, kind) else kind()


def stored_modules(names: set[str]) -> dict[str, Any]:
    """What stands for the modules in a file of ultralytics, which pickles its networks; in any, for `_ARGUMENTS`."""
    found: dict[str, Any] = {name: type("Argument", (Inert,), {}) for name in names if name.startswith(_ARGUMENTS)}
    if any(name.startswith(_ULTRALYTICS) for name in names):
        pickled = [name for name in names if name.startswith(("ultralytics.", "torch.nn.modules."))]
        found |= {name: type("StoredModule", (StoredModule,), {}) for name in pickled}
    return found


def without_modules(content: Any, path: Any) -> Any:
    """What a file holds, with the tensors of a stored module in its place."""
    if not isinstance(content, dict):
        return content
    return {name: each.tensors(path) if isinstance(each, StoredModule) else each for name, each in content.items()}


@contextlib.contextmanager
def inert_values(more: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Where `torch.load` takes what stands in `_INERT`, too; one thread at a time, since torch has one list for all."""
    values = {**_INERT, **(more or {})}
    with _LOCK:
        # What the user allowed stays allowed, but for what stands here: torch would take either of two by one name.
        allowed = torch.serialization.get_safe_globals()
        others = [each for each in allowed if _name_of(each) not in values]
        torch.serialization.clear_safe_globals()
        try:
            torch.serialization.add_safe_globals([*others, *((value, name) for name, value in values.items())])
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(allowed)


def _name_of(allowed: Any) -> str:
    return allowed[1] if isinstance(allowed, tuple) else f"{allowed.__module__}.{allowed.__qualname__}"


def would_run(names: str, path: Any) -> str:
    """The message about a file that names code, with what converts it."""
    return (
        f"{path}: refused, since reading it would run code of {shown(names)[1:-1]}; where that is trusted, load it and "
        f"save its state_dict() alone: import torch; content = torch.load({shown(str(path))}, weights_only=False); "
        "torch.save(content['model'].float().state_dict(), 'weights.pth')"
    )


def check_pickle(file: BinaryIO, path: Any, count: int = _PICKLES) -> set[str]:
    """Read pickles as a list of instructions, and make nothing of them; the names in them.

    Raises:
        CheckpointError: for one that is damaged, nested beyond any use, or names what is neither torch's nor inert.
    """
    known = _INERT.keys() | _TORCHS
    known |= {_name_of(each) for each in torch.serialization.get_safe_globals()}
    found: set[str] = set()
    for _ in range(count):
        try:
            names = _names(file, path)
        except CheckpointError:
            raise
        except Exception as error:  # pickletools raises what its parts raise
            reason = shown(str(error) or type(error).__name__)[1:-1]
            raise CheckpointError(f"{path}: not a readable checkpoint ({reason}); is it whole?") from None
        strange = sorted(n for n in names - known - stored_modules(names).keys() if not n.startswith("torch."))
        if strange:
            listed = ", ".join(shown(name)[1:-1] for name in strange[:5]) + ", ..." * (len(strange) > 5)
            raise CheckpointError(would_run(listed, path))
        found |= names
    return found


def _names(file: BinaryIO, path: Any) -> set[str]:
    """What one pickle names; the depth of what it makes is followed on a stack of depths (None: a mark)."""
    names: set[str] = set()
    stack: list[int | None] = []
    memo: dict[Any, int | None] = {}
    for operation, argument, position in pickletools.genops(file):
        name, before = operation.name, operation.stack_before
        if name == "GLOBAL":
            names.add(_today(*str(argument).split(" ", 1)))
        if name.startswith("EXT"):
            raise CheckpointError(f"{path}: refused, since reading it would run registered code")
        if name == "MARK":
            stack.append(None)
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            if int(argument or 0) > (position or 0):  # one more for each is all that anybody needs
                raise CheckpointError(f"{path}: damaged: remembers more than it has; take another copy of the file")
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        else:
            inside = -1
            if pickletools.stackslice in before:
                while (top := stack.pop()) is not None:
                    inside = max(inside, top)
                before = before[: before.index(pickletools.markobject)]
            below = [stack.pop() or 0 for _ in before]  # a container that is filled is the last
            filled = below.pop() if name in _FILLING else 0
            depth = max(inside + 1, filled, *(each + 1 for each in below))
            if depth > _DEEPEST:
                raise CheckpointError(f"{path}: nested over {_DEEPEST} levels deep; is it a checkpoint?")
            stack += [depth] * len(operation.stack_after)
    return names


_FILLING = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")


def _today(module: str, name: str = "") -> str:
    """What Python 2 called so has another name in Python 3; `torch.save` writes Python 2's, for all can read them."""
    module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
    return f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}"
