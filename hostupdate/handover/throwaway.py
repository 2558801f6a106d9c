"""A QEMU that lives for one rehearsal: it loads a guest's state, is looked at, and is killed.

It dies with us (PR_SET_PDEATHSIG), has a network of its own with nothing in it, low priority while
the guest runs, no path of the guest but its RAM file and what it boots from, and is spoken to
through a descriptor. What it loads a guest may have made up: of root it has the files (so that it
can open /dev/kvm), but no capability beyond those that opening its own takes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from qemu.qmp import ExecuteError, QMPClient, QMPError

from hostupdate.errors import DeadlineError, HypervisorError, PrerequisiteError

T = TypeVar("T")

_AROUND = ("setpriv", "--pdeathsig", "KILL", "unshare", "--net", "nice", "-n", "19")
_BOUND = ("setpriv", "--no-new-privs", "--inh-caps", "-all", "--ambient-caps", "-all")
_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
_POLL_S = 0.002
_LAST_WORDS_S = 0.5
#: ``2026-01-01T00:00:00.000000Z qemu-system-x86_64: -device x: ``: who says it is known.
_PREFIX = re.compile(r"^(?:\d{4}-\d\d-\d\dT\S+ )?(?:\S*qemu\S*: )?")
_LINES = 4

# That the QEMU ends is an outcome here, and told as such.
logging.getLogger("qemu.qmp.protocol.rehearsal").disabled = True


class Throwaway:
    """A context: on leaving it the QEMU is gone and its directory removed, whatever happened.

    It is ready to load when entered. Raises HypervisorError with QEMU's own words where it fails
    or ends, and DeadlineError ``timeout_ns`` after the start. ``writes``: it opens files of others
    for writing, be it to change nothing.
    """

    def __init__(
        self,
        program: Path,
        arguments: Sequence[str],
        scratch: Path,
        timeout_ns: int,
        *,
        writes: bool,
    ) -> None:
        self._program = program
        self._arguments = arguments
        self._bound = (*_BOUND, "--bounding-set", _capabilities(arguments, writes))
        self._timeout_ns = timeout_ns
        self._deadline_ns = time.monotonic_ns() + timeout_ns
        self._directory = Path(tempfile.mkdtemp(prefix="rehearsal-", dir=scratch))  # 0700
        self._runner = asyncio.Runner()
        self._client = QMPClient("rehearsal")
        self._process: subprocess.Popen[bytes] | None = None
        self._state_read, self._state_write = os.pipe()

    def __enter__(self) -> Throwaway:
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def load(self, state: bytes, deadline_ns: int) -> None:
        """Loads a guest's state that was taken with x-ignore-shared, until an instant of
        CLOCK_MONOTONIC. The vCPUs do not run."""
        self._timeout_ns = max(0, deadline_ns - time.monotonic_ns())
        self._deadline_ns = deadline_ns
        if self._process is not None:
            with suppress(OSError):  # a guest stands still for it
                os.setpriority(os.PRIO_PROCESS, self._process.pid, 0)
        self._execute("migrate-incoming", uri=f"fd:{self._state_read}")
        threading.Thread(target=self._feed, args=(state,), daemon=True).start()
        while (status := self._execute("query-migrate").get("status")) != "completed":
            if status == "failed":
                raise HypervisorError(self._said() or "it cannot load the state")
            self._run(asyncio.sleep(_POLL_S))

    def _start(self) -> None:
        for name in ("setpriv", "unshare", "nice"):
            if shutil.which(name) is None:
                raise PrerequisiteError(f"no program {name}", remedy="apt-get install util-linux")
        ours, theirs = socket.socketpair()
        with ours, theirs, (self._directory / "stderr").open("wb") as stderr:
            monitor = f"socket,id=hostupdate,fd={theirs.fileno()}"
            self._process = subprocess.Popen(
                [
                    *(*_AROUND, *self._bound, str(self._program), *self._arguments),
                    *("-S", "-sandbox", _SANDBOX),
                    *("-incoming", "defer", "-name", "rehearsal", "-chardev", monitor),
                    *("-mon", "chardev=hostupdate,mode=control"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                cwd=self._directory,
                env={"PATH": os.defpath, "LC_ALL": "C", "TMPDIR": str(self._directory)},
                pass_fds=(theirs.fileno(), self._state_read),
                start_new_session=True,
            )
            theirs.close()  # or its end would not be seen
            self._run(self._client.connect(ours.dup()))
        capability = {"capability": "x-ignore-shared", "state": True}
        self._execute("migrate-set-capabilities", capabilities=[capability])

    def _execute(self, name: str, **arguments: Any) -> Any:
        return self._run(self._client.execute(name, arguments or None))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        left_s = (self._deadline_ns - time.monotonic_ns()) / 1e9

        async def bounded() -> T:
            async with asyncio.timeout(left_s):
                return await work

        try:
            return self._runner.run(bounded())
        except TimeoutError as error:
            raise DeadlineError("the rehearsal's QEMU", self._timeout_ns) from error
        except ExecuteError as error:
            raise HypervisorError(str(error)) from error
        except (QMPError, OSError, EOFError) as error:
            self._reap()
            raise HypervisorError(self._said() or self._fate() or str(error)) from error

    def _feed(self, state: bytes) -> None:
        """QEMU may end before it has read all."""
        with suppress(OSError), os.fdopen(os.dup(self._state_write), "wb", buffering=0) as file:
            os.close(self._state_write)
            self._state_write = -1
            left = memoryview(state)
            while left:
                left = left[file.write(left) or 0 :]

    def _reap(self) -> None:
        """It closes its monitor a moment before it is gone, and has said all."""
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_LAST_WORDS_S)

    def _fate(self) -> str:
        """SIGBUS: no huge page was left for a private copy of one."""
        code = self._process.poll() if self._process is not None else None
        return f"it died of {signal.Signals(-code).name}" if code is not None and code < 0 else ""

    def _said(self) -> str:
        """QEMU's complaints, without its name and warnings."""
        text = (self._directory / "stderr").read_text(encoding="utf-8", errors="replace")
        lines = [_PREFIX.sub("", line).strip() for line in text.splitlines()]
        return "; ".join([x for x in lines if x and "warning:" not in x][:_LINES])

    def _end(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
        with suppress(QMPError, OSError, EOFError):
            self._runner.run(self._client.disconnect())
        self._runner.close()
        for fd in (self._state_read, self._state_write):
            if fd >= 0:
                with suppress(OSError):
                    os.close(fd)
        shutil.rmtree(self._directory, ignore_errors=True)


def _capabilities(arguments: Sequence[str], writes: bool) -> str:
    """What it may do that others may not: open its files, and make a tap in its network."""
    given = ["-all", "+dac_read_search"]
    if writes:
        given.append("+dac_override")
    pairs = pairwise(arguments)
    if any(option == "-netdev" and re.match(r'tap,|.*"type":"tap"', v) for option, v in pairs):
        given.append("+net_admin")
    return ",".join(given)
