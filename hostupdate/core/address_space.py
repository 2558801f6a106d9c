"""Address spaces that outlive their process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from hostupdate.core._boundary import check, lib
from hostupdate.durations import SECOND
from hostupdate.errors import CoreError

__all__ = ("held", "hold")


def hold(pid: int, timeout_ns: int = SECOND) -> int:
    """A descriptor that keeps the address space of process ``pid`` until it is closed.

    A process that dies meanwhile is gone at once; its memory is unmapped after the close, by a
    thread of this process that nobody waits for. Raises CoreError: ESRCH for a process that is gone
    or about to be, EACCES and EPERM for one that is not ours to hold, ETIMEDOUT.
    """
    detail = f"process {pid}"
    return check("hu_address_space_hold", lib.hu_address_space_hold(pid, timeout_ns), detail)


@contextmanager
def held(pid: int | None) -> Iterator[None]:
    """The same for the time of a block. Where it cannot be held a death takes longer; no error."""
    try:
        descriptor = hold(pid or 0)
    except CoreError:
        yield
        return
    try:
        yield
    finally:
        os.close(descriptor)
