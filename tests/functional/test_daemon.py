"""libvirtd killed, restarted or hanging while guests are paused: guests run, and it is said."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.functional.cli import Ended, Lab, await_word, kill
from tests.functional.conftest import assert_nothing_left, make_cache
from tests.functional.daemon import Daemon, DaemonLab
from tests.functional.test_deadman import wait_keepers
from tests.functional.test_failures import assert_undone_after_the_guests_ran, notes, step
from tests.requirements import need

Write = Callable[..., Path]
METHODS = ("freeze", "stop")


@pytest.fixture(scope="module")
def made() -> Iterator[DaemonLab]:
    need("root", "qemu", "libvirt", "lab", "cgroup2")
    base = Path(tempfile.mkdtemp(prefix="hu-d-", dir="/var/tmp"))
    (base / "state").mkdir()
    lab = DaemonLab(base, make_cache(base / "state"), guests=2)
    yield lab
    lab.remove()
    shutil.rmtree(base)


@pytest.fixture
def daemon(made: DaemonLab) -> Daemon:
    return made.daemon


@pytest.fixture
def lab(made: DaemonLab) -> Iterator[Lab]:
    """The guests: running, managed and healthy after each test, whatever became of libvirtd."""
    made.daemon.ensure()
    pids = rows(made.lab)
    yield made.lab
    made.daemon.ensure()
    interrupted = made.lab.run("status", "--json").data["interrupted"]
    if interrupted is not None:
        made.lab.run("resume")  # for the next test's sake
    assert interrupted is None
    # A daemon that has just been started tells what it remembers, until QEMU tells it more.
    deadline_ns = time.monotonic_ns() + 10_000_000_000
    while rows(made.lab) != pids and time.monotonic_ns() < deadline_ns:
        pass
    assert rows(made.lab) == pids, "a guest changed its process or its state"
    assert_nothing_left(made.lab)
    made.lab.assert_healthy()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def rows(lab: Lab) -> dict[str, tuple[int, str]]:
    ended = lab.run("guests", "--json")
    assert ended.code == 0, ended.err
    return {row["name"]: (row["pid"], row["state"]) for row in ended.data["guests"]}


def apply(lab: Lab, manifest: Path, method: str) -> tuple[Ended, dict[str, Any]]:
    ended = lab.apply(manifest, "--pause-method", method)
    assert ended.out, ended.err
    return ended, ended.data


@pytest.mark.parametrize("method", METHODS)
def test_an_update_under_a_daemon(lab: Lab, write_manifest: Write, log: Path, method: str) -> None:
    ended, report = apply(lab, write_manifest(step("one", "blackout", ["true"], log=log)), method)
    assert ended.code == 0, ended.err
    assert {guest["state_after"] for guest in report["guests"]} == {"running"}


@pytest.mark.parametrize("method", METHODS)
def test_libvirtd_killed_in_the_blackout(
    lab: Lab, daemon: Daemon, write_manifest: Write, log: Path, method: str
) -> None:
    manifest = write_manifest(
        step("prepare", "stage", ["true"], log=log),
        step("kill", "blackout", [str(daemon.kill)], log=log),
        step("after", "blackout", ["true"], log=log),
    )
    ended, report = apply(lab, manifest, method)
    assert ended.code == 40, ended.err
    assert any("libvirt does not answer" in reason for reason in report["reasons"])
    assert_undone_after_the_guests_ran(report, log, "after", "kill", "prepare")
    assert report["blackout_ns"] < 10_000_000_000
    for guest in report["guests"]:
        assert guest["state_after"] == "unknown"
        by_monitor = any("monitor socket" in note for note in guest["notes"])
        assert by_monitor == (method == "stop")
    lab.assert_healthy()


@pytest.mark.parametrize("method", METHODS)
def test_libvirtd_killed_in_the_blackout_and_started_by_an_undo(
    lab: Lab, daemon: Daemon, write_manifest: Write, method: str
) -> None:
    manifest = write_manifest(
        f'[[step]]\nname = "kill"\nphase = "blackout"\nrun = ["{daemon.kill}"]\n'
        f'undo = ["{daemon.start}"]\ntimeout = "5s"\n'
        '[[step]]\nname = "fail"\nphase = "blackout"\nrun = ["false"]\ntimeout = "5s"\n',
    )
    ended, report = apply(lab, manifest, method)
    assert ended.code == 40, ended.err
    assert report["undone"] == ["kill"]
    assert {guest["state_after"] for guest in report["guests"]} == {"running"}


@pytest.mark.parametrize("method", METHODS)
def test_libvirtd_itself_is_what_is_updated(
    lab: Lab, daemon: Daemon, write_manifest: Write, log: Path, method: str
) -> None:
    manifest = write_manifest(
        step("kill", "blackout", [str(daemon.kill)], log=log),
        step("start", "blackout", [str(daemon.start)], log=log, timeout="15s"),
    )
    before = daemon.pid
    ended, report = apply(lab, manifest, method)
    assert ended.code == 0, (ended.err, report["reasons"])
    assert daemon.pid not in (None, before)
    assert {guest["state_after"] for guest in report["guests"]} == {"running"}
    assert not log.exists()


@pytest.mark.parametrize("method", METHODS)
def test_libvirtd_killed_before_the_pause(
    lab: Lab, daemon: Daemon, write_manifest: Write, log: Path, method: str
) -> None:
    manifest = write_manifest(
        step("kill", "stage", [str(daemon.kill)], log=log),
        step("one", "blackout", ["true"], log=log),
    )
    ended, report = apply(lab, manifest, method)
    assert ended.code == 40, ended.err
    assert report["undone"][-1] == "kill"
    if method == "stop":  # freezing needs no libvirt, so that its absence shows in the end only
        assert report["blackout_ns"] is None
        assert [word for word, _ in notes(log)] == ["kill"]
    lab.assert_healthy()


def test_libvirtd_that_hangs_in_the_blackout_of_a_freeze(
    lab: Lab, daemon: Daemon, write_manifest: Write, log: Path
) -> None:
    manifest = write_manifest(
        step("prepare", "stage", ["true"], log=log),
        step("hang", "blackout", [str(daemon.hang)], log=log),
    )
    start_ns = time.monotonic_ns()
    ended, report = apply(lab, manifest, "freeze")
    assert ended.code == 40, ended.err
    assert time.monotonic_ns() - start_ns < 60_000_000_000
    assert any("libvirt does not answer" in reason for reason in report["reasons"])
    assert report["blackout_ns"] < 5_000_000_000
    assert_undone_after_the_guests_ran(report, log, "hang", "prepare")
    lab.assert_healthy()


def test_a_uri_that_does_not_answer(lab: Lab, write_manifest: Write, tmp_path: Path) -> None:
    manifest = write_manifest('[[step]]\nname = "x"\nphase = "blackout"\nrun = ["true"]\n')
    config = tmp_path / "hostupdate.toml"
    config.write_text('[deadlines]\nlibvirt = "1s"\n')
    path = tmp_path / "silent"
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(path))
        silent.listen()
        program = lab.run.with_options(
            "--connect", f"qemu:///system?socket={path}", "--config", str(config)
        )
        for arguments in (("apply", str(manifest)), ("guests",)):
            start_ns = time.monotonic_ns()
            ended = program(*arguments)
            assert time.monotonic_ns() - start_ns < 20_000_000_000
            assert (ended.code, ended.out) == (1, "")
            assert "no answer within 1 s" in ended.err
            assert "remedy: " in ended.err
            assert "Traceback" not in ended.err


def test_libvirtd_that_hangs_in_the_blackout_of_a_stop(
    lab: Lab, daemon: Daemon, write_manifest: Write, log: Path
) -> None:
    """Nobody else can reach the guests' monitors: the record stays, `resume` finishes."""
    manifest = write_manifest(
        step("prepare", "stage", ["true"], log=log),
        step("hang", "blackout", [str(daemon.hang)], log=log),
    )
    start_ns = time.monotonic_ns()
    ended, report = apply(lab, manifest, "stop")
    assert ended.code == 50, ended.err
    assert time.monotonic_ns() - start_ns < 60_000_000_000
    for name in lab.names:
        assert any(reason.startswith(f"guest {name}: ") for reason in report["reasons"])
    assert any("hostupdate resume" in reason for reason in report["reasons"])
    assert report["undone"] == ["hang", "prepare"]
    assert lab.run("status", "--json").data["interrupted"] == report["run_id"]
    assert lab.apply(manifest).code == 20
    daemon.ensure()
    resumed = lab.run("resume")
    assert resumed.code == 0, resumed.out + resumed.err
    assert all(name in resumed.out for name in lab.names)
    lab.assert_healthy()


def test_libvirtd_that_hangs_in_the_blackout_of_a_stop_and_is_let_go_by_an_undo(
    lab: Lab, daemon: Daemon, write_manifest: Write
) -> None:
    manifest = write_manifest(
        f'[[step]]\nname = "hang"\nphase = "blackout"\nrun = ["{daemon.hang}"]\n'
        f'undo = ["{daemon.wake}"]\ntimeout = "5s"\n',
    )
    ended, report = apply(lab, manifest, "stop")
    assert ended.code == 40, (ended.err, report["reasons"])
    assert {guest["state_after"] for guest in report["guests"]} == {"running"}


@pytest.fixture
def stuck(lab: Lab) -> Iterator[int]:
    """The QEMU of the last guest, which hears nothing while a step has it stopped."""
    pid = rows(lab)[lab.names[-1]][0]
    yield pid
    os.kill(pid, signal.SIGCONT)


@pytest.fixture
def impatient(tmp_path: Path) -> str:
    config = tmp_path / "hostupdate.toml"
    config.write_text('[pause]\nstop-timeout = "3s"\n')
    return str(config)


def test_a_guest_that_does_not_stop_in_time(
    lab: Lab, write_manifest: Write, stuck: int, impatient: str
) -> None:
    manifest = write_manifest(
        f'[[step]]\nname = "stick"\nphase = "stage"\nrun = ["kill", "-STOP", "{stuck}"]\n'
        f'undo = ["kill", "-CONT", "{stuck}"]\n'
        '[[step]]\nname = "one"\nphase = "blackout"\nrun = ["true"]\ntimeout = "1s"\n'
    )
    ended = lab.apply(manifest, "--pause-method", "stop", "--config", impatient)
    assert ended.code == 40, ended.err
    report = ended.data
    why = (
        f"guest {lab.names[-1]}: it did not stop within 3 s; look for storage that does not answer"
    )
    assert any(reason.startswith(why) for reason in report["reasons"]), report["reasons"]
    assert report["undone"] == ["stick"]
    assert {guest["state_after"] for guest in report["guests"]} == {"running"}


def test_a_guest_that_stops_after_the_run_was_given_up_is_found_again(
    lab: Lab, write_manifest: Write, stuck: int, impatient: str
) -> None:
    manifest = write_manifest(
        f'[[step]]\nname = "stick"\nphase = "stage"\nrun = ["kill", "-STOP", "{stuck}"]\n'
        '[[step]]\nname = "one"\nphase = "blackout"\nrun = ["true"]\ntimeout = "1s"\n'
    )
    ended = lab.apply(manifest, "--pause-method", "stop", "--config", impatient)
    assert ended.code == 50, ended.err
    report = ended.data
    name = lab.names[-1]
    assert (
        f"not known to run: {name}; run `hostupdate resume` once libvirt answers"
        in (report["reasons"])
    )
    assert lab.run("status", "--json").data["interrupted"] == report["run_id"]
    os.kill(stuck, signal.SIGCONT)
    resumed = lab.run("resume")
    assert resumed.code == 0, resumed.out + resumed.err
    lab.assert_healthy()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("away", ["killed", "hanging"])
def test_libvirtd_and_the_orchestrator_both_away(
    lab: Lab, daemon: Daemon, write_manifest: Write, tmp_path: Path, method: str, away: str
) -> None:
    """The keeper thaws; stopped guests are resumed through their own monitors, where nobody holds
    these."""
    for fifo in ("paused", "go"):
        os.mkfifo(tmp_path / fifo)
    script = daemon.kill if away == "killed" else daemon.hang
    wait = f"{script}; echo paused > {tmp_path}/paused; read line < {tmp_path}/go"
    manifest = write_manifest(step("wait", "blackout", ["sh", "-c", wait], timeout="20s"))
    process = lab.run.start("apply", str(manifest), "--pause-method", method)
    await_word(tmp_path / "paused", "paused", process)
    kill(process)
    process.communicate(timeout=30)
    wait_keepers(lab)
    status = lab.run("status", "--json").data
    if (method, away) == ("stop", "hanging"):
        assert status["last"]["exit_code"] == 50
        assert status["interrupted"] == status["last"]["run_id"]
        daemon.ensure()
        resumed = lab.run("resume")
        assert resumed.code == 0, resumed.out + resumed.err
    else:
        assert status["last"]["exit_code"] == 40
        assert status["interrupted"] is None
    lab.assert_healthy()
