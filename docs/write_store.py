"""Writes docs/store.md: the layout is the docstring of equigram.store, the words around it are here.

.venv/bin/python docs/write_store.py
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import equigram.store

HERE = Path(__file__).parent

READING = """\
## Reading it without equigram

```python
import zarr

run = zarr.open("runs/histology", mode="r")
gram = run["gram/C4/ntk"]  # float32 (n, n); reads what is sliced, and checks its checksums
some = gram[:10, :10]
labels = run["labels/train"][:]  # (n,), indices of the classes
job = run.attrs["equigram"]["spec"]  # the job, as JSON
print(some.shape, labels.shape, sorted(job))
```

The same with equigram refuses what is missing, and gives names and classes:

```python
from equigram import GramStore

store = GramStore.open("runs/histology")
theta = store.matrix("gram", "C4", "ntk")  # (n, n)
cross = store.matrix("cross", "C4", "ntk")  # (m, n)
print(store.info.classes, store.names("train")[:2], theta.shape, cross.shape)
```

`equigram export` copies matrices, labels and names into one `.npz` or another zarr ([the command line](cli.md)).

## What may be relied on

- Rows and columns of all matrices are the images in the order of `names/train` and `names/test`.
- A matrix is symmetric to the bit: a tile and its transpose are written together.
- The bits of a tile depend on the job, the versions of the software and the kind of processor only: its model, and the
  width of its vectors.
  [Long runs](runs.md) says what checksums, claims and retries there are; `equigram verify STORE` looks at all of it.
- A store belongs to one job; what can be added to it is in [Extend a run](howto/extend.md).
"""


def render() -> str:
    """The whole page."""
    _, _, text = inspect.cleandoc(equigram.store.__doc__ or "").partition("\n\n")
    about, table, notes = re.split(r"(?m)^=+ +=+\n", text)
    rows = [re.split(r"  +", line, maxsplit=1) for line in table.splitlines()]
    return "\n".join(
        [
            "<!-- Written by docs/write_store.py from the docstring of equigram.store; change these. -->",
            "# The run store",
            "",
            _code(about.strip()),
            "",
            "| what | holds |",
            "| --- | --- |",
            *(f"| {_code(name)} | {_code(holds)} |" for name, holds in rows),
            "",
            _code(notes.strip()),
            "",
            f"The format has the number {equigram.store.FORMAT}; a store of another one is refused.",
            "",
            READING,
        ]
    )


def _code(text: str) -> str:
    return text.replace("``", "`")


if __name__ == "__main__":
    (HERE / "store.md").write_text(render(), encoding="utf-8")
