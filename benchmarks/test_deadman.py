"""How soon all guests run again after the orchestrator was killed in the blackout.

From just before SIGKILL to the moment the keeper saw the last guest running. The peer is nothing:
without a keeper, guests stay paused for ever.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import conftest
from benchmarks.contenders import Guests
from hostupdate.core.keeper import read_record
from hostupdate.durations import format_duration


def test_killed_orchestrator(benchmark: BenchmarkFixture, guests: Guests, tmp_path: Path) -> None:
    latest_ns: list[int] = []

    def pause_and_kill() -> None:
        record = tmp_path / f"{len(latest_ns)}.log"
        argv = [sys.executable, "-m", "benchmarks.orchestrator", str(record), *cgroups]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "paused\n"
            started = read_record(record)
            assert started is not None
            keeper = os.pidfd_open(started.pid)
            killed_ns = time.monotonic_ns()
            process.send_signal(signal.SIGKILL)
        poll = select.poll()
        poll.register(keeper, select.POLLIN)
        assert poll.poll(10_000), "the keeper did not end"
        os.close(keeper)
        told = read_record(record)
        assert told is not None
        latest_ns.append(max((thaw.monotonic_ns or 0) - killed_ns for thaw in told.thaws))

    with guests.isolated(conftest.MOST) as paused:
        cgroups = [str(guests.directory(handle.label)) for handle in paused.handles]
        benchmark.pedantic(pause_and_kill, rounds=conftest.rounds())
    benchmark.extra_info |= {"guests": conftest.MOST, "kill_to_running_ns": latest_ns}
    conftest.TABLES["orchestrator killed in a blackout: until all guests run again"] = [
        ("guests", "median", "worst", "of"),
        (
            str(conftest.MOST),
            format_duration(round(median(latest_ns))),
            format_duration(max(latest_ns)),
            str(len(latest_ns)),
        ),
    ]
