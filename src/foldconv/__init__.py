"""foldconv: train with a richer convolution, deploy a plain one.

>>> import torch, foldconv
>>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
>>> rich = foldconv.expand(net, "doconv")       # same function, more to train
>>> plain = foldconv.fold(rich)                 # a plain network again, checked layer by layer
>>> plain.state_dict().keys() == net.state_dict().keys()
True

Names are loaded when first used, so importing foldconv costs next to nothing beyond torch. `foldconv.zoo` and
`foldconv.train` are parts of the laboratory, which needs the extra ``train``.
"""

from typing import TYPE_CHECKING as _TYPE_CHECKING

from ._lazy import attach as _attach

if _TYPE_CHECKING:
    from ._api import *  # noqa: F403

__version__ = "0.1.0"

__getattr__, __dir__ = _attach(__name__)
