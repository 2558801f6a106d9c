"""Puts the hands of a handover's recovery together: where each guest was, and where it is to be."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from hostupdate.cli.handing_over import (
    end_probes,
    find_pid,
    have_hook_called,
    hook_of,
    mark_of,
    parking_host,
    remove_idle,
    scratch_of,
)
from hostupdate.cli.settings import Settings
from hostupdate.config import Config
from hostupdate.engine.handover import PATIENCE_NS
from hostupdate.errors import (
    DeadlineError,
    GuestError,
    HostUpdateError,
    HypervisorError,
    InputError,
    RefusedError,
)
from hostupdate.guests import Hypervisor
from hostupdate.handover import builds, ram_store
from hostupdate.handover.ports import Host
from hostupdate.handover.records import ParkedRecords
from hostupdate.handover.recovery import Recovered, discard, recover
from hostupdate.parked import ParkedRecord, ParkedState

_POLL_S = 0.1


@dataclass(slots=True)
class Back:
    """What became of the guests that had a parked record, by name. ``problems``: those that do not
    run, and why. ``ended``: they had ended before they were parked. ``unnoted``: they run, and why
    they keep their record."""

    running: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    unnoted: dict[str, str] = field(default_factory=dict)


def bring_back(
    settings: Settings,
    config: Config,
    hypervisor: Hypervisor,
    run_id: str,
    *,
    committed: bool,
    moved_on: Callable[[], None],
) -> Back:
    """Recovers every guest that has a parked record. Where the update is in place, ``committed``,
    they come under their new QEMU; else back to where they were.

    ``moved_on`` is called before a guest that is under its new QEMU loses its record: the update
    stays then. What it raises, HostUpdateError, leaves the record there. A guest of which libvirt
    says nothing is tried again until PATIENCE_NS have passed in which it said nothing of any.
    """
    host = parking_host(settings, config, hypervisor, run_id)
    back = Back()
    moved = False

    def note() -> None:
        nonlocal moved
        moved = True
        try:
            moved_on()
        except HostUpdateError as error:
            raise _UnnotedError(str(error), remedy=error.remedy) from error

    waiting = host.records.uuids()
    end_ns: int | None = None
    while waiting:
        silent = []
        for uuid in waiting:
            answered = _bring_one_back(host, config, uuid, back, committed or moved, note)
            if not moved and some_moved_on(settings.state):  # it may run, whatever failed then
                with suppress(_UnnotedError):
                    note()
            if answered:
                end_ns = None
            else:
                silent.append(uuid)
                end_ns = end_ns or time.monotonic_ns() + PATIENCE_NS
        if end_ns is not None and time.monotonic_ns() >= end_ns:
            break
        waiting = silent
        if waiting:
            time.sleep(_POLL_S)
    return back


def _bring_one_back(
    host: Host,
    config: Config,
    uuid: str,
    back: Back,
    committed: bool,
    moved_on: Callable[[], None],
) -> bool:
    """Whether libvirt answered, or was not even asked."""
    name = uuid
    try:
        record = host.records.read(uuid)
        if record is None:
            return True
        name = record.name
        found = _recovered(host, config, record, committed, moved_on)
        (back.ended if found is Recovered.ENDED else back.running).append(name)
        back.problems.pop(name, None)
    except _UnnotedError as error:
        back.running.append(name)
        back.problems.pop(name, None)
        back.unnoted[name] = _said(error)
    except HostUpdateError as error:
        back.problems[name] = _said(error)
        return not isinstance(error, HypervisorError | DeadlineError)
    except Exception as error:  # a bug of ours: the others come back all the same
        back.problems[name] = f"internal error: {type(error).__name__}: {error}"
    return True


def _said(error: HostUpdateError) -> str:
    return f"{error}; {error.remedy}" if error.remedy else str(error)


class _UnnotedError(HostUpdateError):
    """A guest runs under its new QEMU, and that could not be noted."""


def some_moved_on(state: Path) -> bool:
    """Whether a guest has been let run under its new QEMU, by what is parked."""
    records = ParkedRecords(state)
    found = []
    for uuid in records.uuids():
        with suppress(InputError):  # it is told of when it is to come back
            found.append(records.read(uuid))
    return any(record is not None and record.moved_on for record in found)


def some_let_run(settings: Settings, config: Config, hypervisor: Hypervisor, run_id: str) -> bool:
    """Whether somebody has let a guest run that stood still under its new QEMU. HypervisorError,
    DeadlineError: libvirt does not say."""
    host = parking_host(settings, config, hypervisor, run_id)
    for uuid in host.records.uuids():
        with suppress(InputError):
            record = host.records.read(uuid)
            if record is None or record.state is not ParkedState.STRIPPED:
                continue
            facts = host.domains.facts(uuid)
            if facts is not None and facts.let_run and record.new_emulator != record.old_emulator:
                return True
    return False


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
    host = parking_host(settings, config, hypervisor, record.run_id)
    discard(host, record)
    host.hook.uninstall()


def _recovered(
    host: Host,
    config: Config,
    record: ParkedRecord,
    committed: bool,
    moved_on: Callable[[], None],
) -> Recovered:
    """Recovers a guest under the QEMU that it ran under, or where the update is in place under the
    new one; else under the other. ``moved_on`` is told, before its record is removed, that it is
    under the new one."""
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

    def ran(now: ParkedRecord) -> None:
        if record.state is ParkedState.RUNNING:
            moved = record.moved_on
        elif now.state is ParkedState.RUNNING:
            moved = changed and now.moved_on
        else:  # somebody has let it run
            moved = changed
        if moved:
            moved_on()

    first: GuestError | None = None
    for origin, emulator in dict.fromkeys(ways):
        again = record if first is None else host.records.read(record.uuid)
        if again is None or (first is not None and again.state is ParkedState.RUNNING):
            break
        again = msgspec.structs.replace(again, old_emulator=origin)
        try:
            stay = committed or not changed or emulator != origin
            return _recover(host, again, emulator, stay=stay, ran=ran)
        except GuestError as error:
            first = first or error
    assert first is not None
    raise first


def _recover(
    host: Host,
    record: ParkedRecord,
    emulator: str | None,
    *,
    stay: bool,
    ran: Callable[[ParkedRecord], None],
) -> Recovered:
    try:
        return recover(host, record, emulator, stay=stay, ran=ran)
    except GuestError:  # the daemon may have been started anew, without our hook
        again = host.records.read(record.uuid)
        if again is None or again.state is ParkedState.RUNNING:
            raise
        called = False
        with suppress(HostUpdateError):  # it may have no definition to ask with
            called = have_hook_called(host, record.uuid)
        if not called:
            raise
        again = msgspec.structs.replace(again, old_emulator=record.old_emulator)
        return recover(host, again, emulator, stay=stay, ran=ran)


def clear_up(state: Path, config: Config, libvirt: Callable[[], Hypervisor]) -> None:
    """Removes what an interrupted run has left: of rehearsals, QEMUs that it kept, its hook and its
    probes; no guest is parked any more. HypervisorError, DeadlineError: a probe may run still."""
    shutil.rmtree(scratch_of(state), ignore_errors=True)
    remove_idle(Path(config.paths.builds))
    hook_of(state, config).uninstall()
    end_probes(libvirt)


def _kept(config: Config, emulator: str) -> builds.Build | None:
    """What was kept of a QEMU; the newest where there is more than one."""
    found = Path(config.paths.builds).glob(f"{Path(emulator).name}-*/qemu")
    wrappers = [path for path in found if builds.origin(str(path)) == emulator]
    wrappers.sort(key=lambda path: path.stat().st_mtime_ns)
    return builds.Build(wrappers[-1].parent) if wrappers else None
