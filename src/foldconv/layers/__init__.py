"""What a foldable layer is: `Foldable` for any, `ComposedConv` for those whose kernel is composed while training."""

from .composed import ComposedConv as ComposedConv
from .foldable import Foldable as Foldable

__all__ = ["ComposedConv", "Foldable"]
