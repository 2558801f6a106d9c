"""What a handover needs of the world, as it needs it. guests.parking fits the first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from hostupdate.handover.hook import Hook
from hostupdate.handover.records import ParkedRecords
from hostupdate.parked import DomainFacts, ParkedRecord, Stamp


class Domains(Protocol):
    """Guests through libvirt. Every method may raise HypervisorError or DeadlineError."""

    def facts(self, uuid: str) -> DomainFacts | None:
        """None where libvirt knows no such guest."""

    def set_ignore_shared(self, uuid: str, on: bool) -> None:
        """QEMU's x-ignore-shared: a save leaves out RAM that lies in files."""

    def managed_save(self, uuid: str) -> None:
        """To where libvirt keeps such an image. A guest that could not be saved goes on."""

    def save(self, uuid: str, path: Path) -> None: ...
    def description(self, uuid: str) -> tuple[str, str]:
        """XML and cookie as a save image of the guest has them."""

    def stream(self, uuid: str, fd: int) -> None:
        """Stops the guest and has QEMU write its state to ``fd``, a pipe that somebody reads. What
        is still under way at a DeadlineError is taken back when it succeeds."""

    def stream_state(self, uuid: str) -> str:
        """What QEMU says of that: ``completed`` when it is through."""

    def status(self, uuid: str) -> str:
        """What QEMU says that the guest does: ``postmigrate`` after that, until it is resumed."""

    def cancel(self, uuid: str) -> None:
        """Ends a save under way. No error where there is none, or where nobody answers."""

    def restore(self, path: Path) -> None:
        """A guest from an image; it is paused."""

    def resume(self, uuid: str) -> None: ...
    def destroy(self, uuid: str) -> None: ...
    def forget_save(self, uuid: str) -> None:
        """Removes libvirt's image of the guest. HypervisorError: also where there is none."""

    def drop_metadata(self, uuid: str, namespace: str) -> None:
        """Of a guest that has a QEMU, what is there of that namespace. No error where nothing is,
        or where it has none."""

    def hook_is_called(self, uuid: str) -> bool:
        """Whether libvirt asks our hook before it starts a guest like this one."""

    def try_emulator(self, uuid: str, emulator: Path) -> None:
        """Has libvirt start a QEMU for a domain of the guest's kind, and end it. HypervisorError:
        it cannot."""

    def stopped(self, uuid: str) -> Stamp | None:
        """The STOP event of its last save; None where this process has not seen it."""

    def resumed(self, uuid: str) -> Stamp | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """Where a handover works.

    ``find_pid`` gives the process of a guest's QEMU by its uuid, or None; ``save_directory`` is
    where libvirt keeps images (``/var/lib/libvirt/qemu/save``).
    """

    domains: Domains
    records: ParkedRecords
    hook: Hook
    find_pid: Callable[[str], int | None]
    save_directory: Path
    run_id: str
    boot_id: str
    uri: str


class Way(Protocol):
    """One way to put a new QEMU under a guest. Records come back as they were written last.

    ``prepare`` while the guest runs; then ``switch``, or where something must happen while no
    guest has a QEMU (a module, a kernel), ``park`` and later ``unpark``. A guest comes out of
    both under its new QEMU, paused: the caller looks at it, then ``commit`` lets it run, and there
    is no way back; before it, ``rollback`` puts the old QEMU under it. ``finish`` clears up.
    ``abort`` takes back what ``prepare`` did. Guests may be handled in parallel.
    """

    name: ClassVar[str]

    def prepare(self, uuid: str) -> ParkedRecord: ...
    def switch(self, record: ParkedRecord, emulator: str | None) -> ParkedRecord: ...
    def park(self, record: ParkedRecord) -> ParkedRecord: ...
    def unpark(self, record: ParkedRecord, emulator: str | None) -> ParkedRecord: ...
    def commit(self, record: ParkedRecord) -> ParkedRecord: ...
    def rollback(self, record: ParkedRecord) -> ParkedRecord: ...
    def blackout_ns(self, record: ParkedRecord) -> int | None: ...
    def finish(self, record: ParkedRecord) -> None: ...
    def abort(self, record: ParkedRecord) -> None: ...
