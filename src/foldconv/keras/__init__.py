"""Foldable convolutions for Keras 3, on any of its backends: DO-Conv, OREPA, RepVGG.

>>> import keras
>>> from foldconv.keras import DOConv2D
>>> layer = DOConv2D(8, 3, padding="same")        # trains as a DO-Conv
>>> _ = layer(keras.ops.zeros((1, 6, 6, 4)))
>>> type(layer.fold()).__name__                   # deploys as a plain convolution
'Conv2D'

This part needs Keras and its backend alone; torch only where it is that backend.
"""

from .doconv import DOConv1D as DOConv1D
from .doconv import DOConv2D as DOConv2D
from .doconv import DOConv3D as DOConv3D
from .doconv import DODepthwiseConv1D as DODepthwiseConv1D
from .doconv import DODepthwiseConv2D as DODepthwiseConv2D
from .exporting import export as export
from .foldable import FoldableLayer as FoldableLayer
from .network import expand as expand
from .network import fold as fold
from .orepa import OREPAConv1D as OREPAConv1D
from .orepa import OREPAConv2D as OREPAConv2D
from .orepa import OREPAConv3D as OREPAConv3D
from .orepa import OREPADepthwiseConv1D as OREPADepthwiseConv1D
from .orepa import OREPADepthwiseConv2D as OREPADepthwiseConv2D
from .originals import import_checkpoint as import_checkpoint
from .parameters import exclude_from_weight_decay as exclude_from_weight_decay
from .repvgg import NormPlace as NormPlace
from .repvgg import RepVGGConv1D as RepVGGConv1D
from .repvgg import RepVGGConv2D as RepVGGConv2D
from .repvgg import RepVGGConv3D as RepVGGConv3D
from .repvgg import RepVGGDepthwiseConv1D as RepVGGDepthwiseConv1D
from .repvgg import RepVGGDepthwiseConv2D as RepVGGDepthwiseConv2D
