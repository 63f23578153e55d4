"""How a sentence-transformers folder turns hidden states into one vector."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def read_pooling(folder: Path) -> dict[str, Any]:
    """`pooling` and `normalize` from modules.json and the pooling module's config; empty without modules.json."""
    return {}
