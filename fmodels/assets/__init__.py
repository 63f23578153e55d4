"""The files that come with fmodels."""

from __future__ import annotations

from pathlib import Path

TINY_LLAMA = Path(__file__).parent / "tiny-llama"
"""Folder of a small Llama trained on the Python standard library: the checkpoint of the demo and the examples."""

HELDOUT = Path(__file__).parent / "heldout.txt"
"""Text that the small Llama was not trained on."""
