"""The one place where the C core's ``-errno`` becomes an exception."""

from __future__ import annotations

from hostupdate._core import ffi, lib
from hostupdate.errors import CoreError

__all__ = ("check", "ffi", "lib")


def check(operation: str, result: int, detail: str = "") -> int:
    """Returns ``result`` where it is 0 or a count; raises CoreError where it is ``-errno``."""
    if result < 0:
        raise CoreError(operation, -result, detail=detail)
    return result
