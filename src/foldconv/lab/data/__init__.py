"""Data sets: a name or a path becomes `ImageData`, which becomes batches, the same for the same seed and epoch."""

from .catalogue import create_data as create_data
from .catalogue import list_data as list_data
from .image_data import ImageData as ImageData
from .loaders import EpochShuffle as EpochShuffle
from .loaders import epoch_seed as epoch_seed
from .loaders import evaluation_loader as evaluation_loader
from .loaders import training_loader as training_loader
from .loaders import travelled as travelled
from .transforms import AUGMENTATIONS as AUGMENTATIONS
from .transforms import BatchTransform as BatchTransform

__all__ = [
    "AUGMENTATIONS",
    "BatchTransform",
    "EpochShuffle",
    "ImageData",
    "create_data",
    "epoch_seed",
    "evaluation_loader",
    "list_data",
    "training_loader",
    "travelled",
]
