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

#: Title -> rows of text columns, the headings first. Filled by the benchmarks.
TABLES: dict[str, list[tuple[str, ...]]] = {}


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
    for title, rows in TABLES.items():
        terminalreporter.section(title)
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        for row in rows:
            terminalreporter.write_line(
                " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            )
