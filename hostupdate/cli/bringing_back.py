"""Puts the hands of a handover's recovery together: where each guest was, and where it is to be."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from hostupdate.cli.handing_over import (
    end_probes,
    find_pid,
    have_hook_called,
    mark_of,
    parking_host,
    remove_idle,
    scratch_of,
)
from hostupdate.cli.settings import Settings
from hostupdate.config import Config
from hostupdate.errors import GuestError, HostUpdateError, InputError, RefusedError
from hostupdate.guests import Hypervisor
from hostupdate.handover import builds, ram_store
from hostupdate.handover.ports import Host
from hostupdate.handover.records import ParkedRecords
from hostupdate.handover.recovery import Recovered, discard, recover
from hostupdate.parked import ParkedRecord, ParkedState


def bring_back(
    settings: Settings, config: Config, hypervisor: Hypervisor, run_id: str, *, committed: bool
) -> tuple[dict[str, str], list[str], bool]:
    """Recovers every guest that has a parked record: problems by guest, those that run, and
    whether one of them is under its new QEMU, so that the update stays. It does in any case where
    it is ``committed``; else guests go back to where they were."""
    host = parking_host(settings, config, hypervisor, run_id)
    problems: dict[str, str] = {}
    running = []
    moved = False
    for uuid in host.records.uuids():
        name = uuid
        try:
            record = host.records.read(uuid)
            if record is None:
                continue
            name = record.name
            moved |= _recovered(host, config, record, committed or moved)
            running.append(name)
        except HostUpdateError as error:
            problems[name] = f"{error}; {error.remedy}" if error.remedy else str(error)
        except Exception as error:  # a bug of ours: the others come back all the same
            problems[name] = f"internal error: {type(error).__name__}: {error}"
    return problems, running, moved


def some_moved_on(state: Path) -> bool:
    """Whether a guest has been let run under its new QEMU, by what is parked."""
    records = ParkedRecords(state)
    found = []
    for uuid in records.uuids():
        with suppress(InputError):  # it is told of when it is to come back
            found.append(records.read(uuid))
    return any(record is not None and record.moved_on for record in found)


def give_up(
    settings: Settings, config: Config, hypervisor: Hypervisor, record: ParkedRecord
) -> None:
    """Removes what is parked of a guest, at its owner's word. RefusedError: it can be brought
    back, since a QEMU has its RAM."""
    pid = find_pid(record.uuid)
    if pid is not None and ram_store.is_mapped(record, pid):
        raise RefusedError(
            [f"guest {record.name} has a QEMU with its RAM"], remedy="run `hostupdate resume`"
        )
    discard(parking_host(settings, config, hypervisor, record.run_id), record)


def _recovered(host: Host, config: Config, record: ParkedRecord, committed: bool) -> bool:
    """Recovers a guest under the QEMU that it ran under, or where the update is in place under the
    new one; else under the other. Whether it is under the new one."""
    old = record.old_emulator
    kept = _kept(config, old)
    mark = mark_of(old)
    back = old
    if kept is not None and not (mark and kept.directory.name.endswith(mark)):
        back = str(kept.wrapper)
    changed = back != old or record.new_emulator not in (None, old)
    ways = [(back, back), (old, record.new_emulator if changed else old)]
    if kept is not None and back == old:
        ways.append((str(kept.wrapper), str(kept.wrapper)))
    ways.sort(key=lambda way: (way[0] == way[1]) is committed)
    first: GuestError | None = None
    for origin, emulator in dict.fromkeys(ways):
        again = record if first is None else host.records.read(record.uuid)
        if again is None or (first is not None and again.state is ParkedState.RUNNING):
            break
        again = msgspec.structs.replace(again, old_emulator=origin)
        try:
            stay = committed or not changed or emulator != origin
            found = _recover(host, again, emulator, stay=stay)
        except GuestError as error:
            first = first or error
            continue
        if found is Recovered.COMMITTED:
            return record.moved_on or (changed and record.state is not ParkedState.RUNNING)
        return found is Recovered.UNPARKED and changed and emulator != origin
    assert first is not None
    raise first


def _recover(host: Host, record: ParkedRecord, emulator: str | None, *, stay: bool) -> Recovered:
    try:
        return recover(host, record, emulator, stay=stay)
    except GuestError:  # the daemon may have been started anew, without our hook
        again = host.records.read(record.uuid)
        if again is None or again.state is ParkedState.RUNNING:
            raise
        with suppress(HostUpdateError):  # it may have no definition to ask with
            if have_hook_called(host, record.uuid):
                again = msgspec.structs.replace(again, old_emulator=record.old_emulator)
                return recover(host, again, emulator, stay=stay)
        raise


def clear_up(state: Path, config: Config, libvirt: Callable[[], Hypervisor]) -> None:
    """Removes what an interrupted run has left of rehearsals, of QEMUs that it kept, and of its
    probes; no guest is parked any more. HypervisorError, DeadlineError: a probe may run still."""
    shutil.rmtree(scratch_of(state), ignore_errors=True)
    remove_idle(Path(config.paths.builds))
    end_probes(libvirt)


def _kept(config: Config, emulator: str) -> builds.Build | None:
    """What was kept of a QEMU; the newest where there is more than one."""
    found = Path(config.paths.builds).glob(f"{Path(emulator).name}-*/qemu")
    wrappers = [path for path in found if builds.origin(str(path)) == emulator]
    wrappers.sort(key=lambda path: path.stat().st_mtime_ns)
    return builds.Build(wrappers[-1].parent) if wrappers else None
