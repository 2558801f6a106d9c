"""``python -m tests.functional.handover BASE URI UUID WAY POINT``: a handover that dies somewhere.

The hands of a handover on the private libvirtd of :mod:`tests.functional.daemon`, put together as
the program's composer does.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostupdate.guests import Hypervisor
from hostupdate.guests.parking import Parking
from hostupdate.handover.hook import Hook
from hostupdate.handover.ports import Host
from hostupdate.handover.records import ParkedRecords
from hostupdate.handover.ways import WAYS
from hostupdate.host import processes

CALL_NS = 20_000_000_000


def host_of(base: Path, uri: str) -> Host:
    state = base / "state"
    hypervisor = Hypervisor(uri, timeout_ns=CALL_NS)
    return Host(
        domains=Parking(hypervisor, life_ns=CALL_NS),
        records=ParkedRecords(state),
        hook=Hook(base / "etc/hooks/qemu.d/hostupdate", state / "hook"),
        find_pid=pid_of,
        save_directory=base / "lib/qemu/save",
        run_id="20260102T030405Z-abcdef",
        boot_id=processes.boot_id(),
        uri=uri,
    )


def pid_of(uuid: str) -> int | None:
    found = processes.find_qemus([uuid]).get(uuid)
    return found.pid if found else None


def die_at(host: Host, point: str) -> None:
    """``before|after HAND METHOD N``: SIGKILL to this process around the N-th call."""
    when, hand, method, number = point.split()
    holder = getattr(host, hand)
    real: Callable[..., Any] = getattr(holder, method)
    calls = 0

    def fatal(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == int(number) and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*arguments, **options)
        if calls == int(number):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(holder, method, fatal)


def main(base: str, uri: str, uuid: str, kind: str, point: str) -> None:
    host = host_of(Path(base), uri)
    die_at(host, point)
    way = WAYS[kind](host)
    way.finish(way.commit(way.switch(way.prepare(uuid), None)))
    raise AssertionError(f"the point was not reached: {point}")


if __name__ == "__main__":
    main(*sys.argv[1:])
