"""Whatever becomes of the orchestrator, the keeper lets the guests run, and soon."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hostupdate.core.keeper import KeeperRecord, Reason, read_record
from tests.functional.cli import Lab, await_word, end_steps, keepers, kill

Write = Callable[..., Path]

#: What the README promises: all guests run again this long after the orchestrator's death.
PROMISE_NS = 10_000_000
#: Each of so many kills must keep it.
TRIES = 3

HANG = """[[step]]
name = "hang"
phase = "blackout"
run = ["sh", "-c", "echo paused > {fifo}; exec sleep 120"]
"""


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    path = tmp_path / "paused"
    os.mkfifo(path)
    return path


@pytest.fixture
def orchestrator(
    lab: Lab, write_manifest: Write, fifo: Path
) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a run whose blackout hangs, and returns when it does."""
    started: list[subprocess.Popen[str]] = []

    def start(*options: str, budget: str = "20s") -> subprocess.Popen[str]:
        manifest = write_manifest(HANG.format(fifo=fifo), update=f'budget = "{budget}"')
        process = lab.run.start("apply", str(manifest), "--json", "--yes", *options)
        started.append(process)
        await_word(fifo, "paused", process)
        return process

    yield start
    for process in started:
        process.communicate(timeout=60)


def record_of(lab: Lab) -> KeeperRecord:
    """The record of the last run, once its keeper and recovery have ended."""
    status = lab.run("status", "--json").data
    record = read_record(lab.run.state / "runs" / status["last"]["run_id"] / "keeper.log")
    assert record is not None
    return record


def wait_keepers(lab: Lab) -> None:
    """Until the lab's keepers have ended: they do after their recovery command, which waits for
    the step that was running."""
    end_steps(lab)
    await_keepers(lab)


def await_keepers(lab: Lab) -> None:
    """The same, and their recovery may wait for steps."""
    for pid in keepers(lab):
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:  # it ended while we looked
            continue
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        assert poll.poll(60_000), "the keeper did not end"
        os.close(pidfd)


@pytest.mark.parametrize("method", ["freeze", "stop"])
def test_killed_in_the_blackout(
    lab: Lab, orchestrator: Callable[..., subprocess.Popen[str]], method: str
) -> None:
    latest_ns = []
    for _ in range(TRIES):
        process = orchestrator("--pause-method", method)
        killed_ns = kill(process)
        process.wait(timeout=30)
        wait_keepers(lab)
        record = record_of(lab)
        assert [fired.reason for fired in record.fired] == [Reason.ORCHESTRATOR_GONE]
        assert len(record.thaws) == len(lab.names)
        assert {thaw.error for thaw in record.thaws} == {0}
        latest_ns.append(max((thaw.monotonic_ns or 0) - killed_ns for thaw in record.thaws))
    assert min(latest_ns) > 0 and max(latest_ns) < PROMISE_NS, latest_ns
    assert record.recovery is not None and record.recovery.status == 0
    status = lab.run("status", "--json").data
    assert status["interrupted"] is None
    for guest in status["last"]["guests"]:
        assert guest["clock"]["problem"] == ""
        assert abs(guest["clock"]["after_ns"] - guest["clock"]["before_ns"]) < 50_000_000
    assert status["last"]["exit_code"] == 40
    assert {guest["state"] for guest in lab.run("guests", "--json").data["guests"]} == {"running"}
    lab.assert_healthy()


@pytest.mark.parametrize("method", ["freeze", "stop"])
def test_hanging_past_the_deadline(
    lab: Lab, orchestrator: Callable[..., subprocess.Popen[str]], method: str
) -> None:
    process = orchestrator("--pause-method", method, budget="4s")
    kill(process, signal.SIGSTOP)
    process.wait(timeout=30)
    wait_keepers(lab)
    record = record_of(lab)
    assert record.fired[0].reason is Reason.DEADLINE
    deadline_ns = record.armed[-1].deadline_monotonic_ns
    for thaw in record.thaws[: len(lab.names)]:
        assert thaw.monotonic_ns is not None
        assert 0 <= thaw.monotonic_ns - deadline_ns < PROMISE_NS
    assert process.returncode == -signal.SIGKILL, "it had not answered and was not killed"
    assert record.recovery is not None and record.recovery.status == 0
    lab.assert_healthy()


def test_a_step_that_hangs_is_cut_before_the_keeper_has_to_act(
    lab: Lab, orchestrator: Callable[..., subprocess.Popen[str]]
) -> None:
    process = orchestrator(budget="3s")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 40, err
    record = record_of(lab)
    assert not record.fired
    assert '"outcome": "failed"' in out
    assert "did not end within" in out


def test_keeper_and_orchestrator_killed_together_resume_brings_all_back(
    lab: Lab, orchestrator: Callable[..., subprocess.Popen[str]]
) -> None:
    process = orchestrator("--pause-method", "stop")
    for pid in keepers(lab):
        os.kill(pid, signal.SIGKILL)
    kill(process)
    process.wait(timeout=30)
    status = lab.run("status", "--json").data
    assert status["interrupted"] is not None
    refused = lab.run("apply", str(lab.run.state / "none.toml"))
    assert refused.code == 1
    resumed = lab.run("resume")
    assert resumed.code == 0, resumed.out + resumed.err
    again = lab.run("resume")
    assert again.code == 0
    assert "nothing to resume" in again.out
    lab.assert_healthy()


def test_an_interrupted_run_refuses_the_next_one(
    lab: Lab, orchestrator: Callable[..., subprocess.Popen[str]], write_manifest: Write
) -> None:
    process = orchestrator()
    for pid in keepers(lab):
        os.kill(pid, signal.SIGKILL)
    kill(process)
    process.wait(timeout=30)
    manifest = write_manifest(
        '[[step]]\nname = "x"\nphase = "blackout"\nrun = ["true"]\ntimeout = "1s"\n'
    )
    refused = lab.apply(manifest)
    assert refused.code == 20
    assert refused.data["outcome"] == "refused"
    assert "hostupdate resume" in refused.err
    assert lab.run("resume").code == 0
    assert lab.apply(manifest).code == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_blackout_and_undoes(
    lab: Lab, orchestrator: Callable[..., subprocess.Popen[str]], number: signal.Signals
) -> None:
    process = orchestrator()
    kill(process, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 40, err
    assert f"stopped by {number.name}" in out
    lab.assert_healthy()


def test_recovery_needs_nothing_of_the_configuration(
    lab: Lab,
    orchestrator: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    config = Path("hostupdate.toml")
    config.write_text('[pause]\nmethod = "stop"\n')
    process = orchestrator("--config", str(config))
    config.write_text("the update broke it")
    kill(process)
    process.wait(timeout=30)
    wait_keepers(lab)
    record = record_of(lab)
    assert record.recovery is not None and record.recovery.status == 0
    assert {guest["state"] for guest in lab.run("guests", "--json").data["guests"]} == {"running"}
