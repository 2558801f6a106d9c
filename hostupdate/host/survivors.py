"""Steps that outlived their run: half of a package installation would be worse than all of it."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from hostupdate.host import processes
from hostupdate.host.steps import (
    BEGAN,
    RUN,
    STEP,
    TERM_GRACE_NS,
    Began,
    open_appended,
    write_began,
)


class Survivors:
    """The processes of one interrupted run, and running what is left of it. ``directory`` is the
    run's."""

    def __init__(self, run_id: str, directory: Path) -> None:
        self._run_id = run_id
        self._steps = directory / "steps"
        self._log = directory / "undo.log"

    def find(self, step: str, argv: Sequence[str]) -> int | None:
        """The process that runs a command of a step, or None.

        Known by the run and step in its environment, and by what was written down when it began,
        or by its command: a daemon that the step started has the same environment, and is not to
        be touched.
        """
        if not argv:
            return None
        for began in self._began():
            known = began.step == step and began.argv == tuple(argv)
            if known and processes.is_same(began.pid, began.started):
                return began.pid
        wanted = {f"{RUN}={self._run_id}".encode(), f"{STEP}={step}".encode()}
        for entry in os.listdir("/proc"):
            if not entry.isdigit():
                continue
            with suppress(OSError):
                words = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")[:-1]
                if not _runs(words, [os.fsencode(word) for word in argv]):
                    continue
                variables = Path(f"/proc/{entry}/environ").read_bytes().split(b"\0")
                if wanted <= set(variables) and os.getsid(int(entry)) == int(entry):
                    return int(entry)
        return None

    def _began(self) -> list[Began]:
        """What was written down; lines that a full disk cut short are left out."""
        found = []
        with suppress(OSError):
            for path in self._steps.glob(f"*{BEGAN}"):
                for line in path.read_bytes().splitlines():
                    with suppress(msgspec.DecodeError):
                        found.append(msgspec.json.decode(line, type=Began))
        return found

    def end(self, pid: int, deadline_ns: int) -> bool:
        """Waits for it until ``deadline_ns`` (monotonic), then ends its group; whether it ended
        by itself."""
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return True
        try:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)

            def ended_by(until_ns: int) -> bool:
                return bool(poll.poll(max(0, until_ns - time.monotonic_ns()) / 1e6))

            if ended_by(deadline_ns):
                return True
            for number in (signal.SIGTERM, signal.SIGKILL):
                with suppress(ProcessLookupError):
                    os.killpg(pid, number)
                if ended_by(time.monotonic_ns() + TERM_GRACE_NS):
                    break
            return False
        finally:
            os.close(pidfd)

    def run(self, step: str, argv: Sequence[str], timeout_ns: int) -> str:
        """Runs a command of a step, its output appended to the log; what went wrong, or nothing."""
        program = shutil.which(argv[0])
        if program is None:
            return f"program {argv[0]!r} is not installed"
        environment = {"DEBIAN_FRONTEND": "noninteractive", **os.environ}
        try:
            with open(self._log, "ab") as log:
                process = subprocess.Popen(
                    argv,
                    executable=program,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment | {RUN: self._run_id, STEP: step},
                    start_new_session=True,
                )
        except OSError as error:
            return f"cannot be run: {error.filename or program}: {error.strerror}"
        with suppress(OSError):
            fd = open_appended(self._steps / f"undo{BEGAN}")
            write_began(fd, process.pid, step, argv)
            os.close(fd)
        try:
            status = process.wait(timeout_ns / 1e9)
        except subprocess.TimeoutExpired:
            self.end(process.pid, 0)
            process.poll()
            return "did not end in time"
        if status == 0:
            return ""
        return f"ended with status {status}" if status > 0 else f"was ended by signal {-status}"


def _runs(words: Sequence[bytes], argv: Sequence[bytes]) -> bool:
    """Whether a command line is ``argv``, directly or through the interpreter of a script."""
    if len(words) < len(argv):
        return False
    tail = words[len(words) - len(argv) :]
    same = os.path.basename(tail[0]) == os.path.basename(argv[0])
    return same and list(tail[1:]) == list(argv[1:])
