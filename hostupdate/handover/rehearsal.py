"""Would the new QEMU take this guest? Tried before anything is at stake.

The guest is stopped, its device state is taken (x-ignore-shared leaves its RAM out) and loaded by
a throw-away new QEMU that waits for it, over a private copy of the RAM, page by page where it
writes; then the guest runs on. It must not run before: a page that is not copied yet is the
guest's own, and a virtqueue's indices in RAM would be ahead of those in the state
(virtio_load: "VQ 0 size 0x100 < last_avail_idx 0x0 - used_idx 0x1").

x-ignore-shared is switched off again whatever happens: libvirt does not know of it, and the
owner's next save would have no RAM in it.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from hostupdate import faults
from hostupdate.errors import (
    DeadlineError,
    HypervisorError,
    ImageError,
    PrerequisiteError,
    RefusedError,
)
from hostupdate.handover import builds, image, inquiry, stream
from hostupdate.handover.harmless import harmless
from hostupdate.handover.inquiry import Command
from hostupdate.handover.throwaway import Throwaway

#: How long a guest may stay stopped; then it is let run without a rehearsal.
PAUSE_NS = 1_000_000_000
#: For the new QEMU, from its start to its end.
LOAD_NS = 120_000_000_000
_CANCEL_NS = 5_000_000_000
_POLL_S = 0.001
_FD_NAME = "hostupdate-rehearsal"
_TRIES = 3
#: More than any device state: RAM is being written.
_STATE_BYTES = 256 << 20


class Rehearsed(msgspec.Struct, frozen=True, kw_only=True):
    """``reason`` holds the new QEMU's own words where it does not take the guest, or why what was
    saved of it cannot be made loadable (``image``, ``stream``), else is empty.

    ``paused_ns`` (CLOCK_MONOTONIC) is at most that long: from before the guest was told to stop
    until after it was told to run. None: it was not paused.
    """

    ok: bool
    reason: str
    paused_ns: int | None
    new_version: str


def rehearse(
    command: Command,
    command_line: Sequence[str],
    program: Path,
    scratch: Path,
    *,
    mark: Callable[[bool], None],
    pause_ns: int = PAUSE_NS,
    load_ns: int = LOAD_NS,
) -> Rehearsed:
    """Rehearses a running guest, given its monitor and its QEMU's command line, under the QEMU
    ``program`` (a build's wrapper, or a binary). ``scratch`` is a directory of ours.

    ``mark(True)`` is called before the guest is stopped and ``mark(False)`` when it runs again
    and all is as it was: where the process dies in between, ``recover`` brings the guest back.
    A QEMU that cannot build this machine is found out before the guest is stopped.

    Raises RefusedError where the guest does not run, or has what cannot be made harmless;
    PrerequisiteError where ``program`` does not run; HypervisorError and DeadlineError where the
    guest's QEMU does not do as it is told: its remedy says so where it may still be stopped.
    """
    version = builds.version(program)
    backends = inquiry.backends(command)
    if not backends or any(b.kind != "file" or not b.shared for b in backends):
        raise RefusedError(
            ["its RAM is not in shared files"], remedy="hostupdate guests shows what to change"
        )
    read_only_ram = _opens_read_only(program)
    arguments = harmless(
        command_line,
        {backend.id: backend.path for backend in backends},
        inquiry.disks(command),
        read_only_ram=read_only_ram,
    )
    try:
        with Throwaway(program, arguments, scratch, load_ns, writes=not read_only_ram) as throwaway:
            tried = _with_guest_stopped(command, throwaway.load, pause_ns, mark)
    except _GuestProblem as problem:
        raise problem.error from problem
    except (HypervisorError, DeadlineError) as error:
        return Rehearsed(ok=False, reason=str(error), paused_ns=None, new_version=version)
    reason = tried.reason or _our_objection(tried.state)
    return Rehearsed(ok=not reason, reason=reason, paused_ns=tried.paused_ns, new_version=version)


def recover(command: Command) -> None:
    """The guest of a rehearsal that died runs again, with x-ignore-shared off. Safe to repeat.

    Raises HypervisorError or DeadlineError where its QEMU does not answer.
    """
    _settle(command)
    with suppress(HypervisorError):
        command("closefd", {"fdname": _FD_NAME})
    _let_run(command)
    _ignore_shared(command, False)


class _GuestProblem(Exception):
    """The guest's own QEMU did not do as it was told; that is not the new one's fault."""

    def __init__(self, error: HypervisorError | DeadlineError | RefusedError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True, slots=True)
class _Tried:
    """How long the guest was stopped, what was saved of it, and why that was not loaded; empty: it
    was."""

    paused_ns: int
    state: bytes
    reason: str


def _our_objection(state: bytes) -> str:
    """What would come up once the guest is parked."""
    if len(state) > image.SIZE_MAX_BYTES:
        return f"its state has {len(state)} bytes, at most {image.SIZE_MAX_BYTES} are handed over"
    try:
        stream.strip(state, "its state")
    except ImageError as error:
        return str(error)
    return ""


#: Loads a state until an instant of CLOCK_MONOTONIC, ns.
_Load = Callable[[bytes, int], None]


def _with_guest_stopped(
    command: Command, load: _Load, pause_ns: int, mark: Callable[[bool], None]
) -> _Tried:
    try:
        if not command("query-status", {})["running"]:
            raise RefusedError(["it does not run"], remedy="resume it, or shut it down")
        mark(True)
        try:
            _ignore_shared(command, True)
            return _stop_and_load(command, load, pause_ns)
        finally:
            recover(command)
            mark(False)
    except (HypervisorError, DeadlineError, RefusedError) as error:
        raise _GuestProblem(error) from error


def _stop_and_load(command: Command, load: _Load, pause_ns: int) -> _Tried:
    read, write = os.pipe()
    try:
        command("getfd", {"fdname": _FD_NAME}, fd=write)
    except BaseException:
        os.close(read)
        raise
    finally:
        os.close(write)
    reader = _Reader(read)
    reason = ""
    before_ns = time.monotonic_ns()
    try:
        command("stop", {})
        faults.point("rehearse.stopped")
        command("migrate", {"uri": f"fd:{_FD_NAME}"})
        _wait(command, before_ns + pause_ns, pause_ns)
        state = reader.result()
        try:
            load(state, before_ns + pause_ns)
        except (HypervisorError, DeadlineError) as error:
            reason = str(error)
        command("cont", {})
        return _Tried(time.monotonic_ns() - before_ns, state, reason)
    except (HypervisorError, DeadlineError):
        reader.stop()
        _settle(command)
        _let_run(command)
        raise


def _wait(command: Command, deadline_ns: int, timeout_ns: int) -> None:
    while (said := command("query-migrate", {})).get("status") != "completed":
        if said.get("status") in ("failed", "cancelled"):
            raise HypervisorError(f"its state was not saved: {said.get('error-desc', 'no reason')}")
        if time.monotonic_ns() >= deadline_ns:
            raise DeadlineError("saving a guest's device state", timeout_ns)
        time.sleep(_POLL_S)


def _settle(command: Command) -> None:
    """No save is under way afterwards: vCPUs that run meanwhile would tear the state."""
    over = {None, "none", "failed", "cancelled", "completed"}
    deadline_ns = time.monotonic_ns() + _CANCEL_NS
    told = False
    while command("query-migrate", {}).get("status") not in over:
        if not told:
            command("migrate_cancel", {})
            told = True
        if time.monotonic_ns() >= deadline_ns:
            raise DeadlineError("cancelling a save", _CANCEL_NS, remedy=_STOPPED)
        time.sleep(_POLL_S)


def _let_run(command: Command) -> None:
    for attempt in range(_TRIES):
        try:
            if not command("query-status", {})["running"]:
                command("cont", {})
            return
        except (HypervisorError, DeadlineError) as error:
            if attempt == _TRIES - 1:
                error.remedy = _STOPPED
                raise


def _ignore_shared(command: Command, on: bool) -> None:
    capability = {"capability": "x-ignore-shared", "state": on}
    command("migrate-set-capabilities", {"capabilities": [capability]})


def _opens_read_only(program: Path) -> bool:
    try:
        said = subprocess.run(
            [program, "-object", "memory-backend-file,help"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=builds.LOOK_NS / 1e9,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DeadlineError(f"{program} -object", builds.LOOK_NS) from error
    except OSError as error:
        raise PrerequisiteError(
            f"{program} does not run: {error.strerror}", remedy="name a QEMU system emulator"
        ) from error
    return b"rom=" in said.stdout


class _Reader:
    """Empties a pipe on a thread of its own: QEMU holds its lock while it writes, and answers no
    monitor then. Owns the descriptor."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._data = bytearray()
        self._thread = threading.Thread(target=self._read, name="rehearsal", daemon=True)
        self._thread.start()

    def result(self) -> bytes:
        """All of it; QEMU has closed its end when the save is complete."""
        self._thread.join(_CANCEL_NS / 1e9)
        if self._thread.is_alive() or len(self._data) > _STATE_BYTES:
            raise HypervisorError("its state did not end: RAM was in it")
        return bytes(self._data)

    def stop(self) -> None:
        """Whatever comes is thrown away, until the other end is closed."""
        self._data = bytearray()

    def _read(self) -> None:
        with os.fdopen(self._fd, "rb", buffering=0) as file:
            while block := file.read(1 << 20):
                self._data += block
                if len(self._data) > _STATE_BYTES:
                    return  # QEMU gets EPIPE: the save fails


_STOPPED = "it may be stopped: virsh resume, or hostupdate resume"
