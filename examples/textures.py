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


def main(folder: Path = FOLDER, train: int = TRAIN, test: int = TEST, turned: tuple[str, ...] = ("test",)) -> None:
    """Write patches in class folders, to train on from the left half of each photograph and to test on from the right.

    Args:
      folder: where.
      train, test: patches per class.
      turned: those that are turned by random quarter turns; the others stay upright.
    """
    rng = np.random.default_rng(0)
    for name, file in PHOTOGRAPHS.items():
        photograph = Image.open(Path(skimage.__file__).parent / "data" / f"{file}.png").convert("L")
        half = photograph.width // 2
        for split, left, right, count in (("train", 0, half, train), ("test", half, photograph.width, test)):
            place = folder / split / name
            place.mkdir(parents=True, exist_ok=True)
            for index in range(count):
                x, y = rng.integers(left, right - PATCH + 1), rng.integers(photograph.height - PATCH + 1)
                patch = photograph.crop((int(x), int(y), int(x) + PATCH, int(y) + PATCH))
                if split in turned:
                    patch = patch.rotate(90 * int(rng.integers(4)))
                patch.save(place / f"{index:03}.png")
    print(f"{len(PHOTOGRAPHS)} classes with {train} training and {test} test patches each in {folder}")


if __name__ == "__main__":
    main()
