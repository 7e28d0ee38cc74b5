"""The public names, each written once; `foldconv` asks here when one is first used."""

# ruff: noqa: F401
from .deploy.equalize import equalize
from .deploy.export import export
from .deploy.quantize import quantize
from .deploy.ranges import range_report
from .errors import CheckpointError, FoldConvError, FoldMismatchError, NoMatchError, UnsupportedError
from .files.convert import convert_weights
from .files.native import load, save
from .files.originals import import_checkpoint
from .files.weights import read_weights
from .layers import FoldableBlock
from .layers.once import composed_once
from .layers.permuted import PermutedConv1d, PermutedConv2d, PermutedConv3d
from .methods import get_method, list_methods
from .methods.acnet import ACNet
from .methods.dbb import DBB
from .methods.dgconv import DGConv, DGConv1d, DGConv2d, DGConv3d, budget_objective
from .methods.dilated import Dilated
from .methods.doconv import (
    DOConv,
    DOConv1d,
    DOConv2d,
    DOConv3d,
    DOConvTranspose1d,
    DOConvTranspose2d,
    DOConvTranspose3d,
)
from .methods.expandnet import ExpandNet, ExpandNetConv1d, ExpandNetConv2d, ExpandNetConv3d
from .methods.mobileone import MobileOne
from .methods.orepa import (
    OREPA,
    OREPAConv1d,
    OREPAConv2d,
    OREPAConv3d,
    OREPALargeConv1d,
    OREPALargeConv2d,
    OREPALargeConv3d,
)
from .methods.orepa_vgg import OREPAVGG
from .methods.qarepvgg import QARepVGG
from .methods.repvgg import RepVGG
from .network.branches import branches
from .network.costs import summary
from .network.expand import expand
from .network.fold import fold
from .network.parameters import parameter_groups, regularization
from .network.paths import explain
from .network.permute import absorb_permutations
from .network.plan import plan
from .network.verify import verify
