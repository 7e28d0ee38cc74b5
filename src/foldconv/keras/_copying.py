"""A copy of a Keras model with other layers in some places; the model itself stays as it is.

Graphs (Sequential, functional) are cloned by Keras. What is left, subclassed models and layers, is made again from its
config and built from its build config, as Keras does when it loads a file; then it gets the original's variables, and
the other layers are put into its attributes, lists and dicts. An attribute that the constructor makes otherwise than
the original has it is carried over where it is data, and refused where it is not.
"""

# Keras is not installed where types are checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

import contextlib
import copy as copying
import functools
import gc
import inspect
import io
import pickle
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

import keras

from ..errors import UnsupportedError
from ._graph import is_graph

_STATE = (keras.Layer, keras.Variable, keras.KerasTensor, keras.random.SeedGenerator)  # carried over by itself
_SHARED = (type, types.ModuleType, types.BuiltinFunctionType, np.dtype)
# What compiling and fitting leave on a model; a copy is not compiled.
_COMPILED = {"optimizer", "_optimizer", "history", "stop_training", "stop_evaluating", "stop_predicting"}
_COMPILED |= {"_compile_config", "_compiled_trainable_state", "_jax_state", "_eval_epoch_iterator", "_torch_params"}
_REMEDY = "define get_config so that it makes it as it is now, or put foldconv.keras' layers into the constructor"


class Copier:
    """One pass over a model.

    Args:
        replace: gives a layer for another one, or None to keep it; asked once for each.
        changes: may `replace` give a layer for this one?
        mark: called with each object of a user's class that is within no other such one, and its copy.
    """

    def __init__(self, replace: Callable[[Any], Any], changes: Callable[[Any], bool], mark: Callable[[Any, Any], None]):
        self.replace, self.changes, self.mark = replace, changes, mark
        self.memo: dict[int, Any] = {}
        self.made: list[tuple[Any, Any]] = []
        self.moved: list[tuple[Any, Any]] = []
        self.left: list[tuple[str, Any]] = []  # what was taken out of a copy again, by name
        self.inside = False  # an object of a user's class

    def copy(self, model: Any) -> Any:
        """The copy of a whole model."""
        new = self.layer(model)
        _check_class(model, new, _CALLED | _TRAINED)
        for old, copied in self.made:
            _carry(old, copied)
        for old, copied in self.moved:
            _move(old, copied)
        for layer in new._flatten_layers():
            if layer.built:
                layer._post_build()  # torch's parameters, by path
        if self.left:
            gc.collect()
        for name, reference in self.left:
            if reference() is not None:  # a closure, a bound method, a tied variable
                kinds = " or ".join(sorted({type(holder).__name__ for holder in gc.get_referrers(reference())}))
                raise UnsupportedError(
                    f"{name}: a {kinds} would go on using what it was before; hold layers in attributes, lists and "
                    "dicts alone, or exclude it"
                )
        return new

    def layer(self, old: Any) -> Any:
        """The copy of a layer, a model, or an operation in a graph."""
        if id(old) not in self.memo:
            new = self.replace(old)
            if new is not None:
                self.moved.append((old, new))
            elif isinstance(old, keras.Sequential):
                new = keras.models.clone_model(old, clone_function=self.layer)
                _check_class(old, new, _CALLED)
            elif is_graph(old):
                inputs = keras.tree.map_structure(_input_like, old.input)
                new = keras.models.clone_model(old, inputs, clone_function=self.layer, call_function=_call)
                new._trainable = old._trainable
                _check_class(old, new, _CALLED)
            else:
                new = _made_again(old)
                if isinstance(old, keras.Layer):
                    self._fill(old, new)
            self.memo[id(old)] = new
        return self.memo[id(old)]

    def _fill(self, old: Any, new: Any) -> None:
        """Build what was made again, and put in what is replaced within."""
        outermost = not self.inside and not is_known(old)
        self.inside |= outermost
        self.made.append((old, new))
        new.trainable = old.trainable
        if new.dtype_policy != old.dtype_policy:
            new.dtype_policy = old.dtype_policy
        if old.built and not new.built:
            _build(old, new)
        if len(old._layers) != len(new._layers):
            counts = f"expected {len(old._layers)} layers in it, made again it has {len(new._layers)}"
            raise UnsupportedError(f"{old.name}: {counts}; {_REMEDY}")
        swaps = {}
        for mine, theirs in zip(old._layers, new._layers):
            if mine is theirs:
                raise UnsupportedError(f"{old.name}: its config holds layers, which a copy would share; {_REMEDY}")
            if id(mine) not in self.memo and self._stays(mine, theirs):
                self.memo[id(mine)] = theirs
                self._fill(mine, theirs)
            found = self.layer(mine)
            if found is not theirs:
                swaps[id(theirs)] = found
                self.left += [(mine.name, weakref.ref(one)) for one in (theirs, *theirs.variables)]
        if swaps:
            _exchange(new, swaps)
        if outermost:
            self.inside = False
            self.mark(old, new)

    def _stays(self, old: Any, new: Any) -> bool:
        """Is the layer that a constructor made what the original is, apart from its state?"""
        if original_class(old) is not type(new) or self.changes(old):
            return False
        if is_known(old) and any(self.changes(inner) for inner in old._flatten_layers()):
            return False
        try:
            return {**config_of(old), "name": ""} == {**config_of(new), "name": ""}
        except NotImplementedError:
            return True  # whether it is so is seen by its variables and attributes


def original_class(layer: Any) -> type:
    """The user's class of a layer, whatever we made of it."""
    return next(cls for cls in type(layer).__mro__ if not vars(cls).get("_made_by_foldconv"))


def is_known(layer: Any) -> bool:
    """Is a layer all that its config and its weights say? A user's may have been given attributes since."""
    return original_class(layer).__module__.partition(".")[0] in ("keras", "foldconv")


def attributes(layer: Any) -> dict[str, Any]:
    """A layer's own: those aside that each has, and what compiling leaves."""
    found = {**vars(layer), **(vars(layer).get("_modules") or {})}  # torch keeps modules apart
    skipped = _COMPILED | _of_each(keras.Model if isinstance(layer, keras.Model) else keras.Layer)
    return {k: v for k, v in found.items() if k not in skipped and not k.startswith(("_self_", "_expanded"))}


@functools.cache
def _of_each(kind: Any) -> set[str]:
    return vars(kind()).keys() - {"_supports_masking", "_input_spec", "activity_regularizer", "autocast"}


def own_names(cls: type) -> set[str]:
    """What a class defines, apart from what each class has."""
    return vars(cls).keys() - _OF_EVERY_CLASS


_OF_EVERY_CLASS = {
    "__module__",
    "__qualname__",
    "__doc__",
    "__annotations__",
    "__firstlineno__",
    "__static_attributes__",
}


def _has_default(cls: Any) -> bool:
    return getattr(cls.get_config, "_is_default", False)


def config_of(layer: Any) -> dict[str, Any]:
    """What makes a layer again; Keras' own default says more than every constructor takes."""
    if "_expanded" in vars(layer):
        return copying.deepcopy(vars(layer)["_expanded"]["config"])
    automatic = vars(layer).get("_auto_config") if _has_default(type(layer)) else None
    return layer.get_config() if automatic is None else automatic.config


def _made_again(old: Any) -> Any:
    """A layer of the same class and config."""
    cls: Any = original_class(old)
    inner = old._flatten_layers() if isinstance(old, keras.Layer) else []
    try:
        config = config_of(old)
        with keras.saving.CustomObjectScope({type(x).__name__: type(x) for x in inner if not is_known(x)}):
            # By the constructor, where the config is what it was given: a model's from_config may add to that.
            return cls(**config) if _has_default(cls) else cls.from_config(config)
    except Exception as error:  # whatever a user's get_config or constructor raises
        raise UnsupportedError(f"{old.name}: Keras cannot make it again: {_line(error)}; {_REMEDY}") from error


_CALLED = {"__call__", "call"}
_TRAINED = {"compile", "compute_loss", "compute_metrics", "evaluate", "fit", "metrics", "predict", "predict_step"}
_TRAINED |= {"test_step", "train_on_batch", "train_step"}


def _check_class(old: Any, new: Any, names: set[str]) -> None:
    """Refuse a graph of a user's class which Keras clones as its own class, where that would lose one of these."""
    if not is_graph(old):
        return
    lost = sorted({name for cls in set(type(old).__mro__) - set(type(new).__mro__) for name in names & own_names(cls)})
    if lost:
        raise UnsupportedError(
            f"{old.name}: a copy of this graph would be a {type(new).__name__} without the {', '.join(lost)} of its "
            f"class {type(old).__name__}: expected a class of which keras.models.clone_model makes another; let its "
            "constructor take (inputs, outputs), or hold the graph in an attribute of a keras.Model"
        )


def _build(old: Any, new: Any) -> None:
    """Make the variables, from the shapes that the original was built with."""
    config = old.get_build_config()
    if type(new).build is keras.Model.build:
        new.built, new._build_shapes_dict = True, old._build_shapes_dict  # all variables are its layers'
    elif config:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that layers within are not built yet
                new.build_from_config(config)
        except Exception as error:
            raise UnsupportedError(f"{old.name}: Keras cannot build it again: {_line(error)}; {_REMEDY}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _exchange(holder: Any, swaps: dict[int, Any]) -> None:
    """Put layers into one that holds others, by the identity of those that they replace."""
    tracker, locked = holder._tracker, holder._tracker.locked
    holder._layers[:] = [swaps.get(id(layer), layer) for layer in holder._layers]
    tracker.stored_ids["layers"] = {id(layer) for layer in holder._layers}
    tracker.unlock()
    for name, value in attributes(holder).items():
        changed = _with(value, swaps)
        if changed is not value:
            setattr(holder, name, changed)
    if locked:
        holder._lock_state()


def _with(value: Any, swaps: dict[int, Any]) -> Any:
    """A value with other layers in it; lists and dicts stay the same object."""
    if isinstance(value, (list, dict)):
        for key, one in list(value.items() if isinstance(value, dict) else enumerate(value)):
            value[key] = _with(one, swaps)
    elif isinstance(value, (tuple, set)):
        found = [_with(one, swaps) for one in value]
        if any(a is not b for a, b in zip(found, value)):
            return getattr(value, "_make", tuple if isinstance(value, tuple) else set)(found)
    return swaps.get(id(value), value)


def _carry(old: Any, new: Any) -> None:
    """Give a layer its original's name, paths, variables, and attributes."""
    new.name = old.name
    _move(old, new)
    mine, theirs = (
        layer._trainable_variables + layer._non_trainable_variables + [seed.state for seed in layer._seed_generators]
        for layer in (old, new)
    )
    shapes = [[tuple(variable.shape) for variable in each] for each in (mine, theirs)]
    if shapes[0] != shapes[1] or vars(old).get("_parameters") or vars(old).get("_buffers"):
        received = f"expected variables of shapes {shapes[0]}, made again it has {shapes[1]}"
        raise UnsupportedError(
            f"{old.name}: {received}; make them by add_weight in the constructor or in build, none of torch's own"
        )
    for a, b in zip(mine, theirs):
        b.assign(np.array(keras.ops.convert_to_numpy(a)))  # by way of NumPy: no shared buffers
        b.trainable, b._path = a.trainable, a.path
    made = attributes(new)
    for name, value in attributes(old).items():
        if is_known(old) and (name in made or name.startswith("_")):
            continue  # its config tells
        if isinstance(value, (keras.optimizers.Optimizer, keras.Metric)):
            continue  # which compile() made
        mine, theirs = _Contents(value), _Contents(made.get(name))
        if name in made and mine.written is not None and mine.written == theirs.written:
            continue
        if mine.written is None or mine.has_state:
            received = f"the constructor does not make the {type(value).__name__} that it holds"
            raise UnsupportedError(f"{old.name}.{name}: {received}; {_REMEDY}")
        setattr(new, name, mine.copy())


class _Contents(pickle.Pickler):
    """What an attribute holds, as bytes to compare and to copy; of layers and variables only that there is one."""

    def __init__(self, value: Any):
        file = io.BytesIO()
        super().__init__(file)
        self.shared: dict[int, Any] = {}
        self.has_state = False
        self.written: bytes | None = None
        with contextlib.suppress(Exception):  # whatever an object's own rules for pickling raise
            self.dump(value)
            self.written = file.getvalue()

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _STATE):
            self.has_state = True
            return "state"
        if isinstance(obj, _SHARED) or (isinstance(obj, types.FunctionType) and not obj.__closure__):
            self.shared[id(obj)] = obj
            return id(obj)
        return None

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, types.FunctionType):
            self.has_state = True  # or something else that a copy would share
            return tuple, ([id(obj.__code__), [cell.cell_contents for cell in obj.__closure__ or ()]],)
        for kind in (tuple, list, set, dict):  # as Keras and TensorFlow wrap them
            if isinstance(obj, kind) and type(obj).__module__.startswith(("keras.", "tensorflow.")):
                return kind, (list(obj.items()) if kind is dict else list(obj),)
        return NotImplemented

    def copy(self) -> Any:
        """A copy of what holds no state."""
        return _Reader(self).load()


class _Reader(pickle.Unpickler):
    """Reads `_Contents`; a class, for Python 3.13.0 lets nobody set ``persistent_load`` on an instance."""

    def __init__(self, contents: _Contents):
        super().__init__(io.BytesIO(contents.written or b""))
        self.shared = contents.shared

    def persistent_load(self, pid: Any) -> Any:
        return self.shared[pid]


def _move(old: Any, new: Any) -> None:
    """Give a layer that was built by itself, and its variables, the paths that they have in the model."""
    if isinstance(old, keras.Layer) and old.path is not None and new.path is not None:
        before = new.path
        for moved in (*new.variables, *new._flatten_layers()):
            if moved.path is not None:
                moved._path = old.path + moved.path.removeprefix(before)


def _input_like(tensor: Any) -> Any:
    """A new input with the old one's name."""
    operation = tensor._keras_history.operation
    if isinstance(operation, keras.layers.InputLayer):
        return keras.layers.InputLayer.from_config(operation.get_config()).output
    return keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name=tensor.name)


def _call(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a layer with those arguments that it knows; a replacement need not know ``training`` or ``mask``."""
    known = inspect.signature(layer.call).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values()):
        kwargs = {name: value for name, value in kwargs.items() if name in known or name not in ("training", "mask")}
    return layer(*args, **kwargs)
