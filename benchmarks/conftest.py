"""Eight real guests for the benchmarks, and a table of what was measured at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.contenders import Guests
from tests.functional.cli import Program
from tests.functional.conftest import state
from tests.requirements import need

__all__ = ("state",)

MOST = 8

#: Rows for the table: (operation, guests) -> text columns. Filled by the benchmarks.
RESULTS: list[tuple[str, ...]] = []


def rounds() -> int:
    """How often each thing is measured; fewer in a quick run."""
    return int(os.environ.get("HOSTUPDATE_BENCH_ROUNDS", "50"))


@pytest.fixture(scope="session")
def guests(state: Path) -> Iterator[Guests]:
    need("root", "qemu", "lab", "cgroup2")
    program = Program(state)
    ended = program("lab", "up", "--guests", str(MOST), "--memory", "192M")
    assert ended.code == 0, ended.err
    made = Guests(state)
    yield made
    made.remove()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not RESULTS:
        return
    terminalreporter.section("pausing all guests of a host, medians of the same run")
    head = (
        "what", "guests", "hostupdate", "spread", "virsh-like serial", "parallel",
        "serial/ours", "parallel/ours",
    )  # fmt: skip
    rows = [head, *RESULTS]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    for row in rows:
        terminalreporter.write_line(
            " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        )
