"""The methods, one paper per file; importing one here registers it."""

from ._registry import Method as Method
from ._registry import as_method as as_method
from ._registry import get_method as get_method
from ._registry import list_methods as list_methods
from ._registry import method_from_json as method_from_json
from ._registry import method_from_text as method_from_text
from ._registry import register as register
from .acnet import ACNet as ACNet
from .dbb import DBB as DBB
from .dgconv import DGConv as DGConv
from .dilated import Dilated as Dilated
from .doconv import DOConv as DOConv
from .expandnet import ExpandNet as ExpandNet
from .mobileone import MobileOne as MobileOne
from .orepa import OREPA as OREPA
from .orepa_vgg import OREPAVGG as OREPAVGG
from .qarepvgg import QARepVGG as QARepVGG
from .repvgg import RepVGG as RepVGG
