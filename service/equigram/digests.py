"""Digests of values of JSON, such as attributes of a store, settings and rows of a table."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def json_sha256(value: Any) -> str:
    """SHA-256 of a value as JSON stores it; the order of the fields does not matter."""
    text = json.dumps(json.loads(json.dumps(value)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
