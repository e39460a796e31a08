"""neural-tangents 0.6.5 on the current JAX and without TensorFlow, and group convolutions as layers for it.

>>> from equikernel.tangents import GroupConv, GroupPool, Lift, neural_tangents, stax
>>> init_fn, apply_fn, kernel_fn = stax.serial(
...     Lift("C4", 128), stax.Relu(), GroupConv("C4", 128), stax.Relu(), GroupPool(), stax.Dense(1))

Nothing else in :mod:`equikernel` imports neural-tangents.
"""

from equikernel.tangents.bridge import NeuralTangentsError, neural_tangents, stax
from equikernel.tangents.layers import GroupConv, GroupPool, Lift

__all__ = ["GroupConv", "GroupPool", "Lift", "NeuralTangentsError", "neural_tangents", "stax"]
