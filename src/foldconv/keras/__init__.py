"""DO-Conv for Keras 3, on any of its backends.

>>> import keras
>>> from foldconv.keras import DOConv2D
>>> layer = DOConv2D(8, 3, padding="same")        # trains as a DO-Conv
>>> _ = layer(keras.ops.zeros((1, 6, 6, 4)))
>>> type(layer.fold()).__name__                   # deploys as a plain convolution
'Conv2D'

This part needs Keras and its backend alone; torch only where it is that backend.
"""

from .imports import import_doconv
from .layers import DOConv1D, DOConv2D, DOConv3D, DODepthwiseConv1D, DODepthwiseConv2D
from .surgery import expand, fold

__all__ = ["DOConv1D", "DOConv2D", "DOConv3D", "DODepthwiseConv1D", "DODepthwiseConv2D"]
__all__ += ["expand", "fold", "import_doconv"]
