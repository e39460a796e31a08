"""What an experiment has done so far, in a file beside its table: interrupted, it goes on from there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from equigram.digests import json_sha256
from equigram.tables import write_whole


class Parts:
    """Finished parts of an experiment by name, as values of JSON.

    Args:
      path: the file; one that is damaged, or of another problem, counts as none.
      problem: what the parts depend on, as a value of JSON.
    """

    def __init__(self, path: Path, problem: dict[str, Any]) -> None:
        self._path, self._problem = path, json.loads(json.dumps(problem))
        self._parts: dict[str, Any] = {}
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["sha256"] == json_sha256(content["parts"]) and content["problem"] == self._problem:
                self._parts = dict(content["parts"])
        except (OSError, ValueError, LookupError, TypeError):  # none, or damaged
            pass

    def get(self, name: str) -> Any:
        """A part; ``None`` where it is not done."""
        return self._parts.get(name)

    def keep(self, name: str, part: Any) -> None:
        """Keep a part.

        Raises:
          StoreError: the file cannot be written.
        """
        self._parts[name] = part
        content = {"problem": self._problem, "parts": self._parts, "sha256": json_sha256(self._parts)}
        write_whole(self._path, json.dumps(content).encode())

    def delete(self) -> None:
        """Forget all: the table is written."""
        self._path.unlink(missing_ok=True)
