"""Guests' clocks after a pause, on real guests, with agents that were made to misbehave.

The consoles are the witness: a tick's real time, against the host's when it is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hostupdate.core import clock
from tests.functional.cli import Ended, Lab
from tests.functional.owner import HEALED, act
from tests.functional.witness import lag_ns

Write = Callable[..., Path]

MS = 1_000_000
SECOND = 1_000_000_000
TOLERANCE_NS = MS
#: How far the witness may be off: ticks are seen some ms late, more on a busy machine.
WITNESS_NS = 40 * MS

PAUSE = '[[step]]\nname = "pause"\nphase = "blackout"\nrun = ["sleep", "{0}"]\ntimeout = "9s"\n'

BUSYBOX = "/bin/busybox"
AGENT = "/usr/sbin/qemu-ga"
HEAL_S = 10


def spoil(do: str, undo: str) -> str:
    """A script that spoils something for a while, once it has been answered. It heals by itself:
    a guest whose agent is silent cannot be told to."""
    heal = f"{BUSYBOX} sleep {HEAL_S}\n" if "while" not in do else ""
    return f"""{BUSYBOX} rm -f {HEALED}; p=$({BUSYBOX} pidof qemu-ga)
({BUSYBOX} sleep 0.3\n{do}\n{heal}{undo}\n: > {HEALED}) &"""


def instead(program: str) -> str:
    """Runs a program instead of the agent for a while."""
    return spoil(
        f"""{BUSYBOX} mv {AGENT} {AGENT}-real
printf '#!/bin/sh\\nexec {program}\\n' > {AGENT}; {BUSYBOX} chmod 755 {AGENT}; kill $p""",
        f"{BUSYBOX} mv {AGENT}-real {AGENT}; kill $({BUSYBOX} pidof qemu-ga-real)",
    )


HANGS = spoil("kill -STOP $p", "kill -CONT $p")
LATE = spoil(
    f"""i=0; while [ $i -lt {HEAL_S} ]; do kill -STOP $p; {BUSYBOX} sleep 0.7
kill -CONT $p; {BUSYBOX} sleep 0.3; i=$((i + 1)); done""",
    ":",
)
NO_HWCLOCK = spoil(f"{BUSYBOX} rm /sbin/hwclock", f"{BUSYBOX} ln -s {BUSYBOX} /sbin/hwclock")
DEAD = instead(f"{BUSYBOX} sleep {HEAL_S}")
REFUSES = instead(f'{AGENT}-real -b guest-set-time "$@"')


@pytest.fixture
def pause(
    lab: Lab, write_manifest: Write, tmp_path: Path
) -> Callable[..., tuple[Ended, dict[str, Any]]]:
    """Applies an update that does nothing for a while; the call's end and clocks by guest."""

    def apply(
        seconds: float = 1, *, method: str = "stop", clock: str = "", trust: str = "true"
    ) -> tuple[Ended, dict[str, Any]]:
        config = tmp_path / "hostupdate.toml"
        # The machine that tests run on may not be synchronised; no test asks what time it is.
        config.write_text(f"[clock]\ntrust-host = {trust}\n{clock}")
        manifest = write_manifest(PAUSE.format(seconds))
        ended = lab.apply(manifest, "--pause-method", method, "--config", str(config))
        return ended, {guest["name"]: guest["clock"] for guest in ended.data["guests"]}

    return apply


Pause = Callable[..., tuple[Ended, dict[str, Any]]]


@contextmanager
def spoilt(lab: Lab, script: str) -> Iterator[tuple[str, str]]:
    """The first guest's agent spoilt, the second's good; waits for the healing."""
    bad, good = lab.names
    act(lab.run.state, "shell", bad, script)
    act(lab.run.state, "ping", good)  # takes as long as the spoiling
    yield bad, good
    act(lab.run.state, "healed", bad)
    act(lab.run.state, "shift", bad, "0")


def assert_right(seen: dict[str, Any], target_ns: int = 0) -> None:
    assert seen["problem"] == ""
    off_ns = abs(seen["after_ns"] - target_ns)
    assert off_ns <= seen["uncertainty_ns"] + TOLERANCE_NS, seen


def test_ten_pauses_in_a_row_and_the_consoles_agree(lab: Lab, pause: Pause) -> None:
    pause(0.1)  # whatever was before: now they are right
    before_ns = {name: lag_ns(lab.console(name)) for name in lab.names}
    for _ in range(10):
        ended, clocks = pause(0.5)
        assert ended.code == 0, ended.err
        for seen in clocks.values():
            assert_right(seen)
            assert seen["method"] == "guest-set-time"
            assert seen["resumed_ns"] < seen["before_ns"] - 400 * MS, "the pause did not show"
    for name in lab.names:
        moved_ns = lag_ns(lab.console(name)) - before_ns[name]
        assert abs(moved_ns) < WITNESS_NS, f"{name}: the console tells another time"


def test_a_freeze_leaves_the_clock_alone(lab: Lab, pause: Pause) -> None:
    pause(0.1)
    before_ns = {name: lag_ns(lab.console(name)) for name in lab.names}
    ended, clocks = pause(2, method="freeze")
    assert ended.code == 0, ended.err
    for name, seen in clocks.items():
        assert_right(seen)
        assert abs(seen["resumed_ns"] - seen["before_ns"]) < WITNESS_NS
        assert abs(lag_ns(lab.console(name)) - before_ns[name]) < WITNESS_NS


def test_a_clock_a_day_wrong_before_the_pause(lab: Lab, pause: Pause) -> None:
    day_ns = 86_400 * SECOND
    wrong = lab.names[0]
    act(lab.run.state, "shift", wrong, str(-day_ns))
    ended, clocks = pause(clock='correct = "ours"')
    assert ended.code == 0, ended.err
    assert abs(clocks[wrong]["after_ns"] + day_ns) < SECOND, "its own skew was taken from it"
    assert_right(clocks[wrong], clocks[wrong]["before_ns"])
    ended, clocks = pause()
    assert ended.code == 0, ended.err
    assert_right(clocks[wrong])
    (guest,) = [guest for guest in ended.data["guests"] if guest["name"] == wrong]
    assert any("-24 h off before the pause" in note for note in guest["notes"])
    assert abs(lag_ns(lab.console(wrong))) < SECOND


def test_switched_off_it_is_only_measured(lab: Lab, pause: Pause) -> None:
    ended, clocks = pause(clock='correct = "off"')
    assert ended.code == 0, ended.err
    for seen in clocks.values():
        assert seen["after_ns"] == seen["resumed_ns"] < -SECOND
        assert seen["method"] is None
    pause(0.1)


def test_a_host_that_nobody_synchronises_sets_no_guest(lab: Lab, pause: Pause) -> None:
    if clock.synchronised():
        pytest.skip("this host's clock is synchronised")
    ahead = lab.names[0]
    act(lab.run.state, "shift", ahead, str(5 * SECOND))
    ended, clocks = pause(trust="false")
    assert ended.code == 0, ended.err
    assert any("nothing synchronises the host's clock" in r for r in ended.data["reasons"])
    assert_right(clocks[ahead], clocks[ahead]["before_ns"])
    assert clocks[ahead]["after_ns"] > 4 * SECOND
    pause(0.1)


@pytest.mark.parametrize("script", [HANGS, DEAD], ids=["hangs", "dead"])
def test_a_silent_agent_is_reported_and_hangs_nothing(lab: Lab, pause: Pause, script: str) -> None:
    with spoilt(lab, script) as (bad, good):
        ended, clocks = pause(clock="require = true")
    assert ended.code == 30, ended.err
    assert_right(clocks[good])
    assert "does not answer" in clocks[bad]["problem"]
    assert clocks[bad]["after_ns"] is None
    assert any(f"guest {bad}: its clock is not verified" in r for r in ended.data["reasons"])
    phase = ended.data["phases"][-1]
    assert phase["end_ns"] - phase["start_ns"] < 10 * SECOND


def test_an_agent_that_answers_late_is_known_less_well(lab: Lab, pause: Pause) -> None:
    with spoilt(lab, LATE) as (bad, good):
        ended, clocks = pause()
    assert ended.code == 0, ended.err
    assert_right(clocks[good])
    assert_right(clocks[bad])


def test_hwclock_that_fails_is_no_failure(lab: Lab, pause: Pause) -> None:
    with spoilt(lab, NO_HWCLOCK) as (bad, _):
        ended, clocks = pause()
    assert ended.code == 0, ended.data["reasons"]
    assert_right(clocks[bad])
    (guest,) = [guest for guest in ended.data["guests"] if guest["name"] == bad]
    assert any("guest-set-time: " in note for note in guest["notes"])


@pytest.mark.parametrize("allowed", [True, False])
def test_an_agent_that_refuses_to_set_the_time(lab: Lab, pause: Pause, allowed: bool) -> None:
    with spoilt(lab, REFUSES) as (bad, good):
        # A program takes longer to start, on a busy machine with great differences.
        settings = f'guest-exec = {str(allowed).lower()}\ntolerance = "40ms"'
        ended, clocks = pause(clock=settings)
    assert clocks[good]["problem"] == ""
    if allowed:
        assert ended.code == 0, ended.err
        assert clocks[bad]["problem"] == ""
        assert abs(clocks[bad]["after_ns"]) <= 40 * MS + clocks[bad]["uncertainty_ns"]
        assert clocks[bad]["method"] == "guest-exec"
    else:
        assert ended.code == 30, ended.err
        assert clocks[bad]["method"] == "none"
        assert clocks[bad]["after_ns"] < -SECOND
        assert any(f"guest {bad}: its clock is wrong" in r for r in ended.data["reasons"])


def test_doctor_and_plan_look_at_clocks_and_watchdogs(lab: Lab, write_manifest: Write) -> None:
    findings = {f["name"]: f for f in lab.run("doctor", "--json").data["findings"]}
    assert findings["host clock"]["grade"] in ("ok", "poor")
    found = [findings[f"guest {name}"]["found"] for name in lab.names]
    assert all(text.startswith("its clock is") for text in found)
    long = PAUSE.format(1).replace("9s", "25s")
    plan = lab.apply(write_manifest(long), "--pause-method", "stop", "--dry-run").data
    # Under KVM a lab guest has a pvclock, under emulation it has none: both know it.
    without = [name for name, text in zip(lab.names, found, strict=True) if "pvclock" in text]
    warned = [text.split()[1] for text in plan["warnings"] if "pvclock" in text]
    assert warned == without
