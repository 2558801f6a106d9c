"""The hand that measures and sets guests' clocks, with agents of every temper. No time passes."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from hostupdate import clocks as module
from hostupdate.clocks import AGAIN_NS, PATIENCE_NS, Clocks
from hostupdate.config import Clock as ClockConfig
from hostupdate.durations import MILLISECOND, SECOND
from hostupdate.errors import AgentError, DeadlineError, HypervisorError
from hostupdate.model import AgentAnswer
from hostupdate.skew import Corrected, Skew, Way, Wish

OFFSET_NS = 1_700_000_000 * SECOND
LIBRARY = ("guest-get-time", "guest-set-time", "guest-info")
FILES = ("guest-file-open", "guest-file-read", "guest-file-close")
EXEC = ("guest-exec", "guest-exec-status")


class FakeTime:
    """A clock that only moves when somebody sleeps."""

    def __init__(self) -> None:
        self.now_ns = 5 * SECOND

    def monotonic_ns(self) -> int:
        return self.now_ns

    def sleep(self, seconds: float) -> None:
        self.now_ns += round(seconds * SECOND)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    made = FakeTime()
    monkeypatch.setattr(module, "time", made)
    return made


@dataclass
class Guest:
    """One guest and its agent, on whose faults the fields decide."""

    clock: FakeTime
    ahead_ns: int = 0
    there_ns: int = 600_000  #: from the sending to the reading or setting of the clock
    back_ns: int = 600_000
    commands: tuple[str, ...] = LIBRARY
    missing: bool = False
    unconnected_until_ns: int = 0
    hangs: bool = False
    refuses: set[str] = field(default_factory=set)
    hwclock_fails: bool = False
    loses_sets: int = 0  #: so often it hangs in guest-set-time, and does it when asked again
    hangs_after_a_lost_set: bool = False
    rtc_ahead_ns: int = 700 * MILLISECOND
    files: dict[str, str] = field(default_factory=dict)
    dmesg: str = ""
    log: list[str] = field(default_factory=list)
    late: list[int] = field(default_factory=list)

    def revive(self) -> None:
        self.log.append("revive")

    def ask(
        self, uuid: str, command: Callable[[int], Mapping[str, Any]], timeout_ns: int
    ) -> AgentAnswer:
        sent_ns = self.clock.now_ns
        said = command(sent_ns)
        name, arguments = said["execute"], said.get("arguments", {})
        self.log.append(name)
        if self.missing:
            raise AgentError("it has no guest agent", missing=True, remedy="give it one")
        if sent_ns < self.unconnected_until_ns:
            raise AgentError("its agent does not answer (not connected)")
        lost = self.loses_sets > 0 and name == "guest-set-time"
        if lost:
            self.loses_sets -= 1
            self.hangs = self.hangs_after_a_lost_set
            self.late.append(arguments["time"])
        if self.hangs or lost or self.there_ns + self.back_ns > timeout_ns:
            self.clock.now_ns += timeout_ns
            raise DeadlineError("guest agent", timeout_ns)
        if self.late:
            self._set(self.late.pop())
        self.clock.now_ns += self.there_ns
        if name in self.refuses or name not in self.commands:
            raise AgentError(f"the command {name} has been disabled", refused=True)
        value = getattr(self, name.replace("-", "_"))(arguments)
        self.clock.now_ns += self.back_ns
        return AgentAnswer(value=value, sent_ns=sent_ns, received_ns=self.clock.now_ns)

    def sync_rtc(self, uuid: str, timeout_ns: int) -> None:
        self.log.append("rtc")
        self.ahead_ns = self.rtc_ahead_ns

    def _set(self, time_ns: int) -> None:
        self.ahead_ns = time_ns - (self.clock.now_ns + OFFSET_NS)

    def guest_info(self, _: Mapping[str, Any]) -> object:
        return {"supported_commands": [{"name": n, "enabled": True} for n in self.commands]}

    def guest_get_time(self, _: Mapping[str, Any]) -> int:
        return self.clock.now_ns + OFFSET_NS + self.ahead_ns

    def guest_set_time(self, arguments: Mapping[str, Any]) -> object:
        self._set(arguments["time"])
        if self.hwclock_fails:
            raise AgentError("hwclock failed to set hardware clock to system time", refused=True)
        return {}

    def guest_exec(self, arguments: Mapping[str, Any]) -> object:
        self.log.append(arguments["path"])
        if arguments["path"] == "date":
            self._set(int(arguments["arg"][1].removeprefix("@")) * SECOND)
        return {"pid": 7}

    def guest_exec_status(self, _: Mapping[str, Any]) -> object:
        text = base64.b64encode(self.dmesg.encode()).decode()
        return {"exited": True, "exitcode": 0, "out-data": text}

    def guest_file_open(self, arguments: Mapping[str, Any]) -> str:
        if arguments["path"] not in self.files:
            raise AgentError("failed to open file", refused=True)
        return str(arguments["path"])

    def guest_file_read(self, arguments: Mapping[str, Any]) -> object:
        data = self.files[arguments["handle"]].encode()
        return {"buf-b64": base64.b64encode(data).decode()}

    def guest_file_close(self, _: Mapping[str, Any]) -> object:
        return {}


def correct(
    guest: Guest,
    *,
    target_ns: int | None = 0,
    answered: bool = True,
    config: ClockConfig | None = None,
    measure: bool = True,
) -> Corrected:
    """Measures before, lets the guest fall behind by 5 s, corrects."""
    hand = Clocks(guest, config or ClockConfig())
    if measure:
        hand.measure(["g"], OFFSET_NS)
    guest.ahead_ns -= 5 * SECOND
    wish = Wish(uuid="g", target_ns=target_ns, answered=answered)
    start_ns = guest.clock.now_ns
    found = hand.correct([wish], OFFSET_NS, start_ns + 10 * SECOND)["g"]
    assert guest.clock.now_ns - start_ns <= 10 * SECOND + MILLISECOND, "the deadline was missed"
    return found


def test_a_pause_is_made_good_and_verified(clock: FakeTime) -> None:
    guest = Guest(clock)
    found = correct(guest)
    assert found.found == Skew(skew_ns=-5 * SECOND, uncertainty_ns=600_000)
    assert (found.now, found.way) == (Skew(skew_ns=0, uncertainty_ns=600_000), Way.SET_TIME)
    assert (found.problem, found.notes) == ("", ())
    assert guest.ahead_ns == 0
    assert guest.log[-1] == "guest-get-time", "it was not verified"


def test_a_delay_that_was_not_expected_is_learnt(clock: FakeTime) -> None:
    guest = Guest(clock, there_ns=4 * MILLISECOND, back_ns=100_000)
    found = correct(guest)
    assert found.problem == ""
    assert found.now is not None and abs(guest.ahead_ns) <= 2 * found.now.uncertainty_ns
    # The truth is in what we say, however lopsided the way.
    assert abs(found.now.skew_ns - guest.ahead_ns) <= found.now.uncertainty_ns


def test_a_clock_that_is_right_is_not_touched(clock: FakeTime) -> None:
    guest = Guest(clock, ahead_ns=5 * SECOND)  # which the pause takes away
    found = correct(guest)
    assert (found.way, found.problem) == (Way.NONE, "")
    assert "guest-set-time" not in guest.log


def test_only_ours_is_given_back(clock: FakeTime) -> None:
    guest = Guest(clock, ahead_ns=-86_400 * SECOND)
    found = correct(guest, target_ns=-86_400 * SECOND)
    assert guest.ahead_ns == -86_400 * SECOND
    assert found.problem == ""


def test_a_day_wrong_is_set_right(clock: FakeTime) -> None:
    guest = Guest(clock, ahead_ns=-86_400 * SECOND)
    assert correct(guest).problem == ""
    assert guest.ahead_ns == 0


def test_with_no_target_it_is_only_measured(clock: FakeTime) -> None:
    guest = Guest(clock)
    found = correct(guest, target_ns=None)
    assert found.now == found.found == Skew(skew_ns=-5 * SECOND, uncertainty_ns=600_000)
    assert found.way is None
    assert "guest-set-time" not in guest.log


def test_no_agent_is_said_at_once(clock: FakeTime) -> None:
    guest = Guest(clock, missing=True)
    start_ns = clock.now_ns
    found = correct(guest, answered=False)
    assert (found.now, found.way, found.problem) == (None, None, "it has no guest agent")
    assert found.remedy == "give it one"
    assert clock.now_ns == start_ns


def test_a_dead_agent_is_waited_for_a_little(clock: FakeTime) -> None:
    start_ns = clock.now_ns
    found = correct(Guest(clock, unconnected_until_ns=1 << 62), answered=False)
    assert "not connected" in found.problem
    assert clock.now_ns - start_ns <= PATIENCE_NS + AGAIN_NS


def test_a_hanging_agent_costs_no_more_than_patience(clock: FakeTime) -> None:
    start_ns = clock.now_ns
    found = correct(Guest(clock, hangs=True), answered=False)
    assert "does not answer" in found.problem
    assert clock.now_ns - start_ns <= PATIENCE_NS + AGAIN_NS + 10 * MILLISECOND


def test_an_agent_that_answered_before_is_waited_for_to_the_deadline(clock: FakeTime) -> None:
    guest = Guest(clock)
    Clocks(guest, ClockConfig()).measure(["g"], OFFSET_NS)
    guest.unconnected_until_ns = clock.now_ns + 8 * SECOND
    found = correct(guest, measure=False)
    assert (found.problem, guest.ahead_ns) == ("", 0)


def test_an_agent_that_answers_late_is_set_as_well_as_can_be_seen(clock: FakeTime) -> None:
    guest = Guest(clock, there_ns=SECOND, back_ns=500 * MILLISECOND)
    found = correct(guest)
    assert found.problem == ""
    assert found.now is not None
    assert found.now.uncertainty_ns == 750 * MILLISECOND
    assert abs(guest.ahead_ns) <= 2 * found.now.uncertainty_ns


def test_a_set_that_is_done_late_is_noticed_and_mended(clock: FakeTime) -> None:
    guest = Guest(clock, loses_sets=1)
    found = correct(guest)
    assert (found.problem, guest.ahead_ns) == ("", 0)
    assert "no answer within" in found.notes[0]


def test_a_clock_that_may_still_be_set_late_is_not_verified(clock: FakeTime) -> None:
    guest = Guest(clock, loses_sets=1, hangs_after_a_lost_set=True)
    found = correct(guest)
    assert "may still be set, late" in found.problem
    assert found.now is None


def test_hwclock_may_fail_after_the_clock_was_set(clock: FakeTime) -> None:
    guest = Guest(clock, hwclock_fails=True)
    found = correct(guest)
    assert (found.way, found.problem, guest.ahead_ns) == (Way.SET_TIME, "", 0)
    assert "hwclock failed" in found.notes[0]


def test_a_refused_set_falls_back_to_a_program_if_that_is_allowed(clock: FakeTime) -> None:
    guest = Guest(clock, commands=(*LIBRARY, *EXEC), refuses={"guest-set-time"})
    found = correct(guest, config=ClockConfig(guest_exec=True))
    assert (found.way, found.problem) == (Way.EXEC, "")
    assert abs(guest.ahead_ns) <= MILLISECOND
    assert "rtc" not in guest.log


def test_the_rtc_is_the_last_resort_and_its_error_is_told(clock: FakeTime) -> None:
    guest = Guest(clock, commands=(*LIBRARY, *EXEC), refuses={"guest-set-time"})
    found = correct(guest)  # programs are not allowed
    assert found.way is Way.RTC
    assert "date" not in guest.log
    assert "it is 700 ms off" in found.problem
    assert found.now is not None and found.now.skew_ns == 700 * MILLISECOND


def test_an_agent_without_the_command_is_not_asked_for_it(clock: FakeTime) -> None:
    guest = Guest(clock, commands=("guest-get-time", "guest-info"))
    found = correct(guest)
    assert "guest-set-time" not in guest.log and "rtc" not in guest.log
    assert found.problem.startswith("it is -5 s off")
    assert "docs/guest-guide.md" in found.remedy


def test_without_libvirt_every_guest_is_unverified(clock: FakeTime) -> None:
    guest = Guest(clock)

    def away() -> None:
        raise HypervisorError("libvirt: away")

    guest.revive = away  # type: ignore[method-assign]
    assert correct(guest).problem == "libvirt: away"


def test_new_lockups_are_told_old_ones_are_not(clock: FakeTime) -> None:
    old, new = "[1] watchdog: BUG: soft lockup - old", "[9] watchdog: BUG: soft lockup - new"
    guest = Guest(clock, commands=(*LIBRARY, *EXEC), dmesg=f"{old}\n")
    hand = Clocks(guest, ClockConfig(guest_exec=True))
    hand.measure(["g"], OFFSET_NS)
    guest.dmesg += f"{new}\n"
    wish = Wish(uuid="g", target_ns=0, answered=True)
    found = hand.correct([wish], OFFSET_NS, clock.now_ns + SECOND)["g"]
    assert found.notes == (f"its kernel says: {new}",)
    assert guest.log.count("dmesg") == 2


def test_watchdogs_are_asked_for_where_files_may_be_read(clock: FakeTime) -> None:
    linux = {module._WATCHDOG_THRESH: "10\n", module._CLOCK_SOURCES: "kvm-clock tsc\n"}
    guest = Guest(clock, commands=(*LIBRARY, *FILES), files=linux)
    (dog,) = Clocks(guest, ClockConfig()).watchdogs(["g"]).values()
    assert (dog.threshold_ns, dog.pvclock) == (20 * SECOND, True)
    assert guest.log.count("guest-file-close") == 2
    windows = Guest(clock, commands=(*LIBRARY, *FILES))
    assert Clocks(windows, ClockConfig()).watchdogs(["g"]) == {}
    shy = Guest(clock, files=linux)
    assert Clocks(shy, ClockConfig()).watchdogs(["g"]) == {}
    assert "guest-file-open" not in shy.log


def test_no_set_is_begun_that_could_not_be_looked_at(clock: FakeTime) -> None:
    guest = Guest(clock, hwclock_fails=True)

    def never_right(_: Mapping[str, Any]) -> object:
        guest.clock.now_ns += SECOND
        guest.ahead_ns += 7 * MILLISECOND
        return {}

    guest.guest_set_time = never_right  # type: ignore[method-assign]
    found = correct(guest)
    assert found.now is not None, "it was left unmeasured"
    assert found.problem.startswith("it is ")
