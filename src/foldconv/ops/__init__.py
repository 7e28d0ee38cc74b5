"""How a kernel is composed fast: the same formula on several paths, and the rule that picks one.

=============  ====================================================================================
path           where
=============  ====================================================================================
``algebra``    torch operations; everywhere, and wherever a compiler, tracer or transform looks on
``cpu``        one pass over the weights in each direction, by Numba (``pip install foldconv[cpu]``)
``gpu``        one launch per layer in each direction, by Triton, which comes with torch for CUDA
=============  ====================================================================================

Every path computes what the algebra computes, to rounding, and is deterministic. `explain` says which one a layer
takes and why; `using` forces one.
"""

from ._algebra import Orepa
from ._autograd import compose_depthwise, compose_orepa, compose_pointwise
from ._paths import Path, choose, explain, is_recorded, paths, using

__all__ = [
    "Orepa",
    "Path",
    "choose",
    "compose_depthwise",
    "compose_orepa",
    "compose_pointwise",
    "explain",
    "is_recorded",
    "paths",
    "using",
]
