"""Cut texture patches out of photographs that scikit-image ships, as a folder of class folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import skimage
from PIL import Image

PHOTOGRAPHS = {"brick": "brick", "grass": "grass", "gravel": "gravel", "moon": "moon", "tissue": "ihc"}
"""Class to file name; ``ihc`` is a stained tissue section."""

FOLDER = Path(__file__).parent / "data/textures"
PATCH = 48
TRAIN, TEST = 32, 20


def main(folder: Path = FOLDER) -> None:
    """Write ``TRAIN`` upright patches per class from the left half of its photograph, ``TEST`` turned ones beside."""
    rng = np.random.default_rng(0)
    for name, file in PHOTOGRAPHS.items():
        photograph = Image.open(Path(skimage.__file__).parent / "data" / f"{file}.png").convert("L")
        half = photograph.width // 2
        for split, left, right, count in (("train", 0, half, TRAIN), ("test", half, photograph.width, TEST)):
            place = folder / split / name
            place.mkdir(parents=True, exist_ok=True)
            for index in range(count):
                x, y = rng.integers(left, right - PATCH + 1), rng.integers(photograph.height - PATCH + 1)
                patch = photograph.crop((int(x), int(y), int(x) + PATCH, int(y) + PATCH))
                if split == "test":
                    patch = patch.rotate(90 * int(rng.integers(4)))
                patch.save(place / f"{index:02}.png")
    print(f"{len(PHOTOGRAPHS)} classes with {TRAIN} training and {TEST} test patches each in {folder}")


if __name__ == "__main__":
    main()
