"""Which variables of a Keras model weight decay leaves alone."""

# Keras is not installed where types are checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

from typing import Any

import keras

from .._arguments import expect
from ..errors import UnsupportedError
from .foldable import FoldableLayer


def exclude_from_weight_decay(optimizer: Any, model: Any) -> list[str]:
    """Keep an optimizer's weight decay to kernels and what they are composed from, as `foldconv.parameter_groups` does.

    Biases, the variables of norms and per-channel scales (OREPA's ``vector``) do not decay. DO-Conv's ``D`` does: it is
    what is added to an identity, so decay draws it to that.

    Args:
        optimizer: of Keras, not used yet; its own ``exclude_from_weight_decay`` is called, which forgets what it was
            told before.
        model: plain or expanded; built.

    Returns:
        The paths of the variables that do not decay.

    Raises:
        TypeError: for what is no optimizer, or no model.
        UnsupportedError: for an optimizer that has its slots already, or a model without weights.

    Example:
        >>> from foldconv.keras import OREPAConv2D
        >>> net = keras.Sequential([keras.Input((6, 6, 3)), OREPAConv2D(8, 3, name="conv")], name="net")
        >>> exclude_from_weight_decay(keras.optimizers.AdamW(weight_decay=1e-4), net)
        ['net/conv/bias', 'net/conv/vector']
    """
    expect("optimizer", optimizer, keras.optimizers.Optimizer, "an optimizer of Keras")
    expect("model", model, keras.Model, "a keras.Model")
    if not model.built:
        raise UnsupportedError(f"{model.name}: it has no weights yet; call it, or build it, first")
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    if optimizer.built:
        raise UnsupportedError(
            f"{optimizer.name}: it has its variables already; exclude some of them before the first step"
        )
    exempt = set()
    for layer in [model, *model._flatten_layers(include_self=False)]:
        if isinstance(layer, FoldableLayer):
            exempt |= {id(layer.present().get(name)) for name in layer.no_decay}
        elif isinstance(layer, _norms()):
            exempt |= {id(variable) for variable in layer.weights}
    free = [v for v in model.trainable_variables if len(v.shape) <= 1 or v.name.endswith("bias") or id(v) in exempt]
    optimizer.exclude_from_weight_decay(var_list=free)
    return [variable.path for variable in free]


def _norms() -> tuple[type, ...]:
    names = ("BatchNormalization", "LayerNormalization", "GroupNormalization", "RMSNormalization")
    return tuple(getattr(keras.layers, name) for name in names if hasattr(keras.layers, name))
