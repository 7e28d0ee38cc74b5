"""A network as a whole, before and after its layers were replaced: what no check of single layers shows.

A forward may use more of a layer than what it gives: how many parameters there are, which modules it finds, what a hook
adds. Where example inputs are known, both networks run on them.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..layers.handover import unchecked
from ._outputs import apart
from ._surroundings import put_back
from ._watching import arguments_of
from .tree import quiet_copy, uncompiled

_LOG = logging.getLogger("foldconv")


def whole_difference(before: nn.Module, after: nn.Module, example_inputs: Any) -> str | None:
    """Where the outputs of two networks differ in evaluation mode, in words; None, where they do not.

    Copies run in float64, and what is rounded is only what the networks themselves hold: the square root of that is
    allowed. Networks that hold narrower types, that do not run in float64 or that give other values each time are not
    compared.
    """
    types = {p.dtype for m in (before, after) for p in m.parameters() if p.is_floating_point()}
    if not types <= {torch.float32, torch.float64}:
        return None
    tolerance = math.sqrt(max((torch.finfo(each).eps for each in types), default=0))
    try:
        ours = quiet_copy(before, torch.float64)
        expected = _output(ours, example_inputs)
        found = apart(expected, _output(quiet_copy(after, torch.float64), example_inputs), tolerance)
        again = None if found is None else apart(expected, _output(ours, example_inputs), tolerance)
    except Exception as error:
        _LOG.info("%s was not compared as a whole (%s)", type(before).__name__, " ".join(str(error).split())[:200])
        return None
    return found if again is None else None


def _output(model: nn.Module, example_inputs: Any) -> Any:
    """What a copy gives for copies of the inputs, everything else being as before."""
    cast = {id(v): _cast(v) for v in pytree.tree_leaves(example_inputs) if isinstance(v, Tensor)}
    args, kwargs = arguments_of(copy.deepcopy(example_inputs, cast))
    with torch.inference_mode(False), torch.no_grad(), put_back(model), uncompiled(), unchecked():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return model(*args, **kwargs)


def _cast(tensor: Tensor) -> Tensor:
    copied = tensor.detach().clone()
    return copied.double() if copied.is_floating_point() else copied
