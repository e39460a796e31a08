"""The demo: photographs to patches, patches to Gram matrices on Ray, Gram matrices to predictions and plots."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PYTHON = Path(sys.executable)
PROGRAMS = {"python": PYTHON, "equigram": PYTHON.with_name("equigram")}
TOP = Path(__file__).resolve().parents[1]


def step(why: str, *command: str) -> None:
    """Say what comes next and why, and run the command that a user would type in the top folder."""
    print(f"\n# {why}\n$ {' '.join(command)}", flush=True)
    program, *arguments = command
    code = subprocess.run([PROGRAMS[program], *arguments], cwd=TOP, check=False).returncode
    if code:
        sys.exit(code)


def main() -> None:
    """Run the demo; everything it writes is in the top folder of the checkout."""
    job, store = "examples/textures.yaml", "runs/textures"
    step("Patches of photographs: those to train on upright, those to test on turned", "python", "examples/textures.py")
    step("What will it cost?", "equigram", "plan", job)
    step("Images, tiles on Ray workers, regression. Ctrl-C, and the same command goes on", "equigram", "run", job)
    step("Draw matrices, spectra, confusions, learning curves", "equigram", "plot", store, "-o", "plots/textures")
    moon = "examples/data/textures/test/moon"
    step("Predict images", "equigram", "predict", store, moon, "-o", "plots/moon.csv")
    step("What is stored, and which network did better at which training size?", "equigram", "status", store)
    print(
        f"""\
# The table says it: trained on upright patches, the CNN (C1) meets turned ones unprepared; the C4 network, built
# from the same convolutions, does not care how a patch is turned.
#
# Next, in {TOP}:
#   look at the pictures                 plots/textures/
#   run it again, nothing is left to do  .venv/bin/equigram run {job}
#   your own images                      copy {job}, change `store` and `data`
#   every field of a job                 docs/job.md, .venv/bin/equigram run --help
#   a large data set                     examples/histology.yaml"""
    )


if __name__ == "__main__":
    main()
