"""Kernels of infinitely wide equivariant neural networks, on one device.

>>> from equikernel import GroupCNN
>>> k = GroupCNN(group="C4", depth=3).kernel(images)        # k.nngp, k.ntk: (n, n) arrays
"""

from equikernel.activations import AccuracyWarning, Custom
from equikernel.errors import (
    EngineError,
    EquikernelError,
    ImageError,
    MemoryLimitError,
    NetworkError,
    NonFiniteKernelError,
)
from equikernel.layers import Activation, AvgPool, Conv, Residual
from equikernel.network import Architecture, GroupCNN

__all__ = [
    "AccuracyWarning",
    "Activation",
    "Architecture",
    "AvgPool",
    "Conv",
    "Custom",
    "EngineError",
    "EquikernelError",
    "GroupCNN",
    "ImageError",
    "MemoryLimitError",
    "NetworkError",
    "NonFiniteKernelError",
    "Residual",
]
