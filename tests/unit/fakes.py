"""A host in memory: fakes below the engine's ports, which write down what was done to them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hostupdate.durations import SECOND
from hostupdate.engine import Hands
from hostupdate.errors import CoreError, GuestError, HypervisorError
from hostupdate.guestpolicy import GuestPolicy
from hostupdate.model import (
    Action,
    Guest,
    GuestPlace,
    GuestState,
    LocatedGuest,
    PendingRecord,
    Phase,
    Report,
)
from hostupdate.rivals import Held, Rivals
from hostupdate.skew import Corrected, Skew, Way, Wish
from hostupdate.unwinding import Kind
from hostupdate.vitals import Vitals

WELL = Vitals(agent=True, disks={"vda": ""})


def located(
    name: str,
    *,
    state: GuestState = GuestState.RUNNING,
    policy: GuestPolicy | None = None,
    problem: str = "",
    **place: object,
) -> LocatedGuest:
    """A guest and its place; keywords change single facts of the place."""
    number = int.from_bytes(name.encode(), "big") % 90000 + 1000
    guest = Guest(
        name=name,
        uuid=f"uuid-{name}",
        state=state,
        memory_bytes=1 << 28,
        vcpus=1,
        policy=policy or GuestPolicy(),
    )
    facts: dict[str, object] = {
        "pid": number,
        "started": 1,
        "cgroup": f"/machine/{name}",
        "shared_cgroup": False,
        "frozen": False,
        "memory_controller": False,
        "shared_ram": True,
        "dma_writers": (),
    } | place
    known = state is GuestState.RUNNING and not problem
    return LocatedGuest(
        guest=guest,
        place=GuestPlace(**facts) if known else None,  # type: ignore[arg-type]
        problem=problem,
    )


@dataclass(frozen=True)
class Stamp:
    requested_monotonic_ns: int
    settled_monotonic_ns: int | None


@dataclass(frozen=True)
class Sizes:
    ram_bytes: int = 1 << 28
    resident_bytes: int = 1 << 27
    swapped_bytes: int = 0


@dataclass(frozen=True)
class Result:
    exit: int | None = 0
    duration_ns: int = 1000
    problem: str = ""


@dataclass
class World:
    """What happened, in order, in ``log``; what is to go wrong, in the other fields."""

    log: list[str] = field(default_factory=list)
    frozen: set[str] = field(default_factory=set)
    stopped: set[str] = field(default_factory=set)
    dead: set[int] = field(default_factory=set)
    silent: bool = False  #: libvirt does not answer
    monitors: bool = True  #: guests' own monitor sockets answer
    fail: dict[str, Exception] = field(default_factory=dict)  #: log entry -> raised after it
    results: dict[str, Result] = field(default_factory=dict)  #: step -> how it ends
    on: dict[str, Callable[[], None]] = field(default_factory=dict)  #: log entry -> side effect
    faults: int = 0
    digests: list[str] = field(default_factory=lambda: ["same"])
    keeper_fires: bool = False
    keeper_dies: bool = False
    signal: str | None = None
    vitals: dict[str, Vitals] = field(default_factory=dict)  #: by uuid, after the run
    changed: Sequence[LocatedGuest] | None = None  #: what a second look at the guests finds
    host_offset_ns: int = 7
    synchronised: bool = True
    skews: dict[str, Skew | HypervisorError] = field(default_factory=dict)  #: by uuid
    corrected: dict[str, Corrected] = field(default_factory=dict)  #: by uuid
    wishes: list[Wish] = field(default_factory=list)
    unplugged: set[str] = field(default_factory=set)
    armed: PendingRecord | None = None
    records: list[tuple[Kind, int | None]] = field(default_factory=list)
    ended: bool = False  #: the run, in the journal
    saved: Report | None = None

    def note(self, entry: str) -> None:
        self.log.append(entry)
        if entry in self.on:
            self.on[entry]()
        if entry in self.fail:
            raise self.fail[entry]


class FakeSet:
    def __init__(self, world: World, names: Sequence[str]) -> None:
        self._world = world
        self._names = names
        self._stamps: list[Stamp] = []

    def freeze(self, deadline_monotonic_ns: int) -> list[Stamp]:
        self._world.note("freeze")
        self._world.frozen.update(self._names)
        self._stamps = [Stamp(1000, 2000 + 10 * n) for n, _ in enumerate(self._names)]
        return self._stamps

    def thaw(self, deadline_monotonic_ns: int) -> list[Stamp]:
        self._world.note("thaw")
        self._world.frozen.clear()
        self._stamps = [Stamp(5000, 6000 + 10 * n) for n, _ in enumerate(self._names)]
        return self._stamps

    def stamps(self) -> list[Stamp]:
        return [Stamp(5000, None) for _ in self._names]


class FakeKeeper:
    locked_bytes = 4096
    lock_errno = 0

    def __init__(self, world: World) -> None:
        self._world = world
        self._read, self._write = os.pipe()

    def fileno(self) -> int:
        return self._read

    def alarmed(self) -> bool:
        return self._world.keeper_fires

    def arm(self, deadline_monotonic_ns: int) -> None:
        self._world.note("arm")

    def disarm(self) -> bool:
        self._world.note("disarm")
        if self._world.keeper_dies:
            raise CoreError("hu_keeper_disarm", 32)
        return self._world.keeper_fires

    def stop(self) -> None:
        os.close(self._read)
        os.close(self._write)
        self._world.note("keeper-end")


class FakeHands:
    """Every port at once."""

    mount = Path("/fake")

    def __init__(self, world: World) -> None:
        self.world = world
        self._signals, self._signal_writer = os.pipe()

    def close_pipes(self) -> None:
        os.close(self._signals)
        os.close(self._signal_writer)

    # core
    def open_guests(self, guests: Sequence[tuple[str, int, str | None]]) -> FakeSet:
        return FakeSet(self.world, [name for name, _, _ in guests])

    def start_keeper(self, guests: object, ram_fds: Sequence[int]) -> FakeKeeper:
        self.world.note("keeper")
        return FakeKeeper(self.world)

    def close(self) -> None:
        pass

    def host_clock(self) -> tuple[int, int]:
        return self.world.host_offset_ns, 1

    def host_clock_synchronised(self) -> bool:
        return self.world.synchronised

    # clocks
    def correct(
        self, wishes: Sequence[Wish], offset_ns: int, deadline_ns: int
    ) -> dict[str, Corrected]:
        self.world.note("clocks")
        self.world.wishes = list(wishes)
        assert deadline_ns - time.monotonic_ns() <= 10 * SECOND
        found = Skew(skew_ns=-5 * SECOND, uncertainty_ns=1000)
        right = Corrected(found=found, now=Skew(skew_ns=500, uncertainty_ns=1000), way=Way.SET_TIME)
        return {wish.uuid: self.world.corrected.get(wish.uuid, right) for wish in wishes}

    # links
    def up(self, uuid: str) -> tuple[str, ...]:
        return ("52:54:00:00:00:01",)

    def set(self, uuid: str, macs: Sequence[str], state: str) -> None:
        self.world.note(f"link {uuid} {state}")
        assert macs == ("52:54:00:00:00:01",)
        (self.world.unplugged.add if state == "down" else self.world.unplugged.discard)(uuid)

    # memory
    def measure(self, pid: int) -> Sizes:
        return Sizes()

    def open_shared(self, pid: int) -> list[int]:
        return []

    def prepare_digest(self, pid: int) -> Callable[[], tuple[str, int]]:
        def digest() -> tuple[str, int]:
            digests = self.world.digests
            return digests.pop(0) if len(digests) > 1 else digests[0], 10

        return digest

    def major_faults(self, pid: int) -> int:
        if "thaw" in self.world.log:
            return self.world.faults
        return 0

    # libvirt
    def prepare(self, uuids: Sequence[str]) -> None:
        pass

    def stop(self, guests: Sequence[tuple[str, str]], timeout_ns: int) -> dict[str, int]:
        self.world.note("stop")
        self.world.stopped.update(uuid for uuid, _ in guests)
        return {uuid: 500 for uuid, _ in guests}

    def resume(
        self, guests: Sequence[tuple[str, str]], timeout_ns: int
    ) -> Mapping[str, int | Exception]:
        self.world.note("resume")
        if self.world.silent:
            return {uuid: GuestError(name, "libvirt is away") for uuid, name in guests}
        self.world.stopped.clear()
        return {uuid: 7000 for uuid, _ in guests}

    def state(self, uuid: str, timeout_ns: int | None = None) -> GuestState:
        if self.world.silent:
            return GuestState.UNKNOWN
        return GuestState.PAUSED if uuid in self.world.stopped else GuestState.RUNNING

    def resume_by_monitor(self, pid: int, timeout_ns: int) -> None:
        self.world.note(f"monitor {pid}")
        if not self.world.monitors:
            raise HypervisorError("taken")

    def is_alive(self, pid: int, started: int) -> bool:
        return pid not in self.world.dead

    # cgroups
    def own(self, uuid: str) -> str:
        return f"/hostupdate/{uuid}"

    def isolate(self, pid: int, home: str, uuid: str) -> str:
        self.world.note(f"isolate {uuid}")
        return self.own(uuid)

    def restore(self, pid: int | None, own: str, home: str) -> None:
        self.world.note(f"home {own}")

    def memory_min_changes(self, wanted: Iterable[tuple[str, int]]) -> dict[str, tuple[str, str]]:
        return {cgroup: ("0", str(size)) for cgroup, size in wanted}

    def set_memory_min(self, values: dict[str, str]) -> None:
        for cgroup, value in values.items():
            self.world.note(f"memory.min {cgroup}={value}")

    def memory_current(self, cgroup: str) -> int:
        return 4096

    # steps
    def run(self, name: str, deadline_ns: int, wake_fds: Sequence[int]) -> Result:
        self.world.note(f"run {name}")
        return self.world.results.get(name, Result())

    def undo(self, name: str, timeout_ns: int) -> bool:
        self.world.note(f"undo {name}")
        return True

    def output(self, name: str) -> tuple[str, int, Path]:
        return "said", 4, Path("/log")

    def reap(self) -> None:
        pass

    # progress
    def phase(self, phase: Phase, *, paused: bool) -> None:
        assert not self.world.frozen, "told something while guests are paused"

    def started(self, action: Action) -> None:
        assert not self.world.frozen, "told something while guests are paused"

    def ended(self, action: Action, duration_ns: int, problem: str) -> None:
        assert not self.world.frozen, "told something while guests are paused"

    def undone(self, action: Action, problem: str) -> None:
        assert not self.world.frozen, "told something while guests are paused"

    # interrupts
    def fileno(self) -> int:
        return self._signals

    def pending(self) -> str | None:
        return self.world.signal


class FakeJournal:
    """Keeps what is written; ``journal KIND`` in ``fail`` makes it refuse."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.pending = PendingRecord(
            run_id="r", boot_id="this-boot", uri="qemu:///fake", pid=1, started=1,
            libvirt_timeout_ns=2 * SECOND,
        )  # fmt: skip

    def pend(self, record: PendingRecord) -> None:
        if record.guests and not self.pending.guests:
            self._world.note("record")
        self.pending = record
        self._world.armed = record if record.guests else None

    def note(self, kind: Kind, action: int | None = None, problem: str = "") -> None:
        self._world.records.append((kind, action))
        if error := self._world.fail.get(f"journal {kind}"):
            raise error

    def blackout(self, *, on: bool) -> None:
        if on:
            self.note(Kind.BLACKOUT)

    def save_report(self, report: Report) -> None:
        if error := self._world.fail.get("save_report"):
            raise error
        self._world.saved = report

    def end(self) -> None:
        self._world.ended = True


class FakeGuard:
    def __init__(self, world: World) -> None:
        self._world = world

    def hold(self, rivals: Rivals) -> tuple[str, ...]:
        self._world.note("hold")
        return ()

    def restore(self, held: Held) -> None:
        self._world.note("let go")


class FakeClocks:
    """Beside the others: memory is measured too."""

    def __init__(self, fake: FakeHands) -> None:
        self._fake = fake
        self.correct = fake.correct

    def measure(self, uuids: Sequence[str], offset_ns: int) -> dict[str, Skew | HypervisorError]:
        self._fake.world.note("clocks-before")
        right = Skew(skew_ns=200, uncertainty_ns=1000)
        return {uuid: self._fake.world.skews.get(uuid, right) for uuid in uuids}


def hands_of(fake: FakeHands, guests: Sequence[LocatedGuest], *, cgroups: bool = True) -> Hands:
    """The fake in every port."""
    return Hands(
        hypervisor=fake,
        cgroups=fake if cgroups else None,
        core=fake,
        ram=fake,
        clocks=FakeClocks(fake),
        links=fake,
        steps=fake,
        journal=FakeJournal(fake.world),
        guard=FakeGuard(fake.world),
        handover=None,
        progress=fake,
        interrupts=fake,
        resume_by_monitor=fake.resume_by_monitor,
        is_alive=fake.is_alive,
        versions=lambda: {"kernel": "6"},
        inventory=lambda: fake.world.changed if fake.world.changed is not None else guests,
        look=lambda guests: {uuid: fake.world.vitals.get(uuid, WELL) for uuid, _ in guests},
        vitals={guest.guest.uuid: WELL for guest in guests},
        places={guest.guest.uuid: guest.place for guest in guests if guest.place is not None},
    )
