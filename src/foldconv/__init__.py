"""foldconv: train with a richer convolution, deploy a plain one.

>>> import torch, foldconv
>>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
>>> rich = foldconv.expand(net, "doconv")       # same function, more to train
>>> plain = foldconv.fold(rich)                 # a plain network again, checked layer by layer
>>> plain.state_dict().keys() == net.state_dict().keys()
True

Names are loaded when first used, so importing foldconv costs next to nothing beyond torch.
"""

import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "surgery": ["expand"],
    "folding": ["fold"],
    "verification": ["verify"],
    "inspection": ["summary"],
    "optimization": ["parameter_groups", "regularization"],
    "serialization": ["save", "load"],
    "checkpoints": ["import_checkpoint"],
    "convert": ["convert_weights"],
    "permutation": ["absorb_permutations"],
    "layers.permuted": ["PermutedConv1d", "PermutedConv2d", "PermutedConv3d"],
    "methods": ["list_methods", "get_method"],
    "methods.dgconv": ["DGConv", "DGConv1d", "DGConv2d", "DGConv3d", "budget_objective"],
    "methods.doconv": [
        "DOConv",
        "DOConv1d",
        "DOConv2d",
        "DOConv3d",
        "DOConvTranspose1d",
        "DOConvTranspose2d",
        "DOConvTranspose3d",
    ],
    "methods.expandnet": ["ExpandNet", "ExpandNetConv1d", "ExpandNetConv2d", "ExpandNetConv3d"],
    "methods.orepa": [
        "OREPA",
        "OREPAConv1d",
        "OREPAConv2d",
        "OREPAConv3d",
        "OREPALargeConv1d",
        "OREPALargeConv2d",
        "OREPALargeConv3d",
    ],
    "methods.repvgg": ["RepVGG"],
    "methods.acnet": ["ACNet"],
    "methods.dbb": ["DBB"],
    "methods.dilated": ["Dilated"],
    "methods.mobileone": ["MobileOne"],
    "methods.qarepvgg": ["QARepVGG"],
    "methods.orepa_vgg": ["OREPAVGG"],
    "layers": ["FoldableBlock"],
    "errors": ["FoldConvError", "NoMatchError", "FoldMismatchError", "UnsupportedError", "CheckpointError"],
}
_WHERE = {name: home for home, names in _HOMES.items() for name in names}
_SUBMODULES = ("algebra", "checkpoints", "diagnostics", "errors", "layers", "methods", "testing", "train", "zoo")
__all__ = sorted(_WHERE)  # pyright: ignore[reportUnsupportedDunderAll]

if _TYPE_CHECKING:
    from .checkpoints import import_checkpoint as import_checkpoint
    from .convert import convert_weights as convert_weights
    from .errors import CheckpointError as CheckpointError
    from .errors import FoldConvError as FoldConvError
    from .errors import FoldMismatchError as FoldMismatchError
    from .errors import NoMatchError as NoMatchError
    from .errors import UnsupportedError as UnsupportedError
    from .folding import fold as fold
    from .inspection import summary as summary
    from .layers import FoldableBlock as FoldableBlock
    from .layers.permuted import PermutedConv1d as PermutedConv1d
    from .layers.permuted import PermutedConv2d as PermutedConv2d
    from .layers.permuted import PermutedConv3d as PermutedConv3d
    from .methods import get_method as get_method
    from .methods import list_methods as list_methods
    from .methods.acnet import ACNet as ACNet
    from .methods.dbb import DBB as DBB
    from .methods.dgconv import DGConv as DGConv
    from .methods.dgconv import DGConv1d as DGConv1d
    from .methods.dgconv import DGConv2d as DGConv2d
    from .methods.dgconv import DGConv3d as DGConv3d
    from .methods.dgconv import budget_objective as budget_objective
    from .methods.dilated import Dilated as Dilated
    from .methods.doconv import DOConv as DOConv
    from .methods.doconv import DOConv1d as DOConv1d
    from .methods.doconv import DOConv2d as DOConv2d
    from .methods.doconv import DOConv3d as DOConv3d
    from .methods.doconv import DOConvTranspose1d as DOConvTranspose1d
    from .methods.doconv import DOConvTranspose2d as DOConvTranspose2d
    from .methods.doconv import DOConvTranspose3d as DOConvTranspose3d
    from .methods.expandnet import ExpandNet as ExpandNet
    from .methods.expandnet import ExpandNetConv1d as ExpandNetConv1d
    from .methods.expandnet import ExpandNetConv2d as ExpandNetConv2d
    from .methods.expandnet import ExpandNetConv3d as ExpandNetConv3d
    from .methods.mobileone import MobileOne as MobileOne
    from .methods.orepa import OREPA as OREPA
    from .methods.orepa import OREPAConv1d as OREPAConv1d
    from .methods.orepa import OREPAConv2d as OREPAConv2d
    from .methods.orepa import OREPAConv3d as OREPAConv3d
    from .methods.orepa import OREPALargeConv1d as OREPALargeConv1d
    from .methods.orepa import OREPALargeConv2d as OREPALargeConv2d
    from .methods.orepa import OREPALargeConv3d as OREPALargeConv3d
    from .methods.orepa_vgg import OREPAVGG as OREPAVGG
    from .methods.qarepvgg import QARepVGG as QARepVGG
    from .methods.repvgg import RepVGG as RepVGG
    from .optimization import parameter_groups as parameter_groups
    from .optimization import regularization as regularization
    from .permutation import absorb_permutations as absorb_permutations
    from .serialization import load as load
    from .serialization import save as save
    from .surgery import expand as expand
    from .verification import verify as verify


def __getattr__(name: str) -> object:
    if name in _WHERE:
        value = getattr(_importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return _importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
