"""A save that QEMU makes at our word: whatever hangs in it, the guest runs after we gave up."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, cast

import libvirt_qemu
import pytest

from hostupdate.errors import DeadlineError, HypervisorError
from hostupdate.guests import Hypervisor, streaming
from hostupdate.guests.parking import Parking
from hostupdate.guests.workers import call_within

SHORT_NS = 100_000_000


class Qemu:
    """A guest as its monitor and libvirt show it. ``hangs`` names a command that waits for
    ``gate``."""

    def __init__(self) -> None:
        self.running = True
        self.migration = "none"
        self.fd: int | None = None
        self.log: list[str] = []
        self.hangs = ""
        self.fails = ""
        self.gate = threading.Event()
        self.done = threading.Event()

    def monitor(self, _domain: Any, text: str, _flags: int, fd: int | None = None) -> str:
        name = json.loads(text)["execute"]
        if name == self.hangs:
            self.hangs = ""
            self.gate.wait(20)
        self.log.append(name)
        if name == self.fails:
            return '{"error":{"desc":"no"}}'
        match name:
            case "getfd":
                assert fd is not None
                self.fd = os.dup(fd)
            case "closefd":
                self.close()
            case "stop":
                self.running = False
            case "cont":
                self.running = True
                self.done.set()
            case "migrate":
                self.migration, self.running = "active", False
            case "migrate_cancel":
                self.migration = "cancelled"
            case "query-status":
                status = "running" if self.running else "paused"
                return json.dumps({"return": {"running": self.running, "status": status}})
            case "query-migrate":
                return json.dumps({"return": {"status": self.migration}})
        return '{"return":{}}'

    def with_files(
        self, domain: Any, text: str, fds: list[int], flags: int
    ) -> tuple[str, list[int]]:
        return self.monitor(domain, text, flags, fds[0]), []

    def close(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
        self.fd = None
        self.done.set()

    # libvirt's
    def lookupByUUIDString(self, _uuid: str) -> Qemu:
        return self

    def resume(self) -> None:
        """libvirt has not noticed that it is stopped."""

    def abortJob(self) -> None:
        raise HypervisorError("no job is active")


class FakeHypervisor:
    def __init__(self, qemu: Qemu) -> None:
        self._qemu = qemu

    def revive(self) -> None:
        pass

    def call(
        self,
        what: str,
        run: Callable[[Any], Any],
        timeout_ns: int | None = None,
        on_late: Callable[[Any], None] | None = None,
    ) -> Any:
        return call_within(what, SHORT_NS, lambda: run(self._qemu), on_late)


@pytest.fixture
def qemu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Qemu]:
    made = Qemu()
    monkeypatch.setattr(libvirt_qemu, "qemuMonitorCommand", made.monitor)
    monkeypatch.setattr(libvirt_qemu, "qemuMonitorCommandWithFiles", made.with_files)
    monkeypatch.setattr(libvirt_qemu, "qemuMonitorEventRegister", lambda *_: 0)
    yield made
    made.gate.set()
    made.close()


@pytest.fixture
def parking(qemu: Qemu) -> Parking:
    return Parking(cast(Hypervisor, FakeHypervisor(qemu)), life_ns=SHORT_NS)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    made = os.pipe()
    yield made
    for fd in made:
        with suppress(OSError):
            os.close(fd)


def wait(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_guest_is_stopped_and_written(
    qemu: Qemu, parking: Parking, pipe: tuple[int, int]
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    parking.stream("u", pipe[1])
    assert qemu.log == ["getfd", "query-status", "stop", "migrate"]
    assert len(os.listdir("/proc/self/fd")) == before + 1  # QEMU's own


@pytest.mark.parametrize("late", ["getfd", "query-status", "stop", "migrate"])
def test_what_comes_too_late_is_taken_back(
    qemu: Qemu, parking: Parking, pipe: tuple[int, int], late: str
) -> None:
    """The caller has ended what it could by then, and has let the guest run."""
    before = len(os.listdir("/proc/self/fd"))
    qemu.hangs = late
    with pytest.raises(DeadlineError):
        parking.stream("u", pipe[1])
    os.close(pipe[1])
    reused = os.open("/dev/null", os.O_RDONLY)  # has its number
    assert reused == pipe[1]
    parking.cancel("u")
    if late == "migrate":
        qemu.running = True
    said = len(qemu.log)
    qemu.gate.set()
    wait(lambda: len(qemu.log) > said)
    if late == "query-status":
        assert "stop" not in qemu.log
    else:
        wait(lambda: qemu.done.is_set() and qemu.fd is None)
    wait(lambda: qemu.running and qemu.migration in ("none", "cancelled"))
    assert late == "migrate" or "migrate" not in qemu.log
    assert qemu.fd is None
    assert os.fstat(reused)
    wait(lambda: len(os.listdir("/proc/self/fd")) == before)


def test_a_guest_that_its_owner_has_paused_is_not_stopped(
    qemu: Qemu, parking: Parking, pipe: tuple[int, int]
) -> None:
    qemu.running = False
    qemu.hangs = "migrate"
    with pytest.raises(DeadlineError):
        parking.stream("u", pipe[1])
    parking.cancel("u")
    qemu.gate.set()
    wait(lambda: qemu.log.count("migrate_cancel") == 2 and qemu.migration == "cancelled")
    assert "stop" not in qemu.log and "cont" not in qemu.log and not qemu.running


def test_a_command_that_is_refused_ends_it(
    qemu: Qemu, parking: Parking, pipe: tuple[int, int]
) -> None:
    qemu.fails = "stop"
    with pytest.raises(HypervisorError, match="stop: no"):
        parking.stream("u", pipe[1])
    assert "migrate" not in qemu.log
    parking.cancel("u")
    assert qemu.fd is None


@pytest.mark.parametrize("hangs", ["closefd", "migrate_cancel", "query-migrate"])
def test_to_end_a_save_never_fails(qemu: Qemu, parking: Parking, hangs: str) -> None:
    qemu.hangs = hangs
    parking.cancel("u")
    qemu.gate.set()


def test_a_descriptor_is_not_lent_after_its_end() -> None:
    read, write = os.pipe()
    lent = streaming.Lent(write)
    with lent as fd:
        lent.end()
        os.write(fd, b"x")  # still there
    os.close(write)
    assert os.read(read, 10) == b"x" and os.read(read, 10) == b""
    os.close(read)
    with pytest.raises(HypervisorError), lent:
        pass
