"""``python -m benchmarks.orchestrator RECORD CGROUP...``: pauses guests and waits to be killed.

Holds 100 MB, as a real one with libvirt and its libraries does.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

from hostupdate.core.freezer import GuestSet, open_cgroup
from hostupdate.core.keeper import Keeper

if __name__ == "__main__":
    record, *cgroups = (Path(argument) for argument in sys.argv[1:])
    memory = bytearray(b"x") * 100_000_000
    guests = GuestSet([open_cgroup(cgroup) for cgroup in cgroups])
    keeper = Keeper.start(guests, record=record, recovery_log=record.with_suffix(".recovery"))
    keeper.arm(time.monotonic_ns() + 30_000_000_000)
    guests.freeze(time.monotonic_ns() + 5_000_000_000)
    print("paused", flush=True)
    signal.pause()
