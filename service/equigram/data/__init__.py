"""Images and labels from any fsspec URL, as the kernels see them.

:func:`load_dataset` reads what a job's ``data`` section names, :func:`survey` looks at it
without decoding, :func:`load_images` and, with labels, :func:`load_more` treat new images the same way, and
:func:`fingerprint` tells whether the sources are still those that were read.
"""

from equigram.data.dataset import Dataset, Split, Survey, fingerprint, load_dataset, load_images, load_more, survey
from equigram.data.preprocessing import Preprocessing

__all__ = [
    "Dataset",
    "Preprocessing",
    "Split",
    "Survey",
    "fingerprint",
    "load_dataset",
    "load_images",
    "load_more",
    "survey",
]
