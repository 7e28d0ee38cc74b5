"""Lightning's Trainer with one callback, under the name that users import."""

from .integrations.lightning import FoldConv as FoldConv
from .integrations.lightning import fold_checkpoint as fold_checkpoint

__all__ = ["FoldConv", "fold_checkpoint"]
