"""After a run's orchestrator has died: every guest of its pending record runs again.

Run by the keeper, or by a person, as ``hostupdate resume``. Does each thing whether or not somebody
did it before: thaw, put back, resume. What the update had done comes after that (``unwind``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from hostupdate import faults
from hostupdate.errors import HostUpdateError, HypervisorError
from hostupdate.model import ArmedGuest, GuestState, PauseMethod, PendingRecord


class RecoveryHypervisor(Protocol):
    """libvirt, as far as it answers."""

    def prepare(self, uuids: list[str]) -> None: ...
    def state(self, uuid: str, timeout_ns: int | None = None) -> GuestState: ...
    def resume(
        self, guests: list[tuple[str, str]], timeout_ns: int
    ) -> Mapping[str, int | Exception]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryHands:
    """``thaw(guest)`` lets its threads run and puts its process, if it lives, where it was;
    ``is_frozen`` looks whether they do; ``hypervisor`` opens libvirt, or raises; ``connect`` brings
    a guest's network links up again; ``is_alive`` and ``resume_by_monitor`` are as in the engine's
    hands; ``boot_id`` names this boot."""

    thaw: Callable[[ArmedGuest], None]
    is_frozen: Callable[[ArmedGuest], bool]
    restore_memory_min: Callable[[dict[str, str]], None]
    hypervisor: Callable[[], RecoveryHypervisor]
    connect: Callable[[RecoveryHypervisor, ArmedGuest], None]
    is_alive: Callable[[int, int], bool]
    resume_by_monitor: Callable[[int, int], None]
    boot_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """``problems``: guest name -> what is wrong with it. ``unfinished``: those guests of the record
    that live and are not known to run. ``warnings``: what else was not put back."""

    problems: dict[str, str]
    unfinished: tuple[ArmedGuest, ...] = ()
    warnings: tuple[str, ...] = ()


def recover(record: PendingRecord, hands: RecoveryHands, timeout_ns: int) -> Recovered:
    """Lets every guest of the record run. Raises nothing for one guest's sake; repeatable."""
    if record.boot_id != hands.boot_id:
        ended = "its QEMU ended with the host's last boot"
        return Recovered(problems={guest.name: ended for guest in record.guests})
    faults.point("resume.guests")
    stopped = record.armed and record.method is PauseMethod.STOP
    problems: dict[str, str] = {}
    alive: list[ArmedGuest] = []
    for guest in record.guests:
        lives = hands.is_alive(guest.pid, guest.started)
        if lives:
            alive.append(guest)
        else:
            problems[guest.name] = f"its QEMU, pid {guest.pid}, is gone"
        try:
            hands.thaw(guest)
            if lives and hands.is_frozen(guest):
                problems[guest.name] = "it was told to run and is still frozen"
        except (OSError, HostUpdateError) as error:
            problems.setdefault(guest.name, f"it cannot be thawed: {error}")
    warnings = []
    try:
        hands.restore_memory_min(record.memory_min)
    except OSError as error:
        warnings.append(f"memory.min cannot be put back: {error}")
    held = [guest for guest in alive if guest.links]
    hypervisor: RecoveryHypervisor | None = None
    away = ""
    if stopped or held:
        try:
            hypervisor = hands.hypervisor()
        except HostUpdateError as error:
            away = str(error)
    unresumed: dict[str, str] = {}
    if stopped:
        unresumed = _resume(alive, hypervisor, away, hands, timeout_ns)
    problems = _connect(held, hypervisor, away, hands) | unresumed | problems
    return Recovered(
        problems=problems,
        unfinished=tuple(guest for guest in alive if guest.name in problems),
        warnings=tuple(warnings),
    )


def _connect(
    guests: list[ArmedGuest],
    hypervisor: RecoveryHypervisor | None,
    away: str,
    hands: RecoveryHands,
) -> dict[str, str]:
    problems = {}
    for guest in guests:
        try:
            if hypervisor is None:
                raise HypervisorError(away)
            hands.connect(hypervisor, guest)
        except HostUpdateError as error:
            problems[guest.name] = f"its network links may be down: {error}"
    return problems


def _resume(
    guests: list[ArmedGuest],
    hypervisor: RecoveryHypervisor | None,
    away: str,
    hands: RecoveryHands,
    timeout_ns: int,
) -> dict[str, str]:
    failures: dict[str, str] = {}
    try:
        if hypervisor is None:
            raise HypervisorError(away)
        states = {guest.uuid: hypervisor.state(guest.uuid, timeout_ns) for guest in guests}
        paused = [guest for guest in guests if states[guest.uuid] is GuestState.PAUSED]
        hypervisor.prepare([guest.uuid for guest in paused])
        outcome = hypervisor.resume([(guest.uuid, guest.name) for guest in paused], timeout_ns)
        failures = {
            uuid: str(error) for uuid, error in outcome.items() if not isinstance(error, int)
        }
        failures |= {
            uuid: f"libvirt says that it is {state}"
            for uuid, state in states.items()
            if state not in (GuestState.RUNNING, GuestState.PAUSED)
        }
    except HostUpdateError as error:
        failures = {guest.uuid: str(error) for guest in guests}
    problems = {}
    for guest in guests:
        if guest.uuid not in failures:
            continue
        try:
            hands.resume_by_monitor(guest.pid, timeout_ns)
        except HostUpdateError as error:
            problems[guest.name] = f"{failures[guest.uuid]}; by its monitor: {error}"
    return problems
