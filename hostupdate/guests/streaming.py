"""A save that QEMU is told to make past libvirt, command by command, and how each is taken back.

The commands are given to a domain of libvirt, on a thread that may be given up in any of them
(:mod:`hostupdate.guests.workers`).
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any

import libvirt
import libvirt_qemu

from hostupdate.errors import HypervisorError

_FD_NAME = {"fdname": "hostupdate"}
_OVER = {None, "none", "failed", "cancelled", "completed"}
_CANCEL_NS = 5_000_000_000
_POLL_S = 0.002


class Lent:
    """A copy of a descriptor, there for as long as a thread uses it. Once ended it is not lent any
    more: HypervisorError."""

    def __init__(self, fd: int) -> None:
        self._fd = os.dup(fd)
        self._lock = threading.Lock()
        self._used = False
        self._ended = False

    def __enter__(self) -> int:
        with self._lock:
            if self._ended:
                raise HypervisorError("nobody waits for the save any more")
            self._used = True
            return self._fd

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        with self._lock:
            self._used = False
            if self._ended:
                os.close(self._fd)

    def end(self) -> None:
        """Once."""
        with self._lock:
            self._ended = True
            if not self._used:
                os.close(self._fd)


def command(
    domain: Any, name: str, arguments: Mapping[str, Any] | None = None, fd: int | None = None
) -> Any:
    """What QEMU returns. HypervisorError where it returns an error; libvirt's own."""
    text = json.dumps({"execute": name, "arguments": arguments or {}}, separators=(",", ":"))
    if fd is None:
        reply = libvirt_qemu.qemuMonitorCommand(domain, text, 0)
    else:
        reply = libvirt_qemu.qemuMonitorCommandWithFiles(domain, text, [fd], 0)[0]
    answer = json.loads(reply)
    if "return" not in answer:
        problem = answer.get("error", {}).get("desc", "an answer that says nothing")
        raise HypervisorError(f"QEMU: {name}: {problem}")
    return answer["return"]


def ignore_shared(domain: Any, on: bool) -> Any:
    """A save leaves out RAM that lies in files, or does not."""
    capability = {"capability": "x-ignore-shared", "state": on}
    command(domain, "migrate-set-capabilities", {"capabilities": [capability]})
    return domain


def heed_shared(domain: Any) -> None:
    """The undo of it. Never raises."""
    with suppress(libvirt.libvirtError, HypervisorError):
        ignore_shared(domain, False)


def give(domain: Any, lent: Lent) -> Any:
    """QEMU has the descriptor. As with the others, ``domain`` is returned for its undo."""
    with lent as fd:
        command(domain, "getfd", _FD_NAME, fd)
    return domain


def take_back(domain: Any) -> None:
    """The undo of it. Never raises."""
    with suppress(libvirt.libvirtError, HypervisorError):
        command(domain, "closefd", _FD_NAME)


def stop(domain: Any) -> Any:
    """For a guest that runs."""
    command(domain, "stop")
    return domain


def go_on(domain: Any) -> None:
    """The undo of it, whatever libvirt believes by now. Never raises."""
    with suppress(libvirt.libvirtError):
        domain.resume()
    with suppress(libvirt.libvirtError, HypervisorError):
        if not command(domain, "query-status")["running"]:
            command(domain, "cont")


def start(domain: Any) -> Any:
    """QEMU writes to the descriptor."""
    command(domain, "migrate", {"uri": f"fd:{_FD_NAME['fdname']}"})
    return domain


def end(domain: Any) -> None:
    """Nothing is being saved, and QEMU has no descriptor of ours. No error where that is so; of a
    guest that goes on, nothing is written after this."""
    take_back(domain)
    command(domain, "migrate_cancel")
    deadline_ns = time.monotonic_ns() + _CANCEL_NS
    while command(domain, "query-migrate").get("status") not in _OVER:
        if time.monotonic_ns() >= deadline_ns:
            raise HypervisorError("QEMU: migrate_cancel: it still saves")
        time.sleep(_POLL_S)
