"""What a run leaves on disk: whole or not at all, and never read wrongly."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from hostupdate.errors import BusyError, InputError, JournalError, PrerequisiteError, RefusedError
from hostupdate.journal import Journal, RunJournal, database, pending
from hostupdate.journal.database import MIGRATIONS, Database
from hostupdate.model import (
    PENDING_SCHEMA,
    Action,
    ArmedGuest,
    GuestReport,
    GuestState,
    Impact,
    ImpactReport,
    PauseMethod,
    PendingRecord,
    Phase,
    Plan,
    PlannedGuest,
    Report,
)
from hostupdate.rivals import Held
from hostupdate.unwinding import Kind
from tests.requirements import need

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "state", tmp_path / "run")


def record(run_id: str = "r1") -> PendingRecord:
    guest = ArmedGuest(
        name="web", uuid="u", pid=7, started=2, cgroup="/hostupdate/u", home_cgroup="/home"
    )
    return PendingRecord(
        run_id=run_id,
        boot_id="boot",
        libvirt_timeout_ns=2_000_000_000,
        uri="qemu:///system",
        pid=1,
        started=3,
        method=PauseMethod.STOP,
        cgroup2="/sys/fs/cgroup",
        memory_min={"/home": "0"},
        guests=(guest,),
        held=Held(units=("libvirt-guests.service",)),
    )


def plan(*actions: Action) -> Plan:
    return Plan(
        update="u",
        requested="auto",
        judged=Impact.PAUSE,
        actual=Impact.PAUSE,
        method=PauseMethod.FREEZE,
        method_reason="",
        budget_ns=1,
        predicted_blackout_ns=1,
        guests=(PlannedGuest(name="web", uuid="u", state=GuestState.RUNNING, pause=True),),
        actions=actions or (Action(phase=Phase.STAGE, kind="step", title="t", step="s"),),
    )


def report(run_id: str) -> Report:
    return Report(
        run_id=run_id,
        update="u",
        started_realtime_ns=1,
        impact=ImpactReport(requested="auto", judged=Impact.PAUSE, actual=Impact.PAUSE),
        method=PauseMethod.FREEZE,
        budget_ns=1,
        guests=[
            GuestReport(
                name="web", uuid="u", impact=Impact.PAUSE, state_before=GuestState.RUNNING,
                state_after=GuestState.PAUSED,
            )
        ],
    )  # fmt: skip


def begin(journal: Journal, run_id: str = "r1") -> RunJournal:
    journal.check()
    return journal.begin(plan(), record(run_id))


# ---- the pending record


def test_nothing_is_pending_where_there_is_nothing(journal: Journal) -> None:
    assert journal.pending() is None
    assert not journal.state.exists(), "looking made a directory"


def test_a_run_is_pending_from_its_begin_to_its_end(journal: Journal) -> None:
    run = begin(journal)
    assert journal.pending() == run.pending == record()
    changed = msgspec.structs.replace(record(), guests=())
    run.pend(changed)
    assert journal.pending() == run.pending == changed
    run.end()
    assert journal.pending() is None
    run.end()
    run.close()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"null", b'{"sha256": ""}'])
def test_a_damaged_record_is_an_error_that_names_it(journal: Journal, content: bytes) -> None:
    begin(journal).close()
    path = journal.state / "pending.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match="damaged") as error:
        journal.pending()
    assert error.value.source == str(path)
    assert f"rm {path}" in error.value.remedy
    assert "frozen" in error.value.remedy, "virsh list tells of a frozen guest that it runs"


def test_any_change_of_the_record_is_noticed(journal: Journal) -> None:
    begin(journal).close()
    path = journal.state / "pending.json"
    path.write_bytes(path.read_bytes().replace(b'"pid":7', b'"pid":8'))
    with pytest.raises(InputError, match="is not that of the record") as error:
        journal.pending()
    assert error.value.field == "sha256"


def test_a_record_of_another_version_is_told_from_damage(journal: Journal) -> None:
    begin(journal).close()
    path = journal.state / "pending.json"
    path.write_bytes(path.read_bytes().replace(PENDING_SCHEMA.encode(), b"hostupdate-pending-v9"))
    with pytest.raises(InputError, match="'hostupdate-pending-v9' is not") as error:
        journal.pending()
    assert (error.value.source, error.value.field) == (str(path), "compatible")
    assert "the version that wrote it" in error.value.remedy


def test_the_record_of_a_released_version_is_read(journal: Journal) -> None:
    begin(journal).close()
    shutil.copy(GOLDEN / "pending-v1.json", journal.state / "pending.json")
    assert journal.pending() == record("golden")


def test_a_kill_before_the_rename_leaves_the_old_record(journal: Journal) -> None:
    run = begin(journal)
    before = (journal.state / "pending.json").read_bytes()
    code = (
        "import os, sys, pathlib\n"
        "from hostupdate.journal import pending\n"
        "from tests.unit.test_journal import record\n"
        "pathlib.Path.rename = lambda *_: os.kill(os.getpid(), 9)\n"
        "pending.write_pending(pathlib.Path(sys.argv[1]), record('r2'))\n"
    )
    argv = [sys.executable, "-c", code, str(journal.state / "pending.json")]
    ended = subprocess.run(argv, check=False, timeout=60)
    assert ended.returncode == -signal.SIGKILL
    assert (journal.state / "pending.json").read_bytes() == before
    run.pend(record("r3"))  # what was half written is in nobody's way
    assert journal.pending() == record("r3")
    assert not (journal.state / "pending.new").exists()
    run.close()


def test_a_write_that_fails_leaves_the_old_record_and_says_where(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin(journal)

    def full(fd: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pending.os, "write", full)
    with pytest.raises(PrerequisiteError, match=r"pending\.json.*No space left") as error:
        run.pend(record("r2"))
    monkeypatch.undo()
    assert "--state" in error.value.remedy
    assert journal.pending() == run.pending == record()
    run.close()


def test_a_short_write_is_continued(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    run = begin(journal)
    monkeypatch.setattr(pending.os, "write", lambda fd, data: real(fd, data[:10]))
    run.pend(record("r2"))
    monkeypatch.undo()
    assert journal.pending() == record("r2")
    run.close()


def test_the_record_and_its_directory_reach_the_disk_before_it_counts(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real: Callable[[int], None] = os.fsync

    def fsync(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        real(fd)

    run = begin(journal)
    monkeypatch.setattr(pending.os, "fsync", fsync)
    run.pend(record("r2"))
    assert synced == [str(journal.state / "pending.new"), str(journal.state)]
    run.close()


# ---- the database


def test_records_come_back_in_their_order(journal: Journal) -> None:
    run = begin(journal)
    run.note(Kind.INTENT, 0)
    run.blackout(on=True)
    run.note(Kind.FAILED, 0, "it hung")
    run.blackout(on=False)
    run.note(Kind.COMMITTED)
    run.close()
    again = journal.reopen(record())
    assert [(r.kind, r.action, r.problem) for r in again.records()] == [
        (Kind.INTENT, 0, ""),
        (Kind.BLACKOUT, None, ""),
        (Kind.FAILED, 0, "it hung"),
        (Kind.COMMITTED, None, ""),
    ]
    assert again.plan() == plan()
    assert again.report() is None
    again.close()


def test_guests_and_events_are_kept(journal: Journal) -> None:
    run = begin(journal)
    run.event("keeper-fired", {"reason": "deadline"})
    run.save_report(report("r1"))
    run.close()
    rows = Database(journal.state / "journal.db", write=False)
    assert rows.rows("SELECT * FROM guest") == [("r1", "u", "web", "running", "paused")]
    assert rows.rows("SELECT run_id, kind, detail FROM event") == [
        ("r1", "keeper-fired", '{"reason":"deadline"}')
    ]
    rows.close()


def test_nothing_is_flushed_in_a_blackout_and_all_of_it_after(
    journal: Journal, tmp_path: Path
) -> None:
    """By what the kernel was asked for: the system calls of a process of its own."""
    code = (
        "import os, sys, pathlib\n"
        "from hostupdate.journal import Journal\n"
        "from hostupdate.unwinding import Kind\n"
        "from tests.unit.test_journal import begin\n"
        "run = begin(Journal(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])))\n"
        "run.blackout(on=True)\n"
        "os.write(2, b'BLACKOUT')\n"
        "for n in range(2000): run.note(Kind.INTENT, n)\n"
        "os.write(2, b'OVER')\n"
        "run.blackout(on=False); run.note(Kind.COMMITTED)\n"
        "os.write(2, b'END')\n"
    )
    trace = tmp_path / "trace"
    argv = ["strace", "-o", str(trace), "-e", "trace=write,fsync,fdatasync", sys.executable, "-c"]
    need("strace")
    subprocess.run([*argv, code, journal.state, tmp_path / "run"], check=True, timeout=120)
    before, _, rest = trace.read_text().partition("BLACKOUT")
    inside, _, after = rest.partition("OVER")
    assert "sync(" in before
    assert "sync(" not in inside
    assert "sync(" in after.partition("END")[0]


def fill(journal: Journal, **pragmas: object) -> Path:
    path = journal.state / "journal.db"
    journal.state.mkdir(mode=0o700)
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE t (x)")
    for name, value in pragmas.items():
        connection.execute(f"PRAGMA {name}={value}")
    connection.commit()
    connection.close()
    return path


@pytest.mark.parametrize("content", [b"not a database", b"SQLite format 3\0" + bytes(84)])
def test_a_foreign_file_is_refused_by_name(journal: Journal, content: bytes) -> None:
    journal.state.mkdir(mode=0o700)
    path = journal.state / "journal.db"
    path.write_bytes(content + bytes(4000))
    for use in (journal.check, journal.runs):
        with pytest.raises(InputError, match=r"damaged|not a journal") as error:
            use()
        assert error.value.source == str(path)
        assert f"mv {path} " in error.value.remedy
    assert path.read_bytes() == content + bytes(4000)


def test_the_database_of_another_program_is_refused(journal: Journal) -> None:
    path = fill(journal)
    before = path.read_bytes()
    with pytest.raises(InputError, match="not a journal of hostupdate"):
        journal.check()
    assert path.read_bytes() == before


def test_a_newer_journal_is_refused_and_not_touched(journal: Journal) -> None:
    path = fill(journal, application_id=database.APPLICATION_ID, user_version=len(MIGRATIONS) + 1)
    before = path.read_bytes()
    for use in (journal.check, journal.runs):
        with pytest.raises(InputError, match="newer than this program knows") as error:
            use()
        assert "the version of hostupdate that wrote it" in error.value.remedy
    assert path.read_bytes() == before


def test_a_truncated_journal_is_refused(journal: Journal) -> None:
    run = begin(journal)
    for number in range(200):
        run.note(Kind.INTENT, number, "x" * 500)
    run.save_report(report("r1"))
    run.end()
    run.close()
    path = journal.state / "journal.db"
    size = path.stat().st_size
    for keep in (size // 2, 4096, 100):
        os.truncate(path, keep)
        for use in (journal.check, journal.runs):
            with pytest.raises(InputError, match="damaged"):
                use()


def test_a_journal_that_cannot_be_written_refuses_a_run(journal: Journal) -> None:
    journal.state.mkdir(mode=0o700)
    (journal.state / "journal.db").mkdir()
    with pytest.raises(PrerequisiteError, match=r"journal .*cannot be used: Is a directory"):
        journal.check()


def test_a_disk_that_fills_up_ends_a_write_and_keeps_what_was_written(journal: Journal) -> None:
    run = begin(journal)
    run.note(Kind.INTENT, 0)
    limit = run._database.rows("PRAGMA page_count")[0][0]
    run._database.rows(f"PRAGMA max_page_count={limit}")
    with pytest.raises(JournalError, match="full") as error:
        for _ in range(1000):
            run.note(Kind.INTENT, 1, "x" * 4000)
    assert error.value.path == str(journal.state / "journal.db")
    run.close()
    again = journal.reopen(record())
    assert again.records()[0].action == 0
    again.close()


def test_room_is_taken_before_a_run_begins(journal: Journal) -> None:
    run = begin(journal)
    for name in ("journal.db", "journal.db-wal"):
        assert (journal.state / name).stat().st_size > database.ROOM_BYTES
    run.close()


def test_a_run_that_cannot_begin_leaves_nothing_pending(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Database) -> None:
        raise JournalError("journal.db", "database or disk is full")

    monkeypatch.setattr(Database, "reserve", full)
    with pytest.raises(JournalError):
        begin(journal)
    assert journal.pending() is None
    assert journal.runs() == []


def test_the_journal_of_a_released_version_is_read_and_brought_up_to_date(
    journal: Journal,
) -> None:
    journal.state.mkdir(mode=0o700)
    shutil.copy(GOLDEN / "journal-v1.db", journal.state / "journal.db")
    assert journal.runs() == ["golden"]
    assert journal.report("golden") == report("golden")
    journal.check()
    run = journal.reopen(record("golden"))
    assert run.plan() == plan()
    assert [r.kind for r in run.records()] == [Kind.INTENT, Kind.DONE, Kind.COMMITTED]
    run.close()


def test_migrations_run_once_each_and_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    shutil.copy(GOLDEN / "journal-v1.db", path)
    more = (*MIGRATIONS, "ALTER TABLE run ADD COLUMN note TEXT DEFAULT 'new'")
    for _ in range(2):
        made = Database(path, write=True, migrations=more)
        assert made.rows("SELECT id, note FROM run") == [("golden", "new")]
        assert made.rows("PRAGMA user_version") == [(len(more),)]
        made.close()
    bad = (*more, "CREATE TABLE half (x); SELECT * FROM nowhere")
    with pytest.raises(PrerequisiteError, match="nowhere"):
        Database(path, write=True, migrations=bad)
    made = Database(path, write=True, migrations=more)
    assert made.rows("SELECT name FROM sqlite_schema WHERE name = 'half'") == []
    made.close()


def test_a_reader_sees_what_a_run_has_written_and_changes_nothing(journal: Journal) -> None:
    run = begin(journal)
    assert journal.runs() == []
    run.save_report(report("r1"))
    assert journal.runs() == ["r1"]
    run.note(Kind.DONE, 0)
    run.close()


def test_a_report_that_is_none_is_refused(journal: Journal) -> None:
    run = begin(journal)
    run._database.write("UPDATE run SET report = ?", b"{}")
    run.close()
    with pytest.raises(InputError, match=r"run\.report: damaged"):
        journal.report("r1")


def test_a_damaged_journal_is_moved_away_whole(journal: Journal) -> None:
    begin(journal).close()
    away = journal.set_aside()
    assert away.exists()
    assert not (journal.state / "journal.db").exists()
    journal.check()
    assert journal.runs() == []


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
    assert (journal._runtime / "lock").read_text().count("run_id") == 1
    assert "before" not in (journal.holder() or "")
    lock.release()


HOLD = (
    "import sys, pathlib, time\n"
    "from hostupdate.journal import Journal\n"
    "lock = Journal(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])).lock('theirs')\n"
    "print('held', flush=True)\n"
    "time.sleep(300)\n"
)


def test_the_lock_is_free_once_its_holder_is_dead(journal: Journal) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, journal.state, journal._runtime],
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == "held\n"
            with pytest.raises(BusyError, match=f"run theirs, pid {other.pid}, since"):
                journal.lock("mine")
        finally:
            other.kill()
    journal.lock("mine").release()


def test_a_run_that_died_in_another_directory_is_recovered_first(
    journal: Journal, tmp_path: Path
) -> None:
    other = Journal(tmp_path / "other", tmp_path / "run")
    run = begin(journal)
    journal.lock("r1").release()
    for _ in range(2):
        with pytest.raises(RefusedError, match=r"run r1, .*interrupted") as error:
            other.lock("r2")
        assert error.value.remedy == f"run `hostupdate --state {journal.state} resume` first"
    journal.lock("resume").release()
    run.end()
    other.lock("r2").release()


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
    fd = os.open(journal._runtime / "lock", os.O_RDONLY | os.O_CLOEXEC)
    fcntl.flock(fd, fcntl.LOCK_SH)
    timer = threading.Timer(0.02, os.close, [fd])
    timer.start()
    journal.lock("r1").release()
    timer.join()


# ---- runs


def test_runs_are_listed_oldest_first_and_only_with_a_report(journal: Journal) -> None:
    for name in ("b", "a", "c"):
        run = begin(journal, name)
        if name != "c":
            run.save_report(report(name))
        run.end()
        run.close()
    assert journal.runs() == ["b", "a"]
    assert journal.report("a").run_id == "a"
    for missing in ("c", "never"):
        with pytest.raises(InputError, match=f"run {missing} has none"):
            journal.report(missing)


def test_a_run_that_never_began_leaves_nothing_and_one_that_did_stays(journal: Journal) -> None:
    never, began = journal.new_run(), journal.new_run()
    (journal.directory(began) / "keeper.log").write_text("ready")
    for run in (never, began, "never-made"):
        journal.drop_if_empty(run)
    assert not journal.directory(never).exists()
    assert journal.directory(began).exists()


def test_the_state_is_its_owners_alone(journal: Journal) -> None:
    lock = journal.lock("r1")
    run = begin(journal)
    assert stat.S_IMODE(journal.state.stat().st_mode) == 0o700
    files = [path for path in journal.state.iterdir() if path.is_file()]
    assert {path.name for path in files} >= {"journal.db", "journal.db-wal", "pending.json"}
    for file in files:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    run.close()
    lock.release()


@pytest.mark.parametrize("use", ["check", "new_run"])
def test_a_state_directory_that_cannot_be_made_is_an_error_with_a_remedy(
    tmp_path: Path, use: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    journal = Journal(tmp_path / "file" / "state")
    with pytest.raises(PrerequisiteError, match="cannot be used: Not a directory") as error:
        getattr(journal, use)()
    assert "--state" in error.value.remedy


@pytest.mark.parametrize("which", ["state", "run"])
def test_a_directory_that_others_can_write_is_refused(tmp_path: Path, which: str) -> None:
    directory = tmp_path / which
    directory.mkdir()
    directory.chmod(0o777)
    journal = Journal(tmp_path / "state", tmp_path / "run")
    with pytest.raises(PrerequisiteError, match="can be written by others"):
        journal.new_run() if which == "state" else journal.lock("r")
    assert list(directory.iterdir()) == []
