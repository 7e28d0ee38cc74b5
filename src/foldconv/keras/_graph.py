"""Which BatchNormalization alone follows which convolution, read off a model's graph."""

# Keras is not installed where types are checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

from typing import Any

import keras


def is_graph(model: Any) -> bool:
    """Is it a Sequential or functional model?"""
    return isinstance(model, keras.Sequential) or (isinstance(model, keras.Model) and hasattr(model, "operations"))


def links(model: Any) -> list[tuple[Any, Any]]:
    """Pairs of layers of one model, each called once in it, the second alone reading what the first puts out.

    The second gets nothing else, neither a second input nor an argument such as ``training=False``.
    """
    if isinstance(model, keras.Sequential):
        once = [layer for layer in model.layers if sum(other is layer for other in model.layers) == 1]
        return [(a, b) for a, b in zip(model.layers, model.layers[1:]) if a in once and b in once]
    nodes = [node for same_depth in model._nodes_by_depth.values() for node in same_depth]
    calls: dict[int, int] = {}
    readers: dict[int, list[Any]] = {}
    for node in nodes:
        calls[id(node.operation)] = calls.get(id(node.operation), 0) + 1
        for tensor in node.input_tensors:
            readers.setdefault(id(tensor), []).append(node)
    outputs = {id(tensor) for tensor in keras.tree.flatten(model.outputs)}
    found = []
    for node in nodes:
        tensors = keras.tree.flatten(node.outputs)
        if len(tensors) != 1 or id(tensors[0]) in outputs or len(readers.get(id(tensors[0]), [])) != 1:
            continue
        (reader,) = readers[id(tensors[0])]
        alone = len(reader.input_tensors) == 1 and not any(v is not None for v in reader.arguments.kwargs.values())
        if alone and calls[id(node.operation)] == calls[id(reader.operation)] == 1:
            found.append((node.operation, reader.operation))
    return found


def takes_in(conv: Any, norm: Any) -> bool:
    """Can a convolution's layer take in the norm that follows it?"""
    if (
        type(norm) is not keras.layers.BatchNormalization
        or getattr(norm, "renorm", False)
        or conv.activity_regularizer is not None
    ):
        return False
    linear = conv.activation is None or conv.activation is keras.activations.linear
    ndim = len(conv.kernel_size) + 2
    return linear and norm.axis % ndim == (1 if conv.data_format == "channels_first" else ndim - 1)
