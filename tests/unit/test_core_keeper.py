"""The dead-man process, seen from Python, and its record."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from hostupdate.core.freezer import GuestSet
from hostupdate.core.keeper import (
    Armed,
    Fired,
    Keeper,
    KeeperRecord,
    Reason,
    RecoveryRun,
    Thawed,
    read_record,
)
from hostupdate.errors import CoreError
from tests.unit.core_guests import Guest, guests, second

PR_SET_CHILD_SUBREAPER = 36

MS = 1_000_000


@pytest.fixture
def record(tmp_path: Path) -> Path:
    return tmp_path / "record"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def three() -> Iterator[list[Guest]]:
    with guests(3, cgroups=False) as made:
        yield made


@pytest.fixture
def subreaper() -> Iterator[None]:
    """Orphans of a killed orchestrator become children of this process."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    yield
    libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
    with suppress(ChildProcessError):
        for _ in range(1000):
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.001)


def read(path: Path) -> KeeperRecord:
    record = read_record(path)
    assert record is not None
    return record


def start(guests: GuestSet, record: Path, log: Path, *command: str, grace_ns: int = 0) -> Keeper:
    return Keeper.start(
        guests,
        record=record,
        recovery_log=log,
        recovery_argv=command,
        recovery_env={"WHO": "recovery"},
        grace_ns=grace_ns,
    )


def test_a_quiet_life(record: Path, log: Path) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    with start(GuestSet([]), record, log) as keeper:
        assert Path(f"/proc/{keeper.pid}/comm").read_text() == "hu-keeper\n"
        assert keeper.lock_errno == 0
        keeper.arm(second(60))
        assert keeper.armed
        with pytest.raises(CoreError) as raised:
            keeper.arm(second(60))
        assert raised.value.errno == errno.EALREADY
        with pytest.raises(CoreError) as raised:
            keeper.stop()
        assert raised.value.errno == errno.EBUSY
        assert not keeper.alarmed()
        assert keeper.disarm() is False
        assert not keeper.armed
    keeper.stop()  # no harm
    assert len(os.listdir("/proc/self/fd")) == descriptors
    life = read(record)
    assert life.pid == keeper.pid or keeper.pid == 0
    assert len(life.armed) == len(life.disarmed_monotonic_ns) == 1
    assert life.quit_monotonic_ns is not None
    assert life.answered


def test_the_deadline(three: list[Guest], record: Path, log: Path) -> None:
    handles = [guest.open() for guest in three]
    together = GuestSet(handles)
    with start(together, record, log, "/bin/false", grace_ns=60_000 * MS) as keeper:
        deadline = second(0.1)
        keeper.arm(deadline)
        together.freeze(deadline)
        assert select.select([keeper], [], [], 5)[0]
        assert second() >= deadline
        assert keeper.alarmed()
        assert all(guest.runs() for guest in three)
        assert keeper.disarm() is True
    life = read(record)
    assert [fired.reason for fired in life.fired] == [Reason.DEADLINE]
    assert [thawed.guest for thawed in life.thaws] == [0, 1, 2]
    for thawed in life.thaws:
        assert thawed.error == 0
        assert thawed.monotonic_ns is not None
        assert deadline <= thawed.requested_monotonic_ns <= thawed.monotonic_ns
    assert life.recovery is None
    assert life.answered
    for handle in handles:
        handle.close()


@pytest.mark.usefixtures("subreaper")
def test_the_death_of_the_orchestrator(three: list[Guest], record: Path, log: Path) -> None:
    handles = [guest.open() for guest in three]
    together = GuestSet(handles)
    answers, questions = os.pipe()
    orchestrator = os.fork()
    if orchestrator == 0:
        try:
            keeper = start(together, record, log, "/bin/sh", "-c", "echo $WHO; exit 4")
            keeper.arm(second(60))
            together.freeze(second(5))
            os.write(questions, str(keeper.pid).encode())
            time.sleep(60)
        finally:
            os._exit(1)
    os.close(questions)
    keeper_pid = int(os.read(answers, 20))
    os.close(answers)
    assert all(handle.frozen() for handle in handles)
    killed = second()
    os.kill(orchestrator, signal.SIGKILL)
    os.waitpid(orchestrator, 0)
    assert os.waitpid(keeper_pid, 0)[1] == 0
    assert all(guest.runs() for guest in three)

    life = read(record)
    assert [fired.reason for fired in life.fired] == [Reason.ORCHESTRATOR_GONE]
    assert max(thawed.monotonic_ns or 0 for thawed in life.thaws) - killed < 2_000 * MS
    assert life.recovery is not None
    assert life.recovery.status == 4
    assert not life.answered
    assert log.read_text() == "recovery\n"
    for handle in handles:
        handle.close()


def test_a_keeper_that_dies(record: Path, log: Path) -> None:
    keeper = start(GuestSet([]), record, log)
    keeper.arm(second(60))
    os.kill(keeper.pid, signal.SIGKILL)
    assert select.select([keeper], [], [], 5)[0]
    for call in (lambda: keeper.arm(second(60)), keeper.disarm, keeper.stop):
        with pytest.raises(CoreError) as raised:
            call()
        assert raised.value.errno == errno.EPIPE
    keeper.stop()  # closed and reaped


def test_an_armed_keeper_is_left_to_its_duty(record: Path, log: Path) -> None:
    with start(GuestSet([]), record, log) as keeper:
        keeper.arm(second(60))
    assert keeper.armed
    assert not keeper.alarmed()
    keeper.disarm()
    keeper.stop()


def test_a_start_that_fails_leaves_nothing(tmp_path: Path, record: Path) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError):
        Keeper.start(GuestSet([]), record=record, recovery_log=tmp_path / "absent" / "log")
    with pytest.raises(CoreError) as raised:
        Keeper.start(GuestSet([]), record=record, recovery_log=record, timeout_ns=0)
    assert raised.value.errno == errno.ETIMEDOUT
    assert len(os.listdir("/proc/self/fd")) == descriptors
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


# ---- the record ----

FULL = """\
ready 1 pid=7 locked_bytes=4096 lock_error=-12
armed 2 deadline=30
disarmed 3
armed 4 deadline=40
fired 40 reason=deadline
thawed 42 guest=0 requested=41 error=0
thawed 0 guest=1 requested=41 error=-110
orchestrator-killed 50 error=0
recovery-started 60 pid=8
recovery-ended 70 status=-9
quit 80
"""


def test_record_in_full(record: Path) -> None:
    record.write_text(FULL)
    assert read_record(record) == KeeperRecord(
        pid=7,
        ready_monotonic_ns=1,
        locked_bytes=4096,
        lock_errno=errno.ENOMEM,
        armed=(
            Armed(monotonic_ns=2, deadline_monotonic_ns=30),
            Armed(monotonic_ns=4, deadline_monotonic_ns=40),
        ),
        disarmed_monotonic_ns=(3,),
        fired=(Fired(monotonic_ns=40, reason=Reason.DEADLINE),),
        thaws=(
            Thawed(guest=0, requested_monotonic_ns=41, monotonic_ns=42, error=0),
            Thawed(guest=1, requested_monotonic_ns=41, monotonic_ns=None, error=errno.ETIMEDOUT),
        ),
        orchestrator_killed_monotonic_ns=50,
        recovery=RecoveryRun(
            pid=8, started_monotonic_ns=60, ended_monotonic_ns=70, status=-signal.SIGKILL
        ),
        quit_monotonic_ns=80,
    )


def test_record_cut_anywhere_is_read(record: Path) -> None:
    lines = 0
    for length in range(len(FULL) + 1):
        record.write_text(FULL[:length])
        life = read_record(record)
        complete = FULL[:length].count("\n")
        assert (life is None) == (complete == 0)
        lines = max(lines, complete)
        if life is not None:
            assert len(life.armed) == (complete >= 2) + (complete >= 4)
            assert (life.recovery is not None) == (complete >= 9)
    assert lines == FULL.count("\n")


def test_record_of_the_last_keeper_counts(record: Path) -> None:
    record.write_text(FULL + "ready 90 pid=9 locked_bytes=0 lock_error=0\narmed 91 deadline=95\n")
    life = read(record)
    assert (life.pid, len(life.armed), life.fired) == (9, 1, ())


@pytest.mark.parametrize(
    "line",
    [
        "",
        "fired",
        "fired x reason=deadline",
        "fired 5 reason=whim",
        "fired 5",
        "moved 5 a=b",
        "é 1",
    ],
)
def test_record_lines_not_understood_are_left_out(record: Path, line: str) -> None:
    record.write_text("ready 1 pid=7 locked_bytes=0 lock_error=0\n" + line + "\nquit 9\n")
    life = read(record)
    assert life.fired == ()
    assert life.quit_monotonic_ns == 9


def test_record_without_a_keeper(record: Path) -> None:
    assert read_record(record) is None
    record.write_text("armed 2 deadline=30\nrecovery-ended 3 status=0\n")
    assert read_record(record) is None


@pytest.mark.parametrize(
    ("tail", "answered"),
    [
        ("", True),
        ("fired 5 reason=deadline\n", False),
        ("fired 5 reason=deadline\ndisarmed 6\n", True),
        ("disarmed 4\nfired 5 reason=deadline\n", False),
        ("fired 5 reason=deadline\nrecovery-started 6 pid=2\n", False),
        ("fired 5 reason=deadline\nrecovery-started 6 pid=2\nrecovery-ended 7 status=0\n", True),
        ("fired 5 reason=deadline\nrecovery-started 6 pid=2\nrecovery-ended 7 status=1\n", False),
        ("fired 5 reason=deadline\nrecovery-started 6 pid=2\nrecovery-left 7 pid=2\n", False),
    ],
)
def test_record_answered(record: Path, tail: str, answered: bool) -> None:
    record.write_text("ready 1 pid=7 locked_bytes=0 lock_error=0\n" + tail)
    assert read(record).answered is answered
