"""Whether the storage below guests' disks answers."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from errno import EACCES, EPERM
from pathlib import Path

from hostupdate.durations import format_duration
from hostupdate.host import reader

_DELETED = " (deleted)"
#: The storage has answered, and says that root of this host may not read (NFS with root_squash).
_NOT_FOR_ROOT = {EACCES, EPERM}
_DEATH_S = 0.1


class Storage:
    """Reads from files in a child process: what hangs in the kernel hangs there.

    A child in an uninterruptible sleep outlives its SIGKILL. It is left alone then, and collected
    by a later call, or by init after our end.
    """

    def __init__(self) -> None:
        # Read now: an update may replace this very package.
        self._program = Path(reader.__file__).read_text(encoding="utf-8")
        self._left: list[subprocess.Popen[bytes]] = []

    def probe(
        self, files: Sequence[tuple[int, str]], timeout_ns: int
    ) -> dict[tuple[int, str], str]:
        """What is wrong with each file, given as (pid of the QEMU that uses it, path); empty where
        a block of it could be read, or where the storage says that it is not for us."""
        self._left = [child for child in self._left if child.poll() is None]
        wanted = list(dict.fromkeys(files))
        if not wanted:
            return {}
        held = {pid: _held(pid) for pid, _ in wanted}
        paths = [held[pid].get(path, f"/proc/{pid}/root{path}") for pid, path in wanted]
        try:
            told = self._read(paths, timeout_ns)
        except OSError as error:
            return dict.fromkeys(wanted, f"cannot be looked at: {error}")
        silent = f"no answer within {format_duration(timeout_ns)}"
        problems = (told.get(number, silent) for number in range(len(wanted)))
        return {
            (pid, path): f"{path}: {problem}" if problem else ""
            for (pid, path), problem in zip(wanted, problems, strict=True)
        }

    def _read(self, paths: Sequence[str], timeout_ns: int) -> dict[int, str]:
        deadline_ns = time.monotonic_ns() + timeout_ns
        argv = [sys.executable, "-I", "-S", "-c", self._program, str(timeout_ns / 1e9), *paths]
        child = subprocess.Popen(
            argv,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert child.stdout is not None
        try:
            output = _collect(child.stdout.fileno(), deadline_ns)
        finally:
            child.stdout.close()
            child.kill()
            try:
                child.wait(_DEATH_S)
            except subprocess.TimeoutExpired:
                self._left.append(child)
        told = {}
        for line in output.splitlines():
            number, errno = map(int, line.split())
            told[number] = "" if errno in {0, *_NOT_FOR_ROOT} else os.strerror(errno)
        return told


def _collect(fd: int, deadline_ns: int) -> bytes:
    """What comes out of a pipe until its end or the deadline."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    output = b""
    while True:
        left_ms = (deadline_ns - time.monotonic_ns()) // 1_000_000
        if left_ms <= 0 or not poll.poll(left_ms):
            return output
        chunk = os.read(fd, 65536)
        if not chunk:
            return output
        output += chunk


def _held(pid: int) -> dict[str, str]:
    """The path of each file that a process has open -> one that leads to just this file, though
    its name may be gone (an ISO image that was removed) or mean another file in our mount
    namespace. Reading these links touches no storage."""
    found: dict[str, str] = {}
    fds = f"/proc/{pid}/fd"
    with suppress(FileNotFoundError, PermissionError):
        for fd in os.listdir(fds):
            with suppress(FileNotFoundError):
                found[os.readlink(f"{fds}/{fd}").removesuffix(_DELETED)] = f"{fds}/{fd}"
    return found
