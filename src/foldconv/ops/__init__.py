"""How a kernel is composed fast: the same formula on several paths, and the rule that picks one.

=============  ====================================================================================
path           where
=============  ====================================================================================
``torch``      torch operations; everywhere, and wherever a compiler, tracer or transform looks on
``cpu``        one pass over the weights in each direction, by Numba (the extra ``cpu``)
``blocks``     where nothing is compiled: torch's products over several input channels at once (DO-Conv)
``gpu``        one launch per layer in each direction, by Triton, which comes with torch for CUDA
=============  ====================================================================================

Every path computes what torch's operations compute, to rounding, and is deterministic. `why` says which one tensors
take and why, `foldconv.explain` that of each layer; `using` forces one, and the variable ``FOLDCONV_PATH`` one for the
whole process. The GPU's is on trial: its first result for each shape is compared with torch's, and if it is wrong the
path steps aside with a warning.
"""

from ._autograd import compose_compiled, compose_depthwise, compose_orepa, compose_orepa_compiled
from ._context import is_recorded
from ._paths import Path, choose, paths, using, why
from ._torch import Orepa, OrepaParameters, orepa_branches, passed_on

__all__ = [
    "Orepa",
    "OrepaParameters",
    "Path",
    "choose",
    "compose_compiled",
    "compose_depthwise",
    "compose_orepa",
    "compose_orepa_compiled",
    "is_recorded",
    "orepa_branches",
    "passed_on",
    "paths",
    "using",
    "why",
]
