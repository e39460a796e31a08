"""Kernels of infinitely wide equivariant neural networks, on one device.

>>> from equikernel import GroupCNN
>>> k = GroupCNN(group="C4", depth=3).kernel(images)        # k.nngp, k.ntk: (n, n) arrays
"""

from equikernel.errors import EngineError, EquikernelError, ImageError, NetworkError, NonFiniteKernelError
from equikernel.network import Architecture, GroupCNN

__all__ = [
    "Architecture",
    "EngineError",
    "EquikernelError",
    "GroupCNN",
    "ImageError",
    "NetworkError",
    "NonFiniteKernelError",
]
