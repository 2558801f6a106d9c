"""Way B: QEMU is made to save by us, and ended by us; libvirt's restore brings the guest up.

Saves some 200 ms of the blackout: libvirt waits that long for any QEMU that it ends itself
(virProcessKillPainfullyDelay). It learns of the end from its monitor connection, and would wait all
the same if QEMU were not quite gone then: so the connection is kept open, by descriptors that are
taken from QEMU, until it is. libvirt says of the guest that it has crashed.

What libvirt checks before a save of its own, nobody checks here but QEMU: a caller lets only guests
come this way of which it knows that nothing forbids it. Nor does libvirt keep others from changing
or resuming the guest meanwhile: that is looked for before its QEMU is ended.
"""

from __future__ import annotations

import ctypes
import os
import re
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar

from hostupdate.errors import DeadlineError, GuestError
from hostupdate.handover import image, parked_image, ram_store, records
from hostupdate.handover.saving import Saving
from hostupdate.parked import ParkedRecord

_STREAM_NS = 10_000_000_000
_DEATH_NS = 10_000_000_000
_POLL_S = 0.002
_CHANNEL_STATE = re.compile(r" state='(?:dis)?connected'")
_PIDFD_GETFD = 438  # the same on every architecture (pidfd_getfd(2))


class OwnSaving(Saving):
    """As :class:`Saving`, but for how a guest is taken down."""

    name: ClassVar[str] = "own-save"

    def _save(self, record: ParkedRecord) -> bytes:
        """GuestError: nothing has been ended; whether the guest runs, libvirt tells."""
        try:
            wrote = self._save_and_end(record)
        except OSError as error:
            raise GuestError(record.name, f"its QEMU cannot be ended: {error}") from error
        self.settle(record)
        return wrote

    def _save_and_end(self, record: ParkedRecord) -> bytes:
        xml, cookie = self._host.domains.description(record.uuid)
        pid = self._host.find_pid(record.uuid)
        if pid is None or not ram_store.is_mapped(record, pid):
            raise GuestError(record.name, "its QEMU process was not found")
        pidfd = os.pidfd_open(pid)
        try:
            if self._host.find_pid(record.uuid) != pid:
                raise GuestError(record.name, "its QEMU process was not found")
            stream = self._stream(record)
            head = image.head(xml, cookie, running=record.was_running, stored=image.RAW)
            spare = self._host.records.spare(record.uuid)
            records.store(Path(record.guard), head + stream, spare=spare)
            parked_image.checked(record, Path(record.guard))
            now, cookie_now = self._host.domains.description(record.uuid)
            if (_lasting(now), cookie_now) != (_lasting(xml), cookie):
                raise GuestError(record.name, "its definition changed while it was saved")
            with _held_sockets(pid, pidfd):
                self._require_saved(record)
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                _wait_gone(record, pid, pidfd)
            return head + stream
        finally:
            os.close(pidfd)

    def _require_saved(self, record: ParkedRecord) -> None:
        """GuestError: it has been resumed since; until now it was not kept from that.
        DeadlineError."""
        deadline_ns = time.monotonic_ns() + _STREAM_NS
        # QEMU says that a save is complete a moment before the guest's state does.
        while (status := self._host.domains.status(record.uuid)) == "finish-migrate":
            if time.monotonic_ns() >= deadline_ns:
                raise DeadlineError(f"the end of the save of guest {record.name}", _STREAM_NS)
            time.sleep(_POLL_S)
        if status != "postmigrate":
            raise GuestError(record.name, f"it is {status} again: somebody has resumed it")

    def _stream(self, record: ParkedRecord) -> bytes:
        """The guest's state; the guest is stopped then."""
        domains = self._host.domains
        read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
        reader = _Reader(read_fd)
        try:
            domains.stream(record.uuid, write_fd)
        finally:
            os.close(write_fd)  # else there is no end
        stream = reader.result(_STREAM_NS)
        deadline_ns = time.monotonic_ns() + _STREAM_NS
        while (state := domains.stream_state(record.uuid)) != "completed":
            if state in ("failed", "cancelled", "none") or time.monotonic_ns() >= deadline_ns:
                raise GuestError(record.name, f"QEMU has not saved it: {state}")
            time.sleep(_POLL_S)
        if stream is None:
            raise GuestError(record.name, "what QEMU saved of it is not its devices' state only")
        return stream


def _lasting(xml: str) -> str:
    """Without whether somebody in the guest listens at a channel: an agent comes and goes."""
    return _CHANNEL_STATE.sub("", xml)


class _Reader:
    """Reads a pipe to its end, on a thread of its own; what it holds back, QEMU holds its lock
    for. Closes it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._data = bytearray()
        self._whole = False
        self._thread = threading.Thread(target=self._read, name="stream", daemon=True)
        self._thread.start()

    def result(self, timeout_ns: int) -> bytes | None:
        """All of it; None where it has not ended, or is too long to be right."""
        self._thread.join(timeout_ns / 1e9)
        return bytes(self._data) if self._whole else None

    def _read(self) -> None:
        with open(self._fd, "rb", buffering=0) as pipe:
            while part := pipe.read(1 << 20):
                self._data += part
                if len(self._data) > image.SIZE_MAX_BYTES:
                    return
        self._whole = True


@contextmanager
def _held_sockets(pid: int, pidfd: int) -> Iterator[None]:
    """Whoever talks to the process does not see its end before this ends."""
    held = []
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                if os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:"):
                    held.append(_taken(pidfd, int(name)))
        yield
    finally:
        for fd in held:
            os.close(fd)


def _taken(pidfd: int, fd: int) -> int:
    """Another process's descriptor: pidfd_getfd(2), which Python has not."""
    taken = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, pidfd, fd, 0)
    if taken < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(taken)


def _wait_gone(record: ParkedRecord, pid: int, pidfd: int) -> None:
    """Until the process is dead and reaped by its parent. Its memory is given back by then where
    nothing holds its address space (``outlive``)."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    deadline_ns = time.monotonic_ns() + _DEATH_NS
    if not poll.poll(_DEATH_NS / 1e6):
        raise GuestError(record.name, "its QEMU does not die")
    while os.path.exists(f"/proc/{pid}") and time.monotonic_ns() < deadline_ns:
        time.sleep(_POLL_S)
