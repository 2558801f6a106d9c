"""Guests' clocks through their agents: measured, set, measured again.

Every guest has a thread of its own here, and every call a deadline: an agent that hangs costs its
own guest the verification and nobody else anything. The host's real time is CLOCK_MONOTONIC plus
an offset that the caller has read once; a clock that is stepped meanwhile changes nothing.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from hostupdate.config import Clock as ClockConfig
from hostupdate.durations import MILLISECOND, SECOND, format_duration
from hostupdate.errors import AgentError, DeadlineError, HypervisorError
from hostupdate.model import AgentAnswer
from hostupdate.skew import (
    Corrected,
    Sample,
    Skew,
    Watchdog,
    Way,
    Wish,
    delay_ns,
    enough,
    helped,
    is_right,
    lockups,
    measured,
    next_way,
    watchdog,
)

T = TypeVar("T")

#: How long an agent that has not answered yet is waited for, and when it did not answer the last
#: time.
PATIENCE_NS = 2 * SECOND
AGAIN_NS = 500 * MILLISECOND
#: How long one measurement may go on for a better sample.
_SAMPLING_NS = 500 * MILLISECOND
#: An agent that is not connected says so at once; then it is asked again after this.
_RETRY_NS = 50 * MILLISECOND
#: No further set is begun with less than this left: it could not be looked at any more.
_ROUND_NS = 1500 * MILLISECOND
_POLL_NS = 10 * MILLISECOND
_THREADS = 32

_CLOCK_SOURCES = "/sys/devices/system/clocksource/clocksource0/available_clocksource"
_WATCHDOG_THRESH = "/proc/sys/kernel/watchdog_thresh"
_READ = {"guest-file-open", "guest-file-read", "guest-file-close"}
_RUN = {"guest-exec", "guest-exec-status"}


class AgentPort(Protocol):
    """Guests' agents (guests.agent.Agents)."""

    def revive(self) -> None: ...
    def ask(
        self, uuid: str, command: Callable[[int], Mapping[str, Any]], timeout_ns: int
    ) -> AgentAnswer: ...
    def sync_rtc(self, uuid: str, timeout_ns: int) -> None: ...


class Clocks:
    """The clocks of one run's guests."""

    def __init__(self, agents: AgentPort, config: ClockConfig) -> None:
        self._agents = agents
        self._config = config
        self._commands: dict[str, frozenset[str]] = {}  # what each agent lists as enabled
        self._silent: set[str] = set()  # who did not answer the last time
        self._stalls: dict[str, frozenset[str]] = {}  # lines that were in a log before the pause

    def watchdogs(self, uuids: Sequence[str]) -> dict[str, Watchdog]:
        """What Linux guests say of their watchdogs, where their agents may read files."""

        def look(uuid: str) -> Watchdog | None:
            deadline_ns = time.monotonic_ns() + self._patience_ns(uuid)
            if not self._learn(uuid, deadline_ns) >= _READ:
                return None
            thresh = self._read(uuid, _WATCHDOG_THRESH, deadline_ns)
            return watchdog(thresh, self._read(uuid, _CLOCK_SOURCES, deadline_ns))

        found = self._in_parallel(uuids, look)
        return {uuid: seen for uuid, seen in found.items() if isinstance(seen, Watchdog)}

    def measure(self, uuids: Sequence[str], offset_ns: int) -> dict[str, Skew | HypervisorError]:
        """Every guest's skew, or why it cannot be measured. Guests run."""

        def one(uuid: str) -> Skew:
            deadline_ns = time.monotonic_ns() + self._patience_ns(uuid)
            self._learn(uuid, deadline_ns)
            self._stalls[uuid] = frozenset(self._lockups(uuid, deadline_ns))
            return self._measure(uuid, offset_ns, deadline_ns)

        return self._in_parallel(uuids, one)

    def correct(
        self, wishes: Sequence[Wish], offset_ns: int, deadline_ns: int
    ) -> dict[str, Corrected]:
        """Measures and sets every guest's clock until it is right, or the deadline."""
        try:
            self._agents.revive()
        except (HypervisorError, DeadlineError) as error:
            return {wish.uuid: Corrected(problem=str(error)) for wish in wishes}
        by_uuid = {wish.uuid: wish for wish in wishes}

        def one(uuid: str) -> Corrected:
            wish = by_uuid[uuid]
            limit_ns = deadline_ns
            if not wish.answered:
                limit_ns = min(limit_ns, time.monotonic_ns() + self._patience_ns(uuid))
            return self._correct(wish, offset_ns, limit_ns)

        found = self._in_parallel(list(by_uuid), one)
        return {
            uuid: Corrected(problem=str(result), remedy=result.remedy)
            if isinstance(result, Exception)
            else result
            for uuid, result in found.items()
        }

    def _correct(self, wish: Wish, offset_ns: int, deadline_ns: int) -> Corrected:
        uuid, target_ns, tolerance_ns = wish.uuid, wish.target_ns, self._config.tolerance_ns
        found = now = self._measure(uuid, offset_ns, deadline_ns)
        if target_ns is None:
            return Corrected(found=found, now=now, notes=self._new_lockups(uuid, deadline_ns))
        delays_ns = [now.uncertainty_ns]
        tried: list[Way] = []
        refused: set[Way] = set()
        set_by = Way.NONE
        notes: dict[str, None] = {}
        while not is_right(now, target_ns, tolerance_ns):
            way = next_way(self._ways(uuid), tried, refused, set_by)
            if way is None or (tried and _over(deadline_ns, _ROUND_NS)):
                break
            tried.append(way)
            delay = delay_ns(delays_ns)
            problem: HypervisorError | DeadlineError | None = None
            try:
                self._set(way, uuid, offset_ns + target_ns + delay, deadline_ns)
            except (HypervisorError, DeadlineError) as error:
                problem = error
                notes[f"{way}: {error}"] = None
            before = now
            try:
                now = self._measure(uuid, offset_ns, deadline_ns)
            except (HypervisorError, DeadlineError) as error:
                late = "; a time that it was sent may still be set, late" if problem else ""
                return Corrected(
                    found=found, way=way, problem=f"{error}{late}", remedy=error.remedy,
                    notes=tuple(notes),
                )  # fmt: skip
            if problem is None or helped(before, now, target_ns):
                set_by = way
                delays_ns.append(delay - (now.skew_ns - target_ns))
            elif isinstance(problem, AgentError) and problem.refused:
                refused.add(way)
        problem_text = ""
        if not is_right(now, target_ns, tolerance_ns):
            problem_text = (
                f"it is {format_duration(now.skew_ns - target_ns)} off "
                f"(give or take {format_duration(now.uncertainty_ns)})"
            )
        return Corrected(
            found=found,
            now=now,
            way=set_by,
            problem=problem_text,
            remedy="allow guest-set-time in the guest's agent, or let it keep its own time by "
            "chrony with /dev/ptp0: docs/guest-guide.md" if problem_text else "",
            notes=(*notes, *self._new_lockups(uuid, deadline_ns)),
        )  # fmt: skip

    def _ways(self, uuid: str) -> list[Way]:
        commands = self._commands.get(uuid)
        ways = []
        if commands is None or "guest-set-time" in commands:
            ways += [Way.SET_TIME, Way.RTC]
        if self._config.guest_exec and commands is not None and commands >= _RUN:
            ways.insert(1, Way.EXEC)
        return ways

    def _in_parallel(
        self, uuids: Sequence[str], run: Callable[[str], T]
    ) -> dict[str, T | HypervisorError]:
        def guarded(uuid: str) -> T | HypervisorError:
            try:
                result = run(uuid)
            except HypervisorError as error:
                self._silent.add(uuid)
                return error
            except DeadlineError as error:
                self._silent.add(uuid)
                return AgentError(f"its agent does not answer ({error})")
            self._silent.discard(uuid)
            return result

        if not uuids:
            return {}
        with ThreadPoolExecutor(min(len(uuids), _THREADS), "clock") as threads:
            return dict(zip(uuids, threads.map(guarded, uuids), strict=True))

    def _patience_ns(self, uuid: str) -> int:
        return min(AGAIN_NS if uuid in self._silent else PATIENCE_NS, self._config.timeout_ns)

    # ---- one guest, one command

    def _measure(self, uuid: str, offset_ns: int, deadline_ns: int) -> Skew:
        samples: list[Sample] = []
        sampling_ns = time.monotonic_ns() + _SAMPLING_NS
        while not enough(samples, self._config.tolerance_ns):
            if samples and time.monotonic_ns() >= min(sampling_ns, deadline_ns):
                break
            try:
                answer = self._ask(uuid, {"execute": "guest-get-time"}, deadline_ns)
            except DeadlineError:
                if not samples:
                    raise
                break
            except AgentError as error:
                if error.refused or error.missing or _over(deadline_ns, _RETRY_NS):
                    raise
                time.sleep(_RETRY_NS / 1e9)
                continue
            if not isinstance(answer.value, int):
                raise AgentError("its agent told no time", refused=True)
            samples.append(
                Sample(
                    sent_ns=answer.sent_ns + offset_ns,
                    received_ns=answer.received_ns + offset_ns,
                    guest_ns=answer.value,
                )
            )
        return measured(samples)

    def _set(self, way: Way, uuid: str, ahead_ns: int, deadline_ns: int) -> None:
        """Sets the guest's real time to CLOCK_MONOTONIC plus ``ahead_ns``, as of the sending.

        Half of the time is kept: where the answer does not come, to see what came of it.
        """
        deadline_ns -= _rest(deadline_ns) // 2
        if way is Way.SET_TIME:

            def command(now_ns: int) -> dict[str, Any]:
                return {"execute": "guest-set-time", "arguments": {"time": now_ns + ahead_ns}}

            self._agents.ask(uuid, command, _rest(deadline_ns))
        elif way is Way.EXEC:
            # Not every date knows fractions: it is sent so that it sets a whole second.
            now_ns = time.monotonic_ns() + ahead_ns
            second = now_ns // SECOND + 1
            time.sleep((second * SECOND - now_ns) / 1e9)
            self._run(uuid, "date", ("-s", f"@{second}"), deadline_ns)
        else:
            self._agents.sync_rtc(uuid, _rest(deadline_ns))

    def _ask(self, uuid: str, command: Mapping[str, Any], deadline_ns: int) -> AgentAnswer:
        return self._agents.ask(uuid, lambda _now_ns: command, _rest(deadline_ns))

    def _learn(self, uuid: str, deadline_ns: int) -> frozenset[str]:
        """The commands that the agent lists as enabled; waits for it to answer at all."""
        while uuid not in self._commands:
            try:
                answer = self._ask(uuid, {"execute": "guest-info"}, deadline_ns)
            except AgentError as error:
                if error.refused or error.missing or _over(deadline_ns, _RETRY_NS):
                    raise
                time.sleep(_RETRY_NS / 1e9)
                continue
            listed = _fields(answer.value).get("supported_commands", ())
            self._commands[uuid] = frozenset(e["name"] for e in listed if e.get("enabled"))
        return self._commands[uuid]

    def _read(self, uuid: str, path: str, deadline_ns: int) -> str:
        arguments: dict[str, Any] = {"path": path, "mode": "r"}
        handle = self._ask(
            uuid, {"execute": "guest-file-open", "arguments": arguments}, deadline_ns
        ).value
        try:
            arguments = {"handle": handle, "count": 4096}
            answer = self._ask(
                uuid, {"execute": "guest-file-read", "arguments": arguments}, deadline_ns
            )
        finally:
            self._ask(
                uuid, {"execute": "guest-file-close", "arguments": {"handle": handle}}, deadline_ns
            )
        return _decoded(_fields(answer.value), "buf-b64")

    def _run(self, uuid: str, program: str, words: Sequence[str], deadline_ns: int) -> str:
        """What a program in the guest prints; AgentError where it fails."""
        arguments = {"path": program, "arg": list(words), "capture-output": True}
        started = self._ask(uuid, {"execute": "guest-exec", "arguments": arguments}, deadline_ns)
        pid = _fields(started.value).get("pid")
        status = {"execute": "guest-exec-status", "arguments": {"pid": pid}}
        while not (ended := _fields(self._ask(uuid, status, deadline_ns).value)).get("exited"):
            time.sleep(_POLL_NS / 1e9)
        if ended.get("exitcode") != 0:
            said = _decoded(ended, "err-data").strip()
            raise AgentError(f"{program} in the guest failed: {said}", refused=True)
        return _decoded(ended, "out-data")

    def _lockups(self, uuid: str, deadline_ns: int) -> tuple[str, ...]:
        if not self._config.guest_exec or not self._commands.get(uuid, frozenset()) >= _RUN:
            return ()
        try:
            return lockups(self._run(uuid, "dmesg", (), deadline_ns))
        except (HypervisorError, DeadlineError):
            return ()  # not Linux, or not allowed to it

    def _new_lockups(self, uuid: str, deadline_ns: int) -> tuple[str, ...]:
        known = self._stalls.get(uuid, frozenset())
        return tuple(
            f"its kernel says: {line}"
            for line in self._lockups(uuid, deadline_ns)
            if line not in known
        )


def _rest(deadline_ns: int) -> int:
    """What is left until the deadline; never nothing, so that a call is tried."""
    return max(deadline_ns - time.monotonic_ns(), MILLISECOND)


def _over(deadline_ns: int, ahead_ns: int) -> bool:
    return time.monotonic_ns() + ahead_ns >= deadline_ns


def _fields(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _decoded(answer: Mapping[str, Any], key: str) -> str:
    return base64.b64decode(answer.get(key, "")).decode(errors="replace")
