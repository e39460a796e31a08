"""Tables of figures."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table


def table(title: str, columns: Sequence[str], numbers: Sequence[str], caption: str = "") -> Table:
    """An empty table whose last columns are ``numbers``."""
    out = Table(
        title=title,
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE,
        pad_edge=False,
        collapse_padding=True,
    )
    for name in columns:
        out.add_column(name, no_wrap=True)
    for name in numbers:
        out.add_column(name, justify="right", no_wrap=True, min_width=7)
    return out
