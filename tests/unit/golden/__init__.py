"""Recorded streams and images, by name."""

import lzma
from functools import cache
from pathlib import Path

_HERE = Path(__file__).parent


@cache
def golden(name: str) -> bytes:
    """The content of a recorded file, decompressed."""
    return lzma.decompress((_HERE / f"{name}.xz").read_bytes())
