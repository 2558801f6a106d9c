"""After a run's orchestrator has died: every guest of its armed record runs again.

Run by the keeper, or by a person, as ``hostupdate resume``. Does each thing whether or not somebody
did it before: thaw, put back, resume. Steps of the update are not undone: which of them ran is not
known here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from hostupdate.errors import HostUpdateError, HypervisorError
from hostupdate.model import ArmedGuest, ArmedRecord, GuestState, PauseMethod


class RecoveryHypervisor(Protocol):
    """libvirt, as far as it answers."""

    def prepare(self, uuids: list[str]) -> None: ...
    def state(self, uuid: str, timeout_ns: int | None = None) -> GuestState: ...
    def resume(
        self, guests: list[tuple[str, str]], timeout_ns: int
    ) -> Mapping[str, int | Exception]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryHands:
    """``thaw(guest)`` lets its threads run and puts its process where it was; ``hypervisor`` opens
    libvirt, or raises; ``connect`` brings a guest's network links up again; ``is_alive`` and
    ``resume_by_monitor`` are as in the engine's hands."""

    thaw: Callable[[ArmedGuest], None]
    restore_memory_min: Callable[[dict[str, str]], None]
    hypervisor: Callable[[], RecoveryHypervisor]
    connect: Callable[[RecoveryHypervisor, ArmedGuest], None]
    is_alive: Callable[[int, float], bool]
    resume_by_monitor: Callable[[int, int], None]


def recover(record: ArmedRecord, hands: RecoveryHands, timeout_ns: int) -> dict[str, str]:
    """Lets every guest of the record run. Returns what is wrong with a guest, by name; empty where
    all run. Raises nothing for one guest's sake; repeatable."""
    problems: dict[str, str] = {}
    alive: list[ArmedGuest] = []
    for guest in record.guests:
        if not hands.is_alive(guest.pid, guest.started):
            problems[guest.name] = f"its QEMU, pid {guest.pid}, is gone"
            continue
        alive.append(guest)
        try:
            hands.thaw(guest)
        except (OSError, HostUpdateError) as error:
            problems[guest.name] = f"it cannot be thawed: {error}"
    try:
        hands.restore_memory_min(record.memory_min)
    except OSError as error:
        problems["memory.min"] = f"cannot be put back: {error}"
    held = [guest for guest in alive if guest.links]
    if record.method is not PauseMethod.STOP and not held:
        return problems
    hypervisor: RecoveryHypervisor | None = None
    away = ""
    try:
        hypervisor = hands.hypervisor()
    except HostUpdateError as error:
        away = str(error)
    if record.method is PauseMethod.STOP:
        problems |= _resume(alive, hypervisor, away, hands, timeout_ns)
    return _connect(held, hypervisor, away, hands) | problems


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
