"""Draw images in the layout in which NCT-CRC-HE-100K and CRC-VAL-HE-7K are published, to try jobs on without them.

python examples/tissue.py data --train 8 --test 4

Nothing in them is tissue: fibres whose grain tells the class, in the colours of the stain, turned at random.
"""

from __future__ import annotations

import argparse
import string
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

TISSUES = ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")
"""Adipose, background, debris, lymphocytes, mucus, smooth muscle, normal mucosa, stroma, tumour."""

SIDE = 224
DARK, BRIGHT = np.array([110.0, 40.0, 130.0]), np.array([245.0, 205.0, 225.0])
"""The colours of a nucleus and of what has taken little stain."""


def picture(label: int, rng: np.random.Generator, side: int = SIDE) -> NDArray[np.uint8]:
    """Noise smoothed along and across fibres by lengths that tell the class, ``(side, side, 3)``."""
    along, across = 8 + 12 * (label // 3), 3 + 4 * (label % 3)
    noise = gaussian_filter(rng.normal(size=(side, side)), (along, across), mode="wrap")
    stain = 1 / (1 + np.exp(-2 * noise / noise.std()))[..., None]
    colours: NDArray[np.uint8] = (DARK + stain * (BRIGHT - DARK)).astype(np.uint8)
    return np.rot90(colours, int(rng.integers(4)))


def main(folder: Path, train: int, test: int, seed: int = 0) -> None:
    """Write ``train`` and ``test`` images of each class, as TIFF files in a folder per class."""
    rng = np.random.default_rng(seed)
    for name, part, count in (("NCT-CRC-HE-100K", "", train), ("CRC-VAL-HE-7K", "TCGA-", test)):
        for label, tissue in enumerate(TISSUES):
            place = folder / name / tissue
            place.mkdir(parents=True, exist_ok=True)
            for _ in range(count):
                letters = "".join(rng.choice(list(string.ascii_uppercase), 8))
                Image.fromarray(picture(label, rng)).save(place / f"{tissue}-{part}{letters}.tif")
        print(f"{folder / name}: {len(TISSUES)} classes with {count} images each")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where")
    parser.add_argument("--train", type=int, default=100, help="training images of each class")
    parser.add_argument("--test", type=int, default=50, help="test images of each class")
    parser.add_argument("--seed", type=int, default=0, help="another one draws other images")
    asked = parser.parse_args()
    main(asked.folder, asked.train, asked.test, asked.seed)
