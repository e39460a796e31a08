"""Tables beside figures: CSV files, whole or not at all."""

from __future__ import annotations

import contextlib
import csv
import io
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from equigram.errors import StoreError


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows with the same columns as CSV; numbers with all their digits, ``None`` as nothing.

    Raises:
      StoreError: the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return write_whole(path, text.getvalue().encode())


def write_whole(path: Path, content: bytes) -> Path:
    """Write a file beside its place and rename it, creating its folder.

    Raises:
      StoreError: it cannot be written.
    """
    beside = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(content)
        beside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise StoreError(
            f"{path}: cannot be written: {error.strerror or error}; choose a folder you can write to"
        ) from None
    return path
