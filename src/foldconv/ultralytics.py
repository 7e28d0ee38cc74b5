"""ultralytics' trainers, under the name that users import."""

from .integrations.ultralytics import SUFFIX as SUFFIX
from .integrations.ultralytics import FoldConv as FoldConv
from .integrations.ultralytics import FoldConvTrainer as FoldConvTrainer
from .integrations.ultralytics import fold_checkpoint as fold_checkpoint
