"""Steps and guests that fail: guests run first, then undos in reverse, and the report says why."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.functional.cli import Ended, Lab, Program, pids_naming
from tests.functional.conftest import assert_nothing_left, make_cache
from tests.requirements import need

Write = Callable[..., Path]
MEGABYTE = 1 << 20
FLOOD = f"head -c {MEGABYTE} /dev/zero | tr '\\0' x; echo the end"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def note(log: Path, word: str) -> list[str]:
    """A command that writes a word and the time (CLOCK_MONOTONIC) to the log."""
    code = "import sys,time;open(sys.argv[1],'a').write(f'{sys.argv[2]} {time.monotonic_ns()}\\n')"
    return [sys.executable, "-SIc", code, str(log), word]


def notes(log: Path) -> list[tuple[str, int]]:
    if not log.exists():
        return []
    found = [line.split() for line in log.read_text().splitlines()]
    return [(word, int(ns)) for word, ns in found]


def step(
    name: str,
    phase: str,
    run: list[str],
    *,
    log: Path | None = None,
    timeout: str = "5s",
    verify: list[str] | None = None,
) -> str:
    """A step; with a log it has an undo that leaves a note there."""
    lines = ["[[step]]", f'name = "{name}"', f'phase = "{phase}"', f"run = {json.dumps(run)}"]
    lines.append(f'timeout = "{timeout}"')
    if log is not None:
        lines.append(f"undo = {json.dumps(note(log, name))}")
    if verify is not None:
        lines.append(f"verify = {json.dumps(verify)}")
    return "\n".join(lines) + "\n"


def sh(text: str) -> list[str]:
    return ["sh", "-c", text]


def reported(report: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [entry for entry in report["steps"] if entry["name"] == name]
    return dict(found)


def assert_undone_after_the_guests_ran(report: dict[str, Any], log: Path, *names: str) -> None:
    undone = notes(log)
    assert [word for word, _ in undone] == list(names)
    assert report["undone"] == list(names)
    for guest in report["guests"]:
        assert guest["resumed_monotonic_ns"] < undone[0][1]


# ---- steps

BAD: dict[str, tuple[dict[str, Any], int | None, str]] = {
    "fails": ({"run": sh("echo why >&2; exit 3")}, 3, "ended with exit status 3"),
    "hangs": ({"run": sh("echo why; exec sleep 300"), "timeout": "500ms"}, None, "did not end wit"),
    "is killed": ({"run": sh("echo why; kill -9 $$")}, -9, "was ended by signal 9"),
    "prints a megabyte and fails": ({"run": sh(f"{FLOOD}; exit 1")}, 1, "ended with exit status 1"),
    "does not verify": (
        {"run": sh("echo why"), "verify": ["false"]}, 0, "its verification 'false' ended",
    ),
    "hangs in its verification": (
        {"run": sh("echo why"), "verify": ["sleep", "300"], "timeout": "500ms"}, 0, "did not end",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("what", "method"),
    [*((what, "freeze") for what in BAD), ("fails", "stop"), ("hangs", "stop")],
)
def test_a_blackout_step_that_fails(
    lab: Lab, write_manifest: Write, log: Path, what: str, method: str
) -> None:
    fields, status, words = BAD[what]
    manifest = write_manifest(
        step("fetch", "stage", ["true"], log=log),
        step("first", "blackout", ["true"], log=log),
        step("bad", "blackout", log=log, **fields),
        step("never", "blackout", ["true"], log=log),
        step("tidy", "finish", ["true"], log=log),
    )
    ended = lab.apply(manifest, "--pause-method", method)
    report = ended.data
    assert (ended.code, report["exit_code"], report["outcome"]) == (40, 40, "failed"), ended.err
    bad = reported(report, "bad")
    assert bad["exit"] == status
    assert bad["problem"].startswith(words)
    assert any(reason.startswith(f"step 'bad': {words}") for reason in report["reasons"])
    assert bad["output"].rstrip().endswith(("why", "the end"))
    assert Path(bad["log"]).stat().st_size == bad["output_bytes"]
    assert_undone_after_the_guests_ran(report, log, "bad", "first", "fetch")
    assert [entry["name"] for entry in report["steps"]] == ["fetch", "first", "bad"]
    assert [entry["undone"] for entry in report["steps"]] == [True] * 3
    for guest in report["guests"]:
        assert guest["state_after"] == "running"
        assert 0 < guest["blackout_ns"] <= report["blackout_ns"] < report["budget_ns"]


def test_a_megabyte_of_output_is_kept_and_its_tail_is_in_the_report(
    lab: Lab, write_manifest: Write
) -> None:
    ended = lab.apply(write_manifest(step("flood", "blackout", sh(FLOOD))))
    assert ended.code == 0, ended.err
    flood = reported(ended.data, "flood")
    assert (flood["exit"], flood["problem"]) == (0, "")
    assert flood["output_bytes"] == MEGABYTE + len("the end\n")
    assert flood["output"].endswith("xxxthe end\n")
    assert len(flood["output"]) < 10_000
    assert Path(flood["log"]).stat().st_size == flood["output_bytes"]
    assert len(ended.out) < 100_000


def test_an_undo_that_fails_keeps_no_other_from_running(
    lab: Lab, write_manifest: Write, log: Path
) -> None:
    undo = f"undo = {json.dumps(sh('echo no luck; exit 4'))}\n"
    manifest = write_manifest(
        step("first", "blackout", ["true"], log=log),
        step("second", "blackout", ["true"]) + undo,
        step("bad", "blackout", ["false"], log=log),
    )
    ended = lab.apply(manifest)
    report = ended.data
    assert ended.code == 40, ended.err
    assert [word for word, _ in notes(log)] == ["bad", "first"]
    assert reported(report, "second")["undone"] is False
    assert "no luck" in reported(report, "second")["output"]
    assert any(
        reason.startswith("undo of \"run 'second'\"") and "exit status 4" in reason
        for reason in report["reasons"]
    )


def test_a_stage_step_that_fails_pauses_nobody(lab: Lab, write_manifest: Write, log: Path) -> None:
    manifest = write_manifest(
        step("first", "stage", ["true"], log=log),
        step("bad", "stage", ["false"], log=log),
        step("never", "blackout", ["true"], log=log),
    )
    ended = lab.apply(manifest)
    report = ended.data
    assert ended.code == 40, ended.err
    assert report["blackout_ns"] is None
    assert {guest["blackout_ns"] for guest in report["guests"]} == {None}
    assert {guest["paused_monotonic_ns"] for guest in report["guests"]} == {None}
    assert [word for word, _ in notes(log)] == ["bad", "first"]
    assert [phase["name"] for phase in report["phases"]] == ["stage"]


def test_a_finish_step_that_fails_degrades_and_undoes_nothing(
    lab: Lab, write_manifest: Write, log: Path
) -> None:
    manifest = write_manifest(
        step("one", "blackout", ["true"], log=log),
        step("bad", "finish", sh("echo why; exit 7"), log=log),
        step("never", "finish", ["touch", str(log.with_name("never"))]),
    )
    ended = lab.apply(manifest)
    report = ended.data
    assert (ended.code, report["outcome"]) == (30, "degraded"), ended.err
    assert notes(log) == []
    assert report["undone"] == []
    assert any("step 'bad': ended with exit status 7" in reason for reason in report["reasons"])
    assert {guest["state_after"] for guest in report["guests"]} == {"running"}


def test_a_failure_is_shown_to_people_with_what_the_step_said(
    lab: Lab, write_manifest: Write, log: Path
) -> None:
    manifest = write_manifest(step("bad", "blackout", sh("echo no such bridge; exit 1"), log=log))
    ended = lab.run("apply", str(manifest))
    assert ended.code == 40
    assert "no such bridge" in ended.out
    assert "step 'bad': ended with exit status 1" in ended.out
    assert "undone run 'bad'" in ended.err


# ---- guests, in a lab of their own: they are killed here


@pytest.fixture(scope="module")
def doomed_state() -> Iterator[Path]:
    need("root", "qemu", "lab", "cgroup2")
    path = Path(tempfile.mkdtemp(prefix="hu-f-", dir="/var/tmp"))
    make_cache(path)
    yield path
    Program(path)("lab", "down")
    assert not pids_naming(str(path))
    shutil.rmtree(path)


@pytest.fixture
def doomed(doomed_state: Path) -> Iterator[Lab]:
    """Two guests, whatever became of those of the test before."""
    program = Program(doomed_state)
    ended = program("lab", "up", "--guests", "2", "--memory", "160M", "--json")
    assert ended.code == 0, ended.err
    names = tuple(guest["name"] for guest in ended.data["guests"])
    made = Lab(program.with_options("--connect", "lab"), names)
    yield made
    assert_nothing_left(made)


def pid_of(lab: Lab, name: str) -> int:
    rows = {row["name"]: row["pid"] for row in lab.run("guests", "--json").data["guests"]}
    return int(rows[name])


def assert_lost(lab: Lab, ended: Ended, lost: str) -> dict[str, Any]:
    """The run tells which guest needs a human; the others run; nothing is left to resume."""
    report: dict[str, Any] = ended.data
    assert (ended.code, report["outcome"]) == (50, "failed"), ended.err
    assert any(
        reason.startswith(f"guest {lost}: ") and "is gone" in reason for reason in report["reasons"]
    )
    others = Lab(lab.run, tuple(name for name in lab.names if name != lost))
    for name in others.names:
        assert not any(reason.startswith(f"guest {name}") for reason in report["reasons"])
    others.assert_healthy()
    assert lab.run("status", "--json").data["interrupted"] is None
    return report


@pytest.mark.parametrize("method", ["freeze", "stop"])
@pytest.mark.parametrize("last", [False, True])
def test_a_guest_killed_in_the_blackout(
    doomed: Lab, write_manifest: Write, log: Path, method: str, last: bool
) -> None:
    name = doomed.names[-1 if last else 0]
    pid = pid_of(doomed, name)
    manifest = write_manifest(
        step("first", "blackout", ["true"], log=log),
        step("kill", "blackout", ["kill", f"-{int(signal.SIGKILL)}", str(pid)], log=log),
    )
    ended = doomed.apply(manifest, "--pause-method", method)
    report = assert_lost(doomed, ended, name)
    assert [word for word, _ in notes(log)] == ["kill", "first"]
    assert report["undone"] == ["kill", "first"]
    guests = {guest["name"]: guest for guest in report["guests"]}
    assert guests[name]["state_after"] in ("shutoff", "crashed", "gone", "unknown")
    (other,) = (guest for guest in report["guests"] if guest["name"] != name)
    assert other["state_after"] == "running"
    assert other["resumed_monotonic_ns"] < notes(log)[0][1]


def test_a_guest_that_vanishes_between_plan_and_pause(
    doomed: Lab, write_manifest: Write, log: Path
) -> None:
    name = doomed.names[0]
    pid = pid_of(doomed, name)
    manifest = write_manifest(
        step("kill", "stage", ["kill", f"-{int(signal.SIGKILL)}", str(pid)], log=log),
        step("one", "blackout", ["true"], log=log),
    )
    report = assert_lost(doomed, doomed.apply(manifest), name)
    assert report["blackout_ns"] is None, "the other guest was paused"
    assert [word for word, _ in notes(log)] == ["kill"]
