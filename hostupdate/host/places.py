"""Where each running guest lives on this host."""

from __future__ import annotations

from collections.abc import Sequence

from hostupdate.core import ram
from hostupdate.errors import CoreError, GuestError
from hostupdate.host import processes
from hostupdate.host.cgroups import Cgroups
from hostupdate.model import Guest, GuestPlace, GuestState, LocatedGuest


def locate(guests: Sequence[Guest], cgroups: Cgroups | None) -> list[LocatedGuest]:
    """Finds every running guest's process and cgroup; says why where one cannot be found.

    Raises GuestError where two processes claim one guest.
    """
    running = {guest.uuid: guest.name for guest in guests if guest.state is GuestState.RUNNING}
    try:
        qemus = processes.find_qemus(running)
    except GuestError as error:
        raise GuestError(running[error.guest], error.problem, remedy=error.remedy) from error
    return [_locate(guest, qemus.get(guest.uuid), cgroups) for guest in guests]


def _locate(
    guest: Guest, qemu: processes.QemuProcess | None, cgroups: Cgroups | None
) -> LocatedGuest:
    if guest.state is not GuestState.RUNNING:
        return LocatedGuest(guest=guest, place=None)
    if qemu is None:
        return LocatedGuest(guest=guest, place=None, problem="its QEMU process was not found")
    try:
        mappings = ram.mappings(qemu.pid)
        cgroup = cgroups.of_process(qemu.pid) if cgroups is not None else None
        place = GuestPlace(
            pid=qemu.pid,
            started=qemu.started,
            cgroup=cgroup,
            shared_cgroup=cgroups is not None
            and cgroup is not None
            and cgroups.is_shared(cgroup, qemu.pid),
            frozen=cgroups is not None and cgroup is not None and cgroups.is_frozen(cgroup),
            memory_controller=cgroups is not None
            and cgroup is not None
            and cgroups.has_memory(cgroup),
            shared_ram=_mostly_shared(mappings),
            dma_writers=processes.dma_writers(qemu.pid),
        )
    except (OSError, CoreError) as error:
        return LocatedGuest(guest=guest, place=None, problem=f"its QEMU cannot be read: {error}")
    return LocatedGuest(guest=guest, place=place)


def _mostly_shared(mappings: Sequence[ram.Mapping]) -> bool:
    """ROM and video memory are always private; the guest's RAM decides."""
    shared_bytes = sum(mapping.length_bytes for mapping in mappings if mapping.shared)
    return 2 * shared_bytes > sum(mapping.length_bytes for mapping in mappings)
