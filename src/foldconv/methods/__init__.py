"""The methods, one paper per file; importing one here registers it."""

from ._registry import Method as Method
from ._registry import as_method as as_method
from ._registry import get_method as get_method
from ._registry import list_methods as list_methods
from ._registry import method_from_json as method_from_json
from ._registry import register as register
from .dgconv import DGConv as DGConv
from .doconv import DOConv as DOConv
from .repvgg import RepVGG as RepVGG
