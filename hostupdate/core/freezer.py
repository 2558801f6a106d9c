"""Stops and starts all guests of a host at once.

A :class:`GuestHandle` holds a guest's open files, a :class:`GuestSet` the prepared arguments of the
calls: make both in the brownout, so that :meth:`GuestSet.freeze` and :meth:`GuestSet.thaw` are one
call into C each.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from hostupdate.core._boundary import check, ffi, lib

if TYPE_CHECKING:
    from hostupdate._core import CData  # a name for the type checker only

__all__ = ("GuestHandle", "GuestSet", "Stamp", "open_cgroup", "open_process")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """When a guest was asked to stop or run, and when it was seen to do so (CLOCK_MONOTONIC).

    ``settled_monotonic_ns`` is None for a guest that was not seen running after a thaw: it is gone,
    or the deadline came first.
    """

    requested_monotonic_ns: int
    settled_monotonic_ns: int | None


class GuestHandle:
    """One guest's open cgroup files, or its pidfd where the host has no cgroup v2.

    Made by :func:`open_cgroup` or :func:`open_process`. ``label`` names the guest in errors.
    """

    __slots__ = ("events_fd", "freeze_fd", "label", "pid", "pidfd")

    def __init__(
        self, label: str, *, freeze_fd: int = -1, events_fd: int = -1, pidfd: int = -1, pid: int = 0
    ) -> None:
        self.label = label
        self.freeze_fd = freeze_fd
        self.events_fd = events_fd
        self.pidfd = pidfd
        self.pid = pid

    def frozen(self) -> bool:
        """Whether the guest is stopped now. Raises CoreError: ENODEV, ESRCH where it is gone."""
        guest = ffi.new("struct hu_guest *")
        self._fill(guest)
        return check("hu_guest_frozen", lib.hu_guest_frozen(guest), self.label) == 1

    def close(self) -> None:
        """Closes the files. The guest stays as it is: a frozen one stays frozen."""
        for name in ("freeze_fd", "events_fd", "pidfd"):
            descriptor = getattr(self, name)
            if descriptor >= 0:
                setattr(self, name, -1)
                os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _fill(self, guest: CData) -> None:
        guest.freeze_fd = self.freeze_fd
        guest.events_fd = self.events_fd
        guest.pidfd = self.pidfd
        guest.pid = self.pid


def open_cgroup(path: Path, *, label: str = "") -> GuestHandle:
    """Opens a guest's cgroup v2 directory: its whole scope, not its emulator child alone.

    Raises OSError (FileNotFoundError where there is no such cgroup or it has no freezer); nothing
    stays open then.
    """
    freeze_fd = os.open(path / "cgroup.freeze", os.O_RDWR | os.O_CLOEXEC)
    try:
        events_fd = os.open(path / "cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        os.close(freeze_fd)
        raise
    return GuestHandle(label or path.name, freeze_fd=freeze_fd, events_fd=events_fd)


def open_process(pid: int, *, label: str = "") -> GuestHandle:
    """Opens a guest's QEMU for SIGSTOP and SIGCONT: the way where no cgroup v2 exists.

    Raises ProcessLookupError where the process is gone.
    """
    return GuestHandle(label or f"pid {pid}", pidfd=os.pidfd_open(pid), pid=pid)


class GuestSet:
    """Guests that are stopped together. The handles stay the caller's, and open meanwhile."""

    __slots__ = ("_failed", "_guests", "_stamps", "handles")

    def __init__(self, handles: Sequence[GuestHandle]) -> None:
        self.handles = tuple(handles)
        self._guests = ffi.new("struct hu_guest[]", len(self.handles))
        self._stamps = ffi.new("struct hu_stamp[]", len(self.handles))
        self._failed = ffi.new("size_t *")
        for guest, handle in zip(self._guests, self.handles, strict=True):
            handle._fill(guest)

    def __len__(self) -> int:
        return len(self.handles)

    def freeze(self, deadline_monotonic_ns: int) -> list[Stamp]:
        """Stops every guest or none.

        Raises CoreError: ETIMEDOUT (one was not stopped by the deadline, or the deadline has passed
        already), ENODEV (its cgroup is gone), ESRCH (its processes are gone). Its detail says which
        guest. Every guest has been told to run then.
        """
        result = lib.hu_guests_freeze(
            self._guests, len(self.handles), deadline_monotonic_ns, self._stamps, self._failed
        )
        if result < 0:
            culprit: int = self._failed[0]
            blame = self._name(culprit) if culprit < len(self.handles) else ""
            check("hu_guests_freeze", result, blame)
        return self.stamps()

    def thaw(self, deadline_monotonic_ns: int) -> list[Stamp]:
        """Lets every guest run, and waits until they are seen to.

        A guest that is gone needs none: its stamp says None. Raises CoreError where one could not
        be asked (its errno) or was not seen running by the deadline (ETIMEDOUT). All others have
        been told to run nevertheless, and :meth:`stamps` tells which were seen to.
        """
        result = lib.hu_guests_thaw(
            self._guests, len(self.handles), deadline_monotonic_ns, self._stamps
        )
        if result < 0:
            late = [
                self._name(index)
                for index, stamp in enumerate(self._stamps)
                if not stamp.settled_monotonic_ns
            ]
            check("hu_guests_thaw", result, "; ".join(late))
        return self.stamps()

    def _name(self, index: int) -> str:
        return f"guest {index}, {self.handles[index].label}"

    def stamps(self) -> list[Stamp]:
        """The stamps of the last call that filled them."""
        return [
            Stamp(
                requested_monotonic_ns=stamp.requested_monotonic_ns,
                settled_monotonic_ns=stamp.settled_monotonic_ns or None,
            )
            for stamp in self._stamps
        ]
