"""What a foldable layer is: `Foldable` for any; `ComposedConv` where the kernel is composed while training;
`BranchedConv` where branches with norms run while training; `FoldableBlock` for a user's own.
"""

from .block import FoldableBlock as FoldableBlock
from .branched import BranchedConv as BranchedConv
from .composed import ComposedConv as ComposedConv
from .foldable import Foldable as Foldable
from .place import NormPlace as NormPlace

__all__ = ["BranchedConv", "ComposedConv", "Foldable", "FoldableBlock", "NormPlace"]
