"""Whether a running guest can be parked, by what it is right now."""

from __future__ import annotations

import os

from hostupdate.errors import GuestError
from hostupdate.handover import ram_store
from hostupdate.handover.ports import Host
from hostupdate.model import GuestState
from hostupdate.parked import DomainFacts, ParkedRecord, ParkedState

ROOM_BYTES = 64 << 20


def linked(host: Host, way: str, uuid: str, facts: DomainFacts) -> ParkedRecord:
    """The record of a guest that can be parked; nothing is changed. GuestError: it cannot."""
    name, records = facts.name, host.records
    if not facts.active or facts.busy:
        raise GuestError(name, f"it is {facts.state}, or libvirt is at work on it")
    if facts.problem:
        raise GuestError(name, facts.problem)
    if records.read(uuid) is not None:
        raise GuestError(name, "a handover of it has not ended", remedy="hostupdate resume")
    pid = host.find_pid(uuid)
    if pid is None:
        raise GuestError(name, "its QEMU process was not found")
    ram = ram_store.find(name, uuid, pid)
    if ram.size_bytes < facts.memory_bytes:
        raise GuestError(
            name, f"only {ram.size_bytes} of its {facts.memory_bytes} bytes of RAM are in files"
        )
    guard = host.save_directory / f"{name}.save"
    if facts.persistent and guard.exists():
        remedy = f"virsh managedsave-remove {name}"
        raise GuestError(name, f"a saved image of it is in the way: {guard}", remedy=remedy)
    for place in {records.directory.parent, host.save_directory}:
        try:  # it may not have been made yet
            free = os.statvfs(next(p for p in (place, *place.parents) if p.exists()))
        except OSError as error:
            raise GuestError(
                name, f"its image has no place in {place}: {error.strerror}"
            ) from error
        if free.f_bavail * free.f_frsize < ROOM_BYTES:
            raise GuestError(name, f"its image needs {ROOM_BYTES >> 20} MiB on {place}")
    return ParkedRecord(
        run_id=host.run_id,
        boot_id=host.boot_id,
        uri=host.uri,
        name=name,
        uuid=uuid,
        way=way,
        state=ParkedState.LINKED,
        persistent=facts.persistent,
        was_running=facts.state is GuestState.RUNNING,
        ram_directory=str(ram.directory),
        short_name=ram.short_name,
        ram=ram.files,
        image=str(records.image(uuid)),
        guard=str(guard if facts.persistent else records.image(uuid)),
        old_emulator=facts.emulator,
    )
