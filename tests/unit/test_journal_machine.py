"""A process that dies at any record: what was written before is there, and nothing else is.

The disk at the moment of a death is a copy of the files as the kernel has them. Power that fails
takes of the log what was not flushed: any tail of it behind the last flush.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hostupdate.journal import Journal
from hostupdate.model import Action, PendingRecord, Phase, Plan
from hostupdate.unwinding import Kind, remaining
from tests.unit.test_journal import plan, record, report

PLAN: Plan = plan(
    *(
        Action(phase=phase, kind="step", title=name, step=name, undo_argv=(f"undo-{name}",))
        for name, phase in (
            ("a", Phase.STAGE), ("b", Phase.BLACKOUT), ("c", Phase.BLACKOUT), ("d", Phase.FINISH),
        )
    )
)  # fmt: skip


def log_end(path: Path) -> int:
    """Where the log's frames end: the file is longer (sqlite.org/fileformat2.html, 4.1 and 4.2)."""
    data = path.read_bytes() if path.exists() else b""
    if not data:
        return 0
    frame = 24 + int.from_bytes(data[8:12], "big")
    end = 32
    while data[end + 8 : end + 16] == data[16:24]:
        end += frame
    return end


class Disk(RuleBasedStateMachine):
    """One run after the other on one state directory; ``written`` is what must be there."""

    def __init__(self) -> None:
        super().__init__()
        self.base = Path(tempfile.mkdtemp())
        self.copies = 0
        self.number = 0
        self.state = self.base / "state"
        self.journal = Journal(self.state, self.base / "run")
        self.journal.check()
        self.run = None
        self.pending: PendingRecord | None = None
        self.written: list[tuple[Kind, int | None]] = []
        self.flushed = 0  #: so many of them survive a power failure
        self.flushed_bytes = 0
        self.flushing = True
        self.reported: set[str] = set()

    def teardown(self) -> None:
        if self.run is not None:
            self.run.close()
        shutil.rmtree(self.base)

    @initialize()
    def first(self) -> None:
        self.begin()

    @precondition(lambda self: self.run is None and self.pending is None)
    @rule()
    def begin(self) -> None:
        self.number += 1
        self.pending = record(f"r{self.number}")
        self.run = self.journal.begin(PLAN, self.pending)
        self.written = []
        self.flushing = True
        self._flush()

    @precondition(lambda self: self.run is not None)
    @rule(
        kind=st.sampled_from([k for k in Kind if k is not Kind.BLACKOUT]),
        action=st.none() | st.integers(0, 3),
    )
    def note(self, kind: Kind, action: int | None) -> None:
        self.run.note(kind, action)
        self.written.append((kind, action))
        if self.flushing:
            self._flush()

    @precondition(lambda self: self.run is not None)
    @rule(on=st.booleans())
    def blackout(self, on: bool) -> None:
        if on and self.flushing:
            self.run.blackout(on=True)
            self.written.append((Kind.BLACKOUT, None))
            self._flush()
        elif not on:
            self.run.blackout(on=False)
        self.flushing = not on

    @precondition(lambda self: self.run is not None)
    @rule(guests=st.booleans())
    def pend(self, guests: bool) -> None:
        kept = record(self.pending.run_id).guests if guests else ()
        self.pending = msgspec.structs.replace(self.pending, guests=kept)
        self.run.pend(self.pending)

    @precondition(lambda self: self.run is not None)
    @rule()
    def end(self) -> None:
        self.run.blackout(on=False)
        self.run.save_report(report(self.pending.run_id))
        self.reported.add(self.pending.run_id)
        self.run.end()
        self.run.close()
        self.run = self.pending = None

    @precondition(lambda self: self.pending is not None)
    @rule()
    def killed(self) -> None:
        """The orchestrator dies, and recovery opens what it left."""
        copy = self._copy()
        if self.run is not None:
            self.run.close()
        shutil.rmtree(self.state)
        copy.rename(self.state)
        found = self.journal.pending()
        assert found == self.pending
        self.run = self.journal.reopen(found)
        self.flushing = True
        self._flush()

    @precondition(lambda self: self.run is not None and self.flushed_bytes)
    @rule(part=st.floats(0, 1))
    def power_fails(self, part: float) -> None:
        """On a copy: the run goes on."""
        copy = self._copy()
        log = copy / "journal.db-wal"
        keep = self.flushed_bytes + int((log_end(log) - self.flushed_bytes) * part)
        with open(log, "r+b") as file:
            file.truncate(keep)
        after = Journal(copy, self.base / "run")
        found = after.pending()
        assert found == self.pending
        run = after.reopen(found)
        records = [(r.kind, r.action) for r in run.records()]
        assert records == self.written[: len(records)]
        assert len(records) >= self.flushed
        remaining(PLAN, run.records(), same_boot=False)
        run.close()
        shutil.rmtree(copy)

    @invariant()
    def what_was_written_is_there(self) -> None:
        if self.run is not None:
            assert [(r.kind, r.action) for r in self.run.records()] == self.written
            assert self.run.plan() == PLAN
        assert set(self.journal.runs()) == self.reported
        assert self.journal.pending() == self.pending

    def _flush(self) -> None:
        self.flushed = len(self.written)
        self.flushed_bytes = log_end(self.state / "journal.db-wal")

    def _copy(self) -> Path:
        self.copies += 1
        return Path(shutil.copytree(self.state, self.base / f"copy{self.copies}"))


Disk.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestDisk = Disk.TestCase
