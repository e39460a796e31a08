"""The demo: photographs to patches, patches to Gram matrices on Ray, Gram matrices to predictions and plots."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import textures

EQUIGRAM = Path(sys.executable).with_name("equigram")


def step(why: str, *arguments: str) -> None:
    """Say what comes next and why, and run the command that a user would type."""
    print(f"\n# {why}\n$ equigram {' '.join(arguments)}", flush=True)
    code = subprocess.run([EQUIGRAM, *arguments], check=False).returncode
    if code:
        sys.exit(code)


def main() -> None:
    """Run the demo from the top folder of the checkout."""
    print("# Patches of photographs: training patches upright, test patches turned by random quarter turns", flush=True)
    textures.main()
    step("What will it cost?", "plan", "examples/textures.yaml")
    step(
        "The run: images, tiles on Ray workers, regression. Ctrl-C and the same command goes on",
        "run",
        "examples/textures.yaml",
    )
    step("Draw the matrices, spectra, confusions and learning curves", "plot", "runs/textures", "-o", "plots/textures")
    step("Predict new images", "predict", "runs/textures", "examples/data/textures/test/moon", "-o", "plots/moon.csv")
    print(
        """
# The table above says it: trained on upright patches, the CNN (C1) meets turned ones unprepared; the C4 network,
# built from the same convolutions, does not care how a patch is turned.
#
# Next:
#   look at the pictures in              plots/textures/
#   run it again, it has nothing to do   .venv/bin/equigram run examples/textures.yaml
#   see what is stored                   .venv/bin/equigram status runs/textures
#   your own images                      copy examples/textures.yaml, change `store` and `data`
#   a large data set                     examples/histology.yaml"""
    )


if __name__ == "__main__":
    main()
