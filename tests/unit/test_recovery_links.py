"""Recovery after the orchestrator's death: network links, on a host in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from hostupdate.engine.recovery import RecoveryHands, RecoveryHypervisor, recover
from hostupdate.errors import HypervisorError
from hostupdate.model import ArmedGuest, GuestState, PauseMethod, PendingRecord


class Libvirt:
    def prepare(self, uuids: Sequence[str]) -> None:
        pass

    def state(self, uuid: str, timeout_ns: int | None = None) -> GuestState:
        return GuestState.PAUSED

    def resume(
        self, guests: Sequence[tuple[str, str]], timeout_ns: int
    ) -> Mapping[str, int | Exception]:
        return {uuid: 1 for uuid, _ in guests}


def record(method: PauseMethod, *links: tuple[str, ...]) -> PendingRecord:
    guests = tuple(
        ArmedGuest(
            name=f"g{n}", uuid=f"u{n}", pid=n, started=1, cgroup=None, home_cgroup=None,
            links=macs,
        )
        for n, macs in enumerate(links)
    )  # fmt: skip
    return PendingRecord(
        run_id="r", boot_id="boot", uri="test", pid=1, started=1, armed=True, method=method,
        libvirt_timeout_ns=1, cgroup2=None, guests=guests,
    )  # fmt: skip


class Host:
    """``away``: libvirt does not answer; ``stuck``: so does this guest's link."""

    def __init__(self, *, away: bool = False, stuck: str = "") -> None:
        self.away, self.stuck = away, stuck
        self.log: list[str] = []

    def open(self) -> RecoveryHypervisor:
        self.log.append("open")
        if self.away:
            raise HypervisorError("libvirt: away")
        return Libvirt()

    def connect(self, _hypervisor: RecoveryHypervisor, guest: ArmedGuest) -> None:
        if guest.name == self.stuck:
            raise HypervisorError("no")
        self.log.append(f"connect {guest.name}")

    def recover(self, what: PendingRecord) -> dict[str, str]:
        hands = RecoveryHands(
            boot_id="boot",
            is_frozen=lambda _guest: False,
            thaw=lambda guest: self.log.append(f"thaw {guest.name}"),
            restore_memory_min=lambda _: None,
            hypervisor=self.open,
            connect=self.connect,
            is_alive=lambda _pid, _started: True,
            resume_by_monitor=lambda pid, _timeout: self.log.append(f"monitor {pid}"),
        )
        return recover(what, hands, 1).problems


@pytest.mark.parametrize("method", list(PauseMethod))
def test_links_come_up_after_the_guests_run(method: PauseMethod) -> None:
    host = Host()
    assert host.recover(record(method, ("m",), ())) == {}
    assert host.log == ["thaw g0", "thaw g1", "open", "connect g0"]


def test_a_freeze_without_links_needs_no_libvirt() -> None:
    host = Host(away=True)
    assert host.recover(record(PauseMethod.FREEZE, ())) == {}
    assert host.log == ["thaw g0"]


def test_links_that_may_be_down_are_a_problem_of_their_guest() -> None:
    assert Host(stuck="g0").recover(record(PauseMethod.STOP, ("m",), ("n",))) == {
        "g0": "its network links may be down: no"
    }
    host = Host(away=True)
    problems = host.recover(record(PauseMethod.STOP, ("m",), ()))
    assert problems == {"g0": "its network links may be down: libvirt: away"}
    assert host.log == ["thaw g0", "thaw g1", "open", "monitor 0", "monitor 1"]
