"""Who can be handed over, and what the QEMUs of running guests have in use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from hostupdate.config import Config
from hostupdate.eligibility import Blocker, Eligibility, HandoverFacts, judge
from hostupdate.errors import GuestError, HostUpdateError
from hostupdate.guests import Hypervisor
from hostupdate.guests.command import GuestCommand
from hostupdate.guests.uri import embedded_root
from hostupdate.handover import builds, candidate, inquiry
from hostupdate.handover.ports import Host
from hostupdate.host import processes, ram_backing
from hostupdate.impact import QemuUse
from hostupdate.model import LocatedGuest

_REPLACED = Blocker(
    reason="its QEMU is not installed any more: there is no way back to it",
    remedy="only the rehearsal stands between it and a QEMU that does not take it",
)


def eligibility(
    hypervisor: Hypervisor,
    guests: Sequence[LocatedGuest],
    config: Config,
    host: Host | None = None,
) -> Mapping[str, Eligibility]:
    """Of each running guest, by uuid; those that are frozen answer nobody and are left out. With
    ``host`` also by what parking it would meet there."""
    found = {}
    embedded = embedded_root(hypervisor.uri) is not None
    drivers = ram_backing.security_drivers()
    for located in guests:
        uuid, place = located.guest.uuid, located.place
        if place is None or place.frozen:
            continue
        command = GuestCommand(hypervisor, uuid, config.deadlines.libvirt_ns)
        try:
            facts = HandoverFacts(
                domain_xml=hypervisor.xml(uuid),
                backends=ram_backing.complete(
                    inquiry.backends(command), Path(f"/proc/{place.pid}")
                ),
                embedded=embedded,
                swap_bytes=ram_backing.swap_bytes(),
                security_drivers=drivers,
                command_line=tuple(builds.command(processes.command_line(place.pid))),
                qemu_blockers=inquiry.blockers(command),
                block_jobs=inquiry.block_jobs(command),
            )
            judged = judge(facts)
        except (HostUpdateError, OSError) as error:
            silent = Blocker(reason=f"it cannot be asked: {error}", remedy="see `virsh domcontrol`")
            found[uuid] = Eligibility(blockers=(silent,), warnings=())
            continue
        if host is not None and not judged.blockers:
            met = tuple(_obstacles(host, config.handover.way, uuid))
            judged = msgspec.structs.replace(judged, blockers=met)
        if processes.is_replaced(place.pid):
            judged = msgspec.structs.replace(judged, warnings=(*judged.warnings, _REPLACED))
        found[uuid] = judged
    return found


def _obstacles(host: Host, way: str, uuid: str) -> Iterator[Blocker]:
    """What parking the guest would fail by, before it is touched."""
    try:
        facts = host.domains.facts(uuid)
        if facts is not None:
            candidate.linked(host, way, uuid, facts)
    except HostUpdateError as error:
        reason = error.problem if isinstance(error, GuestError) else str(error)
        yield Blocker(reason=reason, remedy=error.remedy or "see to it, then ask again")


def qemu_uses(guests: Sequence[LocatedGuest]) -> list[QemuUse]:
    """What the QEMUs of running guests have in use, and would load. GuestError: one is gone."""
    uses = []
    directories: dict[str, tuple[str, ...]] = {}
    for located in guests:
        if located.place is None:
            continue
        pid = located.place.pid
        program = processes.program(pid)
        if program not in directories:
            directories[program] = builds.load_directories(Path(program))
        uses.append(
            QemuUse(
                guest=located.guest.name,
                files=processes.used_files(pid) | {builds.origin(program)},
                directories=directories[program],
            )
        )
    return uses
