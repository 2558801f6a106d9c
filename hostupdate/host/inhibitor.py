"""A logind inhibitor: while it is held, nobody shuts the host down or suspends it by accident.

It stops whoever asks logind: a desktop, a power key, ``systemctl reboot`` in a terminal. Root may
override it, and older systemd lets root's scripts through (systemctl(1), --check-inhibitors). A
shutdown that was scheduled before goes ahead in spite of it (logind's scheduled shutdown handler).
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from contextlib import suppress

_SAYS = b"held\n"
#: Begins once the inhibitor is held, and ends with us: nobody else has the other end of its input.
_COMMAND = ("sh", "-c", "echo held; exec cat >/dev/null")
_END_NS = 2_000_000_000


class Inhibitor:
    """A ``systemd-inhibit`` of our own. ``problem`` says why it holds nothing; empty: it does."""

    def __init__(self, program: str, why: str, timeout_ns: int) -> None:
        options = ("--what=shutdown:sleep", "--mode=block", "--who=hostupdate", f"--why={why}")
        self.problem = ""
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._process = subprocess.Popen(
                (program, *options, *_COMMAND),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # an operator's Ctrl-C is for us
            )
        except OSError as error:
            self.problem = f"{program} cannot be run: {error.strerror}"
            return
        said, ended = _listen(self._process, timeout_ns)
        if not said.endswith(_SAYS):
            text = said.decode(errors="replace").strip().partition("\n")[0]
            self.problem = text or ("it ended" if ended else "no answer in time")
            self.close()

    def close(self) -> None:
        """Lets go of it. Safe to repeat."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        with suppress(OSError):
            process.stdin.close()
        if self.problem or not _ended(process, _END_NS):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            _ended(process, _END_NS)


def _listen(process: subprocess.Popen[bytes], timeout_ns: int) -> tuple[bytes, bool]:
    """What it said until it held, and whether it closed its output instead."""
    assert process.stdout is not None
    said, deadline_ns = b"", time.monotonic_ns() + timeout_ns
    poll = select.poll()
    with process.stdout as told:
        poll.register(told, select.POLLIN)
        while not said.endswith(_SAYS):
            if not poll.poll(max(0, deadline_ns - time.monotonic_ns()) / 1e6):
                return said, False
            more = os.read(told.fileno(), 4096)
            if not more:
                return said, True
            said += more
    return said, False


def _ended(process: subprocess.Popen[bytes], timeout_ns: int) -> bool:
    """Waits for the process, and reaps it."""
    try:
        process.wait(timeout_ns / 1e9)
    except subprocess.TimeoutExpired:
        return False
    return True
