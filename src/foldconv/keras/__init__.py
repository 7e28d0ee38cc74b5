"""Foldable convolutions for Keras 3, on any of its backends: DO-Conv, OREPA, RepVGG.

>>> import keras
>>> from foldconv.keras import DOConv2D
>>> layer = DOConv2D(8, 3, padding="same")        # trains as a DO-Conv
>>> _ = layer(keras.ops.zeros((1, 6, 6, 4)))
>>> type(layer.fold()).__name__                   # deploys as a plain convolution
'Conv2D'

This part needs Keras and its backend alone; torch only where it is that backend.
"""

from .doconv import DOConv1D, DOConv2D, DOConv3D, DODepthwiseConv1D, DODepthwiseConv2D
from .exporting import export
from .foldable import FoldableLayer
from .imports import import_doconv
from .optimization import exclude_from_weight_decay
from .orepa import OREPAConv1D, OREPAConv2D, OREPAConv3D, OREPADepthwiseConv1D, OREPADepthwiseConv2D
from .repvgg import NormPlace, RepVGGConv1D, RepVGGConv2D, RepVGGConv3D, RepVGGDepthwiseConv1D, RepVGGDepthwiseConv2D
from .surgery import expand, fold

__all__ = ["DOConv1D", "DOConv2D", "DOConv3D", "DODepthwiseConv1D", "DODepthwiseConv2D", "FoldableLayer"]
__all__ += ["OREPAConv1D", "OREPAConv2D", "OREPAConv3D", "OREPADepthwiseConv1D", "OREPADepthwiseConv2D"]
__all__ += [
    "NormPlace",
    "RepVGGConv1D",
    "RepVGGConv2D",
    "RepVGGConv3D",
    "RepVGGDepthwiseConv1D",
    "RepVGGDepthwiseConv2D",
]
__all__ += ["NormPlace", "exclude_from_weight_decay", "expand", "export", "fold", "import_doconv"]
