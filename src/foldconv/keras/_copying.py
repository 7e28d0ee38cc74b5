"""A copy of a Keras model with other layers in some places; the model itself stays as it is.

Graphs (Sequential, functional) are cloned as Keras does it. Layers of Keras' own in which nothing changes are made anew
from their config. What is left, subclassed models and layers that hold layers, is copied attribute by attribute:
containers, bound methods, closures and plain objects anew where a layer or variable is reached through them; variables
with their values; everything else is shared. Keras tracks the copy as it does any other layer, through ``setattr``.
"""

# Keras is not installed where types are checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

import collections
import copy as copying
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import numpy as np

import keras

from ..errors import UnsupportedError
from ._graph import is_graph

Steps = tuple[Any, ...]
"""Where a layer is in a model: attributes, indices among a graph's layers, indices and keys; None: no way to say it."""

# What compiling and fitting leave on a model; a copy is not compiled.
_COMPILED = {"optimizer", "_optimizer", "history", "stop_training", "stop_evaluating", "stop_predicting"}
_COMPILED |= {"_compile_config", "_compiled_trainable_state", "_jax_state", "_eval_epoch_iterator", "_torch_params"}
# What Keras' own constructor makes and a layer's constructor or ``build`` may have changed since.
_BASE = (
    "activity_regularizer",
    "_input_spec",
    "supports_jit",
    "_supports_masking",
    "_convert_input_args",
    "_auto_config",
)
_BASE += (
    "_allow_non_tensor_positional_args",
    "_build_shapes_dict",
    "_called",
    "_path",
    "_parent_path",
    "built",
    "autocast",
)
_SHARED = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type,
    types.ModuleType,
    types.BuiltinFunctionType,
    np.dtype,
    np.generic,
)


class Copier:
    """One pass over a model.

    Args:
        replace: gives a layer for another one and its place, or None to keep it.
        changes: may `replace` give a layer for this one?
        finish: called with every subclassed object that is no part of another one, the copy, and what was replaced
            inside: pairs of layers by place. Gives the copy back, or what stands for it.
    """

    def __init__(
        self,
        replace: Callable[[Any, Steps], Any],
        changes: Callable[[Any], bool],
        finish: Callable[[Any, Any, dict[Steps, tuple[Any, Any]]], Any] = lambda old, new, replaced: new,
    ):
        self.replace, self.changes, self.finish = replace, changes, finish
        self.memo: dict[int, Any] = {}
        self.kept: list[tuple[Any, Any]] = []  # weights are copied when all is built
        self.moved: list[tuple[Any, Any]] = []  # and paths too
        self.replaced: dict[Steps, tuple[Any, Any]] | None = None  # in the outermost object that is being copied

    def copy(self, model: Any) -> Any:
        """The copy of a whole model."""
        new = self.layer(model, (), in_graph=True)
        for old, copied in self.kept:
            if isinstance(old, keras.Layer) and old.weights:
                copied.set_weights([np.array(value) for value in old.get_weights()])  # no shared buffers
        for old, copied in self.moved:
            _move(old, copied)
        for layer in new._flatten_layers():
            if layer.built:
                layer._post_build()  # torch's parameters, by path
        return new

    def layer(self, old: Any, steps: Steps, in_graph: bool) -> Any:
        """The copy of a layer, or of an operation in a graph; the graph builds it."""
        if id(old) in self.memo:
            return self.memo[id(old)]
        if is_graph(old):
            new = self._graph(old, steps)
        else:
            new = self.replace(old, steps)
            if new is not None:
                if self.replaced is not None:
                    self.replaced[steps] = (old, new)
                self.moved.append((old, new))
            elif isinstance(old, keras.Layer) and any(self.changes(inner) for inner in _within(old)):
                new = self._object(old, steps)
            else:
                new = self._unchanged(old, steps, in_graph)
        self.memo[id(old)] = new
        return new

    def _graph(self, model: Any, steps: Steps) -> Any:
        places = {id(layer): index for index, layer in enumerate(model.layers)}

        def clone(layer: Any) -> Any:
            return self.layer(layer, (*steps, places.get(id(layer))), in_graph=True)

        if isinstance(model, keras.Sequential):
            return keras.models.clone_model(model, clone_function=clone)
        inputs = keras.tree.map_structure(_input_like, model.input)
        return keras.models.clone_model(model, inputs, clone_function=clone, call_function=_call)

    def _unchanged(self, old: Any, steps: Steps, in_graph: bool) -> Any:
        """A layer in which nothing is replaced."""
        if not in_graph and not _is_known(old):
            return self._object(old, steps)
        try:
            new = type(old).from_config(old.get_config())
            if not in_graph and old.built:
                new.build_from_config(old.get_build_config())
            complete = in_graph or not old.built or len(new.weights) == len(old.weights)
        except (NotImplementedError, TypeError):
            complete = False
            if not isinstance(old, keras.Layer):
                raise
        if not complete:
            return self._object(old, steps)
        if isinstance(old, keras.Layer):
            new.trainable = old.trainable
            self.moved.append((old, new))
            if old.built:
                self.kept.append((old, new))
        return new

    # ------------------------------------------------------------------ attribute by attribute

    def _object(self, old: Any, steps: Steps) -> Any:
        """A subclassed model, or a layer of a user's or one that holds layers."""
        outermost = self.replaced is None
        if outermost:
            self.replaced, steps = {}, ()
        cls: Any = original_class(old)
        new = cls.__new__(cls)
        (keras.Model if isinstance(old, keras.Model) else keras.Layer).__init__(
            new, name=old.name, dtype=old.dtype_policy, trainable=old._trainable
        )
        self.memo[id(old)] = new
        attributes = {**vars(old), **(vars(old).get("_modules") or {})}  # torch keeps modules apart
        if any(
            value is not None for kind in ("_parameters", "_buffers") for value in (vars(old).get(kind) or {}).values()
        ):
            raise UnsupportedError(f"{old.name}: it has tensors of torch's own, which are not copied; use add_weight")
        own = {
            name: value
            for name, value in attributes.items()
            if name not in vars(new)
            and name not in _COMPILED
            and not name.startswith("_self_")  # TensorFlow's own notes
            and not isinstance(value, keras.optimizers.Optimizer)
        }
        copies = {name: self._value(value, (*steps, name), f"{old.name}.{name}") for name, value in own.items()}
        # In the order in which the original has them, whatever the order of the attributes.
        for variable in (*old._trainable_variables, *old._non_trainable_variables):
            new._track_variable(self._value(variable, (*steps, None), old.name))
        for inner in old._layers:
            new._tracker.add_to_store("layers", self.layer(inner, (*steps, None), in_graph=False))
        for name, value in copies.items():
            setattr(new, name, value)
        for name in _BASE:
            if name in vars(old):
                setattr(new, name, vars(old)[name])
        if old._tracker.locked:
            new._lock_state()
        if outermost:
            replaced, self.replaced = self.replaced, None
            new = self.finish(old, new, replaced or {})
        return new

    def _value(self, old: Any, steps: Steps, where: str) -> Any:
        """The copy of what an attribute holds."""
        if old is None or isinstance(old, _SHARED):
            return old
        if id(old) in self.memo:
            return self.memo[id(old)]
        if isinstance(old, keras.Layer):
            return self.layer(old, steps, in_graph=False)
        if isinstance(old, (list, tuple, dict, set)):
            return self._container(old, steps, where)
        if isinstance(old, keras.Variable):
            new = _variable(old)
        elif isinstance(old, keras.metrics.Metric):
            new = type(old).from_config(old.get_config())
        elif isinstance(old, keras.random.SeedGenerator):
            new = type(old).from_config(old.get_config())
            new.state.assign(np.array(keras.ops.convert_to_numpy(old.state)))
        elif isinstance(old, np.ndarray):
            new = old.copy()
        elif not _reaches(old):
            _refuse_foreign(old, where)
            return old
        elif isinstance(old, types.MethodType):
            new = types.MethodType(old.__func__, self._value(old.__self__, (*steps, None), where))
        elif isinstance(old, functools.partial):
            args, keywords = (self._value(x, (*steps, None), where) for x in (old.args, old.keywords))
            new = functools.partial(self._value(old.func, (*steps, None), where), *args, **keywords)
        elif isinstance(old, types.FunctionType):
            new = self._function(old, (*steps, None), where)
        elif hasattr(old, "__dict__"):
            new = self.memo[id(old)] = copying.copy(old)
            for name, value in vars(old).items():
                object.__setattr__(new, name, self._value(value, (*steps, None), f"{where}.{name}"))
        else:
            raise UnsupportedError(
                f"{where}: it holds a layer in a {type(old).__name__}, which cannot be copied; "
                "hold it in an attribute, a list or a dict"
            )
        self.memo[id(old)] = new
        return new

    def _container(self, old: Any, steps: Steps, where: str) -> Any:
        if isinstance(old, dict):
            items = {key: self._value(value, (*steps, key), f"{where}[{key!r}]") for key, value in old.items()}
            return collections.OrderedDict(items) if isinstance(old, collections.OrderedDict) else items
        if isinstance(old, set):
            return {self._value(value, (*steps, None), where) for value in old}
        values = [self._value(value, (*steps, index), f"{where}[{index}]") for index, value in enumerate(old)]
        if isinstance(old, list):
            return values
        return type(old)(*values) if hasattr(old, "_fields") else tuple(values)

    def _function(self, old: Any, steps: Steps, where: str) -> Any:
        """A function whose closure or defaults reach a layer."""
        cells = tuple(types.CellType() for _ in old.__closure__ or ())
        new = types.FunctionType(old.__code__, old.__globals__, old.__name__, None, cells or None)
        self.memo[id(old)] = new
        for cell, given in zip(cells, old.__closure__ or ()):
            cell.cell_contents = self._value(given.cell_contents, steps, where)
        new.__defaults__ = self._value(old.__defaults__, steps, where)
        new.__kwdefaults__ = self._value(old.__kwdefaults__, steps, where)
        new.__dict__.update(old.__dict__)
        return new


def original_class(layer: Any) -> type:
    """The user's class of a layer, whatever we made of it."""
    return next(cls for cls in type(layer).__mro__ if not vars(cls).get("_made_by_foldconv"))


def _move(old: Any, new: Any) -> None:
    """Give a layer that was built by itself, and its variables, the paths that they have in the model."""
    if isinstance(old, keras.Layer) and old.path is not None and new.path is not None:
        before = new.path
        for moved in (*new.variables, *new._flatten_layers()):
            if moved.path is not None:
                moved._path = old.path + moved.path.removeprefix(before)


def _within(layer: Any) -> list[Any]:
    return layer._flatten_layers(include_self=False)


def _is_known(layer: Any) -> bool:
    """Is a layer all that its config and its weights say? A user's may have been given attributes since."""
    return type(layer).__module__.partition(".")[0] in ("keras", "foldconv")


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


def _variable(old: Any) -> Any:
    """A variable of its own with the same value."""
    value = np.array(keras.ops.convert_to_numpy(old))
    new = keras.Variable(value, dtype=old.dtype, trainable=old.trainable, autocast=old._autocast, name=old.name)
    new._path, new.regularizer, new.constraint = old.path, old.regularizer, old.constraint
    return new


def _reaches(value: Any, seen: set[int] | None = None) -> bool:
    """Is there a way from an object to a layer or a variable?"""
    seen = set() if seen is None else seen
    if isinstance(value, (keras.Layer, keras.Variable)):
        return True
    if value is None or isinstance(value, (*_SHARED, np.ndarray)) or id(value) in seen:
        return False
    seen.add(id(value))
    if isinstance(value, dict):
        inside = list(value.values())
    elif isinstance(value, (list, tuple, set, frozenset)):
        inside = list(value)
    elif isinstance(value, types.MethodType):
        inside = [value.__self__]
    elif isinstance(value, functools.partial):
        inside = [value.func, value.args, value.keywords]
    elif isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        inside = [*cells, value.__defaults__, value.__kwdefaults__]
    else:
        inside = list(vars(value).values()) if hasattr(value, "__dict__") else []
    return any(_reaches(one, seen) for one in inside)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _refuse_foreign(value: Any, where: str) -> None:
    """A backend's own variable or compiled function, which a copy would share with the original."""
    mutable = any(
        base.__name__ in ("Variable", "Parameter", "Module", "PolymorphicFunction") for base in type(value).__mro__
    )
    if mutable and type(value).__module__.partition(".")[0] in ("tensorflow", "torch", "flax"):
        raise UnsupportedError(
            f"{where}: it holds a {type(value).__name__} of {type(value).__module__.partition('.')[0]}, which a copy "
            "would share with the model; make variables by add_weight, and layers of Keras"
        )
