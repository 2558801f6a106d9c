"""Steps as real small processes: how they end, how they are ended, what they said."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hostupdate.errors import PrerequisiteError, StepError
from hostupdate.host import steps as module
from hostupdate.host.steps import TAIL_BYTES, Steps, find_programs
from hostupdate.manifest import Step
from hostupdate.model import Phase

SECOND = 1_000_000_000


def make(name: str = "s", *argv: str, **more: tuple[str, ...]) -> Step:
    return Step(name=name, phase=Phase.BLACKOUT, run=argv or ("true",), **more)  # type: ignore[arg-type]


def sh(text: str) -> tuple[str, ...]:
    return ("sh", "-c", text)


@pytest.fixture
def steps() -> Iterator[Steps]:
    made = Steps({"PATH": os.environ["PATH"], "HOSTUPDATE_RUN": "r1"})
    yield made
    made.close()


@pytest.fixture
def prepare(steps: Steps, tmp_path: Path) -> Callable[..., Path]:
    """Prepares a step and returns its log."""

    def prepare(*argv: str, name: str = "s", **more: tuple[str, ...]) -> Path:
        log = tmp_path / f"{name}.log"
        steps.prepare(make(name, *argv, **more), log)
        return log

    return prepare


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No long graces: those who ignore SIGTERM are not waited for."""
    monkeypatch.setattr(module, "TERM_GRACE_NS", SECOND // 5)


def soon(seconds: float = 20) -> int:
    return time.monotonic_ns() + int(seconds * SECOND)


def gone(pid: int, timeout_s: float = 20) -> bool:
    """True once no such process is left, or only its zombie."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))
    finally:
        os.close(pidfd)


# ---- how a step ends


def test_a_step_that_works(steps: Steps, prepare: Callable[..., Path]) -> None:
    prepare("true")
    before_ns = time.monotonic_ns()
    result = steps.run("s", soon(), ())
    assert (result.exit, result.problem) == (0, "")
    assert 0 < result.duration_ns <= time.monotonic_ns() - before_ns


def test_a_step_that_fails_tells_its_status(steps: Steps, prepare: Callable[..., Path]) -> None:
    prepare(*sh("exit 3"))
    result = steps.run("s", soon(), ())
    assert (result.exit, result.problem) == (3, "ended with exit status 3")


def test_a_step_that_is_killed_tells_the_signal(steps: Steps, prepare: Callable[..., Path]) -> None:
    prepare(*sh("kill -9 $$"))
    result = steps.run("s", soon(), ())
    assert (result.exit, result.problem) == (-9, "was ended by signal 9")


def test_a_program_that_vanished_since_it_was_found(
    steps: Steps, prepare: Callable[..., Path], tmp_path: Path
) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    prepare(str(program))
    program.unlink()
    result = steps.run("s", soon(), ())
    assert result.exit is None
    assert result.problem == f"{program} cannot be run: No such file or directory"


def test_a_verification_decides(steps: Steps, prepare: Callable[..., Path]) -> None:
    prepare("true", name="good", verify=("true",))
    prepare("true", name="bad", verify=("false",))
    prepare("false", name="unverified", verify=sh("echo verified"))
    assert steps.run("good", soon(), ()).problem == ""
    bad = steps.run("bad", soon(), ())
    assert (bad.exit, bad.problem) == (0, "its verification 'false' ended with exit status 1")
    assert steps.run("unverified", soon(), ()).problem == "ended with exit status 1"
    assert "verified" not in steps.output("unverified")[0]


# ---- how it is ended


@pytest.mark.parametrize("argv", [("sleep", "300"), sh("sleep 300")])
def test_a_step_that_hangs_is_left_at_its_deadline(
    steps: Steps, prepare: Callable[..., Path], argv: tuple[str, ...]
) -> None:
    prepare(*argv)
    before_ns = time.monotonic_ns()
    result = steps.run("s", soon(0.1), ())
    took_ns = time.monotonic_ns() - before_ns
    assert result.exit is None
    assert result.problem.startswith("did not end within 1")
    assert SECOND // 10 <= took_ns < 10 * SECOND


def test_a_deadline_that_has_passed_starts_nothing_that_lasts(
    steps: Steps, prepare: Callable[..., Path], tmp_path: Path
) -> None:
    prepare(*sh(f"sleep 300; touch {tmp_path}/done"))
    result = steps.run("s", time.monotonic_ns() - 1, ())
    assert result.problem.startswith("did not end within")
    steps.reap()
    assert not (tmp_path / "done").exists()


def test_a_verification_that_hangs_is_left_too(steps: Steps, prepare: Callable[..., Path]) -> None:
    prepare("true", verify=("sleep", "300"))
    result = steps.run("s", soon(0.1), ())
    assert result.exit == 0
    assert result.problem.startswith("did not end within")


def test_a_wake_descriptor_cuts_a_step_short(steps: Steps, prepare: Callable[..., Path]) -> None:
    prepare("sleep", "300")
    reader, writer = os.pipe()
    os.write(writer, b"!")
    before_ns = time.monotonic_ns()
    result = steps.run("s", soon(200), (reader,))
    assert (result.exit, result.problem) == (None, "was cut short")
    assert time.monotonic_ns() - before_ns < 100 * SECOND
    os.close(reader)
    os.close(writer)


def test_a_silent_wake_descriptor_changes_nothing(
    steps: Steps, prepare: Callable[..., Path]
) -> None:
    prepare("true")
    reader, writer = os.pipe()
    assert steps.run("s", soon(), (reader,)).problem == ""
    os.close(reader)
    os.close(writer)


def test_the_whole_process_group_is_told_to_end(
    steps: Steps, prepare: Callable[..., Path], tmp_path: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    prepare(*sh(f"sleep 300 & echo $! > {fifo}; wait"))
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    steps.run("s", soon(1), ())
    child = int(os.read(reader, 100))
    os.close(reader)
    steps.reap()
    assert gone(child)


@pytest.mark.usefixtures("quick")
def test_whoever_ignores_sigterm_is_killed_after_a_grace(
    steps: Steps, prepare: Callable[..., Path], tmp_path: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    prepare(*sh(f"trap '' TERM; echo $$ > {fifo}; while :; do sleep 300; done"))
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    steps.run("s", soon(1), ())
    shell = int(os.read(reader, 100))
    os.close(reader)
    steps.reap()
    assert gone(shell)


@pytest.mark.usefixtures("quick")
def test_a_child_that_ignores_sigterm_does_not_outlive_its_step(
    steps: Steps, prepare: Callable[..., Path], tmp_path: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    child = f"trap '' TERM; echo $$ > {fifo}; while :; do sleep 300; done"
    prepare(*sh(f'sh -c "{child.replace("$", chr(92) + "$")}" & wait'))
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    steps.run("s", soon(1), ())
    pid = int(os.read(reader, 100))
    os.close(reader)
    steps.reap()
    assert gone(pid), "the step's leader ended by SIGTERM, its child did not"


def test_a_step_that_cleans_up_on_sigterm_is_given_the_time(
    steps: Steps, prepare: Callable[..., Path], tmp_path: Path
) -> None:
    prepare(*sh(f"trap 'touch {tmp_path}/clean; exit 0' TERM; sleep 300 & wait"))
    steps.run("s", soon(1), ())
    steps.reap()
    assert (tmp_path / "clean").exists()


def test_what_a_step_that_worked_left_running_goes_on(
    steps: Steps, prepare: Callable[..., Path], tmp_path: Path
) -> None:
    """A step may start a daemon."""
    prepare(*sh(f"sleep 300 & echo $! > {tmp_path}/pid"))
    assert steps.run("s", soon(), ()).problem == ""
    steps.reap()
    steps.close()
    pid = int((tmp_path / "pid").read_text())
    os.kill(pid, 0)
    os.kill(pid, signal.SIGKILL)


def test_closing_ends_what_still_runs(steps: Steps, prepare: Callable[..., Path]) -> None:
    prepare("sleep", "300")
    steps.run("s", soon(0.1), ())
    steps.close()
    assert not steps._running


# ---- undo


def test_an_undo_runs_and_says_whether_there_was_one(
    steps: Steps, prepare: Callable[..., Path], tmp_path: Path
) -> None:
    prepare("true", name="with", undo=("touch", f"{tmp_path}/undone"))
    prepare("true", name="without")
    assert steps.undo("with", 20 * SECOND) is True
    assert (tmp_path / "undone").exists()
    assert steps.undo("without", 20 * SECOND) is False


@pytest.mark.parametrize(
    ("undo", "words"),
    [
        (sh("exit 4"), "its undo ended with exit status 4"),
        (("sleep", "300"), "its undo did not end within 1"),
    ],
)
def test_an_undo_that_fails_is_an_error(
    steps: Steps, prepare: Callable[..., Path], undo: tuple[str, ...], words: str
) -> None:
    prepare("true", undo=undo)
    with pytest.raises(StepError, match=words) as error:
        steps.undo("s", SECOND // 10)
    assert error.value.step == "s"


# ---- what it said


def test_both_outputs_are_kept_in_their_order(steps: Steps, prepare: Callable[..., Path]) -> None:
    log = prepare(*sh("echo one; echo two >&2; echo three"), undo=sh("echo undone"))
    steps.run("s", soon(), ())
    text = "one\ntwo\nthree\n"
    assert steps.output("s") == (text, len(text), log)
    steps.undo("s", 20 * SECOND)
    assert steps.output("s")[0] == text + "undone\n"


@pytest.mark.parametrize("status", [0, 1])
def test_a_megabyte_of_output_neither_blocks_nor_fills_the_report(
    steps: Steps, prepare: Callable[..., Path], status: int
) -> None:
    log = prepare(*sh(f"head -c 1048576 /dev/zero | tr '\\0' x; echo the end; exit {status}"))
    assert steps.run("s", soon(), ()).exit == status
    tail, size, _ = steps.output("s")
    assert size == log.stat().st_size == 1048576 + len("the end\n")
    assert len(tail) == TAIL_BYTES
    assert tail.endswith("xxx" + "the end\n")


def test_output_that_is_no_text_can_be_shown(steps: Steps, prepare: Callable[..., Path]) -> None:
    prepare(*sh(r"printf '\377\376ok'"))
    steps.run("s", soon(), ())
    assert steps.output("s")[0].endswith("ok")


def test_a_step_reads_nothing_and_knows_its_run(steps: Steps, prepare: Callable[..., Path]) -> None:
    prepare(*sh('cat; echo "run $HOSTUPDATE_RUN"'))
    assert steps.run("s", soon(), ()).problem == ""
    assert steps.output("s")[0] == "run r1\n"


def test_a_step_gets_none_of_our_descriptors(steps: Steps, prepare: Callable[..., Path]) -> None:
    reader, writer = os.pipe()
    prepare("ls", "/proc/self/fd")
    steps.run("s", soon(), ())
    # 0, 1, 2 and the one by which ls reads the directory.
    assert steps.output("s")[0].split() == ["0", "1", "2", "3"]
    os.close(reader)
    os.close(writer)


# ---- programs


@pytest.mark.parametrize("field", ["run", "verify", "undo"])
def test_a_missing_program_is_named_with_its_step_and_field(field: str) -> None:
    fields = {field: ("no-such-program-here", "--now")}
    step = Step(name="one", phase=Phase.STAGE, **({"run": ("true",)} | fields))  # type: ignore[arg-type]
    with pytest.raises(PrerequisiteError) as error:
        find_programs(step)
    assert str(error.value) == (
        f"step 'one': {field}: program 'no-such-program-here' is not installed"
    )
    assert "absolute path" in error.value.remedy


def test_programs_are_found_before_the_blackout_and_names_are_kept() -> None:
    run, verify, undo = find_programs(make("s", "sh", "-c", "true", undo=("true",)))
    assert run is not None and os.path.isabs(run.program) and run.argv[0] == "sh"
    assert verify is None
    assert undo is not None and undo.argv == ("true",)


def test_a_file_that_cannot_be_executed_is_no_program(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("x")
    with pytest.raises(PrerequisiteError, match="not installed"):
        find_programs(make("s", str(tmp_path / "data")))
