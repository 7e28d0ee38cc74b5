"""DO-Conv for Gluon, the layer library of MXNet 1.9.

>>> import mxnet as mx
>>> from foldconv import gluon
>>> net = mx.gluon.nn.HybridSequential(prefix="net_")
>>> net.add(mx.gluon.nn.Conv2D(8, 3), mx.gluon.nn.Activation("relu"))
>>> net.initialize()
>>> rich = gluon.expand(net, "doconv")       # same function, more to train
>>> plain = gluon.fold(rich)                 # plain layers again
>>> type(rich[0]).__name__, type(plain[0]).__name__
('DOConv2D', 'Conv2D')

This part needs MXNet alone, no torch.
"""

from .layers import DOConv2D, fold
from .network import expand
from .originals import import_checkpoint

__all__ = ["DOConv2D", "expand", "fold", "import_checkpoint"]
