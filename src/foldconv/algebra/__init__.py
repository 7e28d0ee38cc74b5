"""The kernel algebra: linear layers as values, evaluated on feature maps or composed into one kernel.

>>> import torch
>>> from torch import nn
>>> from foldconv.algebra import Sum, kernel_of
>>> block = Sum(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Identity()).double()
>>> x = torch.randn(1, 4, 6, 6, dtype=torch.float64)
>>> torch.allclose(block(x), kernel_of(block)(x))
True
>>> kernel_of(block).to_module()
Conv2d(4, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
"""

from .kernel import Kernel as Kernel
from .modules import Scale as Scale
from .modules import Sum as Sum
from .norms import scale_and_shift as scale_and_shift
from .rules import kernel_of as kernel_of
from .rules import kernel_rule as kernel_rule

__all__ = ["Kernel", "Scale", "Sum", "kernel_of", "kernel_rule", "scale_and_shift"]
