"""What a run leaves on disk: whole or not at all, and never read wrongly."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from hostupdate import journal as module
from hostupdate.errors import BusyError, InputError, PrerequisiteError
from hostupdate.journal import Journal
from hostupdate.model import (
    ARMED_SCHEMA,
    ArmedGuest,
    ArmedRecord,
    Impact,
    ImpactReport,
    PauseMethod,
    Report,
)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "state")


def record(run_id: str = "r1") -> ArmedRecord:
    guest = ArmedGuest(
        name="web", uuid="u", pid=7, started=2, cgroup="/hostupdate/u", home_cgroup="/home"
    )
    return ArmedRecord(
        run_id=run_id,
        boot_id="boot",
        libvirt_timeout_ns=2_000_000_000,
        uri="qemu:///system",
        pid=1,
        method=PauseMethod.STOP,
        cgroup2="/sys/fs/cgroup",
        memory_min={"/home": "0"},
        guests=(guest,),
    )


def report(run_id: str) -> Report:
    return Report(
        run_id=run_id,
        update="u",
        started_realtime_ns=1,
        impact=ImpactReport(requested="auto", judged=Impact.PAUSE, actual=Impact.PAUSE),
        method=PauseMethod.FREEZE,
        budget_ns=1,
    )


def arm(journal: Journal) -> Path:
    journal.lock("r1").release()  # makes the state directory
    journal.arm(record())
    return journal.state / "armed.json"


# ---- the armed record


def test_nothing_is_armed_where_there_is_nothing(journal: Journal) -> None:
    assert journal.armed() is None
    assert not journal.state.exists(), "looking made a directory"


def test_the_armed_record_comes_back_as_it_was(journal: Journal) -> None:
    arm(journal)
    assert journal.armed() == record()
    journal.disarm()
    assert journal.armed() is None
    journal.disarm()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[]", b"null", b'{"schema": "hostupdate-armed-v1"}']
)
def test_a_damaged_record_is_an_error_that_names_it(journal: Journal, content: bytes) -> None:
    path = arm(journal)
    path.write_bytes(content)
    with pytest.raises(InputError, match="damaged") as error:
        journal.armed()
    assert error.value.source == str(path)
    assert "by hand" in error.value.remedy


def test_a_record_of_the_right_shape_with_a_wrong_value_is_damaged(journal: Journal) -> None:
    path = arm(journal)
    path.write_bytes(path.read_bytes().replace(b'"pid": 7', b'"pid": "seven"'))
    with pytest.raises(InputError, match=r"damaged.*guests\[0\]\.pid"):
        journal.armed()


@pytest.mark.parametrize("rest", ["", ', "run_id": "r9"'])
def test_a_foreign_schema_is_told_from_damage_whatever_else_is_in_it(
    journal: Journal, rest: str
) -> None:
    path = arm(journal)
    path.write_text(f'{{"schema": "hostupdate-armed-v9"{rest}}}')
    with pytest.raises(InputError, match="'hostupdate-armed-v9' is not") as error:
        journal.armed()
    assert (error.value.source, error.value.field) == (str(path), "schema")
    assert "the version of hostupdate that wrote it" in error.value.remedy


def test_keys_of_a_newer_minor_version_are_passed_over(journal: Journal) -> None:
    path = arm(journal)
    data = msgspec.json.decode(path.read_bytes())
    assert data["schema"] == ARMED_SCHEMA
    path.write_bytes(msgspec.json.encode(data | {"added-later": 1}))
    assert journal.armed() == record()


# ---- written whole or not at all


def test_a_kill_before_the_rename_leaves_the_old_record(journal: Journal) -> None:
    arm(journal)
    before = (journal.state / "armed.json").read_bytes()
    code = (
        "import os, sys, pathlib\n"
        "from hostupdate import journal\n"
        "from tests.unit.test_journal import record\n"
        "pathlib.Path.rename = lambda *_: os.kill(os.getpid(), 9)\n"
        "journal.Journal(pathlib.Path(sys.argv[1])).arm(record('r2'))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, journal.state], check=False, timeout=60)
    assert ended.returncode == -signal.SIGKILL
    assert (journal.state / "armed.json").read_bytes() == before
    assert journal.armed() == record()
    journal.arm(record("r3"))  # what was half written is in nobody's way
    assert journal.armed() == record("r3")
    assert sorted(os.listdir(journal.state)) == ["armed.json", "lock"]


def test_a_write_that_fails_leaves_the_old_record_and_says_where(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    arm(journal)

    def full(fd: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "write", full)
    with pytest.raises(PrerequisiteError, match=r"armed\.json.*No space left") as error:
        journal.arm(record("r2"))
    monkeypatch.undo()
    assert "--state" in error.value.remedy
    assert journal.armed() == record()


def test_a_short_write_is_continued(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    arm(journal)
    monkeypatch.setattr(module.os, "write", lambda fd, data: real(fd, data[:10]))
    journal.arm(record("r2"))
    monkeypatch.undo()
    assert journal.armed() == record("r2")


def test_files_and_their_directory_reach_the_disk_before_arming_returns(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real: Callable[[int], None] = os.fsync

    def fsync(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        real(fd)

    journal.lock("r1").release()
    monkeypatch.setattr(module.os, "fsync", fsync)
    journal.arm(record())
    assert synced == [str(journal.state / "armed.new"), str(journal.state)]


# ---- the host's lock


def test_the_lock_names_its_holder(journal: Journal) -> None:
    lock = journal.lock("r1")
    with pytest.raises(BusyError) as error:
        journal.lock("r2")
    for words in ("run r1", f"pid {os.getpid()}", "since 20"):
        assert words in error.value.holder
        assert words in str(error.value)
    assert journal.holder() == error.value.holder
    lock.release()


def test_a_released_lock_is_nobodys(journal: Journal) -> None:
    assert journal.holder() is None
    journal.lock("r1").release()
    assert journal.holder() is None
    journal.lock("r2").release()


def test_a_shorter_holder_leaves_nothing_of_the_one_before(journal: Journal) -> None:
    journal.lock("a-very-long-run-id-of-the-run-before").release()
    lock = journal.lock("r")
    assert (journal.state / "lock").read_text().count("run ") == 1
    assert "before" not in (journal.holder() or "")
    lock.release()


HOLD = (
    "import sys, pathlib, time\n"
    "from hostupdate.journal import Journal\n"
    "lock = Journal(pathlib.Path(sys.argv[1])).lock('theirs')\n"
    "print('held', flush=True)\n"
    "time.sleep(300)\n"
)


def test_the_lock_is_free_once_its_holder_is_dead(journal: Journal) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, journal.state], stdout=subprocess.PIPE, text=True
    ) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == "held\n"
            with pytest.raises(BusyError, match=f"run theirs, pid {other.pid}, since"):
                journal.lock("mine")
        finally:
            other.kill()
    journal.lock("mine").release()


def test_whoever_can_wait_gets_the_lock_when_it_is_released(journal: Journal) -> None:
    lock = journal.lock("r1")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # waits for the lock, then says so
        os.close(lock._fd)
        journal.lock("r2", wait_ns=60_000_000_000)
        os.write(writer, b"!")
        os._exit(0)
    os.close(writer)
    lock.release()
    assert os.read(reader, 1) == b"!"
    os.close(reader)
    os.waitpid(child, 0)


def test_asking_for_the_holder_keeps_nobody_from_the_lock(journal: Journal) -> None:
    """`status` looks by taking the lock for a moment; a run that starts then must not fail."""
    journal.lock("r0").release()
    fd = os.open(journal.state / "lock", os.O_RDONLY | os.O_CLOEXEC)
    import fcntl
    import threading

    fcntl.flock(fd, fcntl.LOCK_SH)
    timer = threading.Timer(0.02, os.close, [fd])
    timer.start()
    journal.lock("r1").release()
    timer.join()


# ---- runs


def test_runs_are_listed_oldest_first_and_only_with_a_report(journal: Journal) -> None:
    made = [journal.new_run() for _ in range(3)]
    for run in made[:2]:
        journal.save_report(report(run))
    assert journal.runs() == sorted(made[:2])
    assert journal.report(made[0]).run_id == made[0]
    with pytest.raises(InputError, match="No such file"):
        journal.report(made[2])


def test_a_run_that_never_began_leaves_nothing_and_one_that_did_stays(journal: Journal) -> None:
    never, began = journal.new_run(), journal.new_run()
    journal.save_report(report(began))
    for run in (never, began, "never-made"):
        journal.drop_if_empty(run)
    assert not journal.directory(never).exists()
    assert journal.directory(began).exists()
    assert journal.runs() == [began]


def test_the_state_is_its_owners_alone(journal: Journal) -> None:
    run = journal.new_run()
    journal.save_report(report(run))
    path = arm(journal)
    assert stat.S_IMODE(journal.state.stat().st_mode) == 0o700
    for file in (path, journal.directory(run) / "report.json", journal.state / "lock"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize("use", ["lock", "new_run"])
def test_a_state_directory_that_cannot_be_made_is_an_error_with_a_remedy(
    tmp_path: Path, use: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    journal = Journal(tmp_path / "file" / "state")
    with pytest.raises(PrerequisiteError, match="cannot be used: Not a directory") as error:
        journal.lock("r") if use == "lock" else journal.new_run()
    assert "--state" in error.value.remedy


def test_a_state_directory_that_others_can_write_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    state.chmod(0o777)
    with pytest.raises(PrerequisiteError, match="can be written by others"):
        Journal(state).new_run()
    assert list(state.iterdir()) == []
