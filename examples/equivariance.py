"""Infinitely wide equivariant networks, step by step: a script in notebook cells (``# %%``) for editors that run them.

.venv/bin/python examples/equivariance.py
"""

# %% [markdown]
# # What does an infinitely wide equivariant network see?
# Four images: noise, the same turned by 90 degrees, the same turned by 45, and other noise.

# %%
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, rotate

from equikernel import Activation, AvgPool, Conv, Custom, GroupCNN, NetworkError, Residual, finite

np.set_printoptions(precision=4, suppress=True)
rng = np.random.default_rng(0)
noise = gaussian_filter(rng.normal(size=(2, 24, 24)), sigma=(0, 2, 2))
turned = rotate(noise[0], 45, reshape=False)
x = np.stack([noise[0], np.rot90(noise[0]), turned, noise[1]])[:, 6:18, 6:18, None]
x /= x.std(axis=(1, 2, 3), keepdims=True)


def correlations(kernel: NDArray[np.float64]) -> NDArray[np.float64]:
    """The kernel of each image with the first one, divided by both norms."""
    norm = np.sqrt(np.diag(kernel))
    normalized: NDArray[np.float64] = kernel[0] / (norm[0] * norm)
    return normalized


# %% [markdown]
# ## CNN against C4, in one pass
# The CNN (C1) takes the turned image for another one; the C4 network cannot tell it from the first.

# %%
kernels = GroupCNN(depth=3).kernel(x, groups=("C1", "C2", "C4"), dtype="float64")
for group, kernel in kernels.items():
    print(f"{group}: NTK correlation with [itself, turned 90, turned 45, other] = {correlations(kernel.ntk)}")

# %% [markdown]
# ## Eight rotations
# 45 degrees do not map pixels to pixels: the filters are rotated by interpolation, and the dense recursion is needed.
# `explain` says so, and what it costs. Now also the image at 45 degrees is close to the first.

# %%
c8 = GroupCNN(group="C8", depth=3)
print(c8.explain(x.shape[1:]))
print(f"C8: {correlations(c8.kernel(x, dtype='float64').ntk)}")

# %% [markdown]
# ## Other layers
# Strides, pooling, residual branches, any activation; what would break the symmetry is refused, with sizes that work.

# %%
swish = Custom(lambda u: u / (1 + jnp.exp(-u)))
layers = [Conv(3, activation="identity"), Residual([Activation("sin"), Conv(3)]), Conv(3, activation=swish)]
print(GroupCNN(group="C4", layers=layers).explain(x.shape[1:]))
print(GroupCNN(group="C4", layers=[Conv(3), AvgPool(2), Conv(3)]).explain(x.shape[1:]))
try:
    GroupCNN(group="C4", layers=[Conv(3, stride=2), Conv(3)]).kernel(x)
except NetworkError as error:
    print(f"refused: {error}")

# %% [markdown]
# ## Finite networks converge to the kernels
# The mean NTK of random networks approaches the limit as 1/width, their spread as its root.

# %%
small, net = x[:1, :5, :5], GroupCNN(group="C4", depth=1, activation="erf", head=("monomial(2)",))
limit = net.kernel(small, dtype="float64").ntk[0, 0]
for width in (2, 8, 32, 128):
    ntk = finite.empirical_kernels(net, width, jax.random.key(0), small, samples=4000)[1][:, 0, 0] / limit
    print(f"width {width:3}: NTK / limit = {ntk.mean():.3f} ± {ntk.std() / 4000**0.5:.3f}, spread {ntk.std():.2f}")

# %% [markdown]
# ## Spectra
# Equivariance makes the Gram matrix of turned copies degenerate: four turns of ten images have rank ten under C4.

# %%
images = rng.normal(size=(10, 8, 8, 1))
orbit = np.concatenate([np.rot90(images, k, axes=(1, 2)) for k in range(4)])
for group, kernel in GroupCNN(depth=2).kernel(orbit, groups=("C1", "C4"), dtype="float64").items():
    eigenvalues = np.linalg.eigvalsh(kernel.ntk)[::-1]
    print(f"{group}: {np.sum(eigenvalues > 1e-10 * eigenvalues[0])} of {len(orbit)} eigenvalues are not zero")
