"""Running the steps of a manifest: one child process group each, output kept, never waited for
longer than its deadline."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from hostupdate.durations import format_duration
from hostupdate.errors import PrerequisiteError, StepError
from hostupdate.host import processes
from hostupdate.manifest import Step

#: Environment variables that name a process as part of a run.
RUN, STEP = "HOSTUPDATE_RUN", "HOSTUPDATE_STEP"
#: Ending of the files that hold a line for each process, see :class:`Began`.
BEGAN = ".began"
#: How much of a step's output goes into the report; the log file has all of it.
TAIL_BYTES = 4096
#: What a step gets to clean up after SIGTERM, once guests run again.
TERM_GRACE_NS = 2_000_000_000
KILL_GRACE_NS = 2_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """An argv whose program was looked up: nothing is searched for in the blackout."""

    program: str
    argv: tuple[str, ...]


class Began(msgspec.Struct, frozen=True, kw_only=True):
    """The process of a command, written down for whoever has to wait for it: it may have become
    another program since (``nice``, ``env``, a shell's ``exec``). ``started`` in clock ticks."""

    pid: int
    started: int
    step: str
    argv: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedStep:
    """A manifest step with its programs found, its log and the list of its processes open."""

    name: str
    run: Command
    verify: Command | None
    undo: Command | None
    log: Path
    log_fd: int
    began_fd: int
    environment: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """How a step ended. ``exit`` negative: the signal that ended it."""

    exit: int | None
    duration_ns: int
    problem: str = ""


class Steps:
    """The steps of one run. ``close`` ends what still runs and closes the logs."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment
        self._running: list[subprocess.Popen[bytes]] = []
        self._prepared: dict[str, PreparedStep] = {}

    def prepare(self, step: Step, log: Path) -> None:
        """Opens the step's log. PrerequisiteError where one of its programs is missing."""
        run, verify, undo = find_programs(step)
        assert run is not None
        log_fd = open_appended(log)
        try:
            began_fd = open_appended(log.with_suffix(BEGAN))
        except OSError:
            os.close(log_fd)
            raise
        self._prepared[step.name] = PreparedStep(
            name=step.name, run=run, verify=verify, undo=undo, log=log, log_fd=log_fd,
            began_fd=began_fd, environment=self._environment | {STEP: step.name},
        )  # fmt: skip

    def run(self, name: str, deadline_ns: int, wake_fds: Sequence[int]) -> StepResult:
        """Runs the step and its verification until ``deadline_ns`` (monotonic).

        Ends early when one of ``wake_fds`` becomes readable. A step that is late has been sent
        SIGTERM and may still live when this returns: guests come first, :meth:`reap` waits for it.
        Never raises for what the step does; the result's ``problem`` tells.
        """
        step = self._prepared[name]
        start_ns = time.monotonic_ns()
        status, problem = self._wait(step.run, step, deadline_ns, wake_fds)
        if not problem and status != 0:
            problem = _ending(status)
        if not problem and step.verify is not None:
            verified, problem = self._wait(step.verify, step, deadline_ns, wake_fds)
            if not problem and verified != 0:
                problem = f"its verification {step.verify.argv[0]!r} {_ending(verified)}"
        return StepResult(exit=status, duration_ns=time.monotonic_ns() - start_ns, problem=problem)

    def undo(self, name: str, timeout_ns: int) -> bool:
        """Runs the step's undo. False where it has none; StepError where it failed."""
        step = self._prepared[name]
        if step.undo is None:
            return False
        deadline_ns = time.monotonic_ns() + timeout_ns
        status, problem = self._wait(step.undo, step, deadline_ns, ())
        if not problem and status != 0:
            problem = _ending(status)
        if problem:
            raise StepError(name, f"its undo {problem}")
        return True

    def output(self, name: str) -> tuple[str, int, Path]:
        """Tail of what the step printed, how many bytes it printed in all, and its log file."""
        log = self._prepared[name].log
        size = log.stat().st_size
        with open(log, "rb") as file:
            file.seek(max(0, size - TAIL_BYTES))
            return file.read().decode("utf-8", errors="replace"), size, log

    def reap(self) -> None:
        """Waits for steps that were told to end, for a grace; then SIGKILLs what their group still
        holds."""
        for process in self._running:
            _ended_within(process, TERM_GRACE_NS)
            # Its number is not given away before it is waited for: the group is still its own.
            _signal_group(process, signal.SIGKILL)
            _ended_within(process, KILL_GRACE_NS)
        self._running = [process for process in self._running if process.poll() is None]

    def close(self) -> None:
        """Ends what still runs, and closes the logs."""
        for process in self._running:
            _signal_group(process, signal.SIGTERM)
        self.reap()
        for step in self._prepared.values():
            os.close(step.log_fd)
            os.close(step.began_fd)
        self._prepared.clear()

    def _wait(
        self, command: Command, step: PreparedStep, deadline_ns: int, wake_fds: Sequence[int]
    ) -> tuple[int | None, str]:
        started_ns = time.monotonic_ns()
        try:
            process = subprocess.Popen(
                command.argv,
                executable=command.program,
                stdin=subprocess.DEVNULL,
                stdout=step.log_fd,
                stderr=step.log_fd,
                env=step.environment,
                start_new_session=True,
            )
        except OSError as error:
            return None, f"{command.program} cannot be run: {error.strerror}"
        self._running.append(process)
        write_began(step.began_fd, process.pid, step.name, command.argv)
        pidfd = os.pidfd_open(process.pid)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        for fd in wake_fds:
            poll.register(fd, select.POLLIN)
        try:
            left_ms = max(0, deadline_ns - time.monotonic_ns()) / 1e6
            ready = {fd for fd, _ in poll.poll(left_ms)}
        finally:
            os.close(pidfd)
        if pidfd in ready:
            self._running.remove(process)
            return process.wait(), ""
        _signal_group(process, signal.SIGTERM)
        if ready:
            return None, "was cut short"
        took = format_duration(time.monotonic_ns() - started_ns)
        return None, f"did not end within {took}"


def open_appended(path: Path) -> int:
    """A descriptor that only adds to the file, which is root's alone."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def write_began(fd: int, pid: int, step: str, argv: Sequence[str]) -> None:
    """Adds a :class:`Began` of a child that was not waited for yet. Never raises: without it, the
    process is known by its command line as long as it keeps that."""
    with suppress(OSError):
        began = Began(pid=pid, started=processes.started(pid), step=step, argv=tuple(argv))
        os.write(fd, msgspec.json.encode(began) + b"\n")


def find_programs(step: Step) -> tuple[Command, Command | None, Command | None]:
    """The step's run, verify and undo with their programs found in PATH.

    Raises PrerequisiteError, naming the step and the program, where one is missing.
    """

    def find(field: str, argv: tuple[str, ...] | None) -> Command | None:
        if not argv:
            return None
        program = shutil.which(argv[0])
        if program is None:
            raise PrerequisiteError(
                f"step {step.name!r}: {field}: program {argv[0]!r} is not installed",
                remedy="install it, or give its absolute path in the manifest",
            )
        return Command(program=os.path.abspath(program), argv=argv)

    run = find("run", tuple(step.run))
    assert run is not None
    return (
        run,
        find("verify", tuple(step.verify) if step.verify else None),
        find("undo", tuple(step.undo) if step.undo else None),
    )


def program_version(program: str) -> str:
    """First line of what ``program --version`` prints; "unknown" where it prints none in time."""
    try:
        done = subprocess.run([program, "--version"], capture_output=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.decode(errors="replace").partition("\n")[0].strip() or "unknown"


def _ending(status: int | None) -> str:
    if status is None:
        return "did not end"
    return f"ended with exit status {status}" if status >= 0 else f"was ended by signal {-status}"


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _ended_within(process: subprocess.Popen[bytes], timeout_ns: int) -> bool:
    """Waits for the end of the process, and does not reap it."""
    pidfd = os.pidfd_open(process.pid)
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(timeout_ns / 1e6))
    finally:
        os.close(pidfd)
