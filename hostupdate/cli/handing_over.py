"""Puts the hands of a handover together: parking, builds, rehearsal, and who can be handed over."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from hostupdate.cli.settings import Settings
from hostupdate.config import Config
from hostupdate.core import ram
from hostupdate.errors import (
    GuestError,
    HypervisorError,
    PrerequisiteError,
    RefusedError,
)
from hostupdate.guests import Hypervisor, capabilities
from hostupdate.guests.command import GuestCommand
from hostupdate.guests.parking import Parking
from hostupdate.guests.probing import PROBES
from hostupdate.handover import builds, plugged, rehearsal
from hostupdate.handover.hook import Hook
from hostupdate.handover.own_saving import OwnSaving
from hostupdate.handover.ports import Host
from hostupdate.handover.records import ParkedRecords
from hostupdate.handover.saving import Saving
from hostupdate.host import kvm_modules, processes
from hostupdate.host.memory import SAMPLE_PAGES
from hostupdate.parked import ParkedRecord

#: What starts or ends a QEMU: libvirt's own time-outs for both are 30 s.
_LIFE_NS = 40_000_000_000
#: For a QEMU that is gone to let go of KVM.
_MODULES_NS = 200_000_000
#: For a daemon to have read its configuration anew.
_RELOAD_NS = 5_000_000_000
#: The mark at the end of a name.
_KEPT = re.compile(r"-[0-9a-f]{12}\Z")


def parking_host(settings: Settings, config: Config, hypervisor: Hypervisor, run_id: str) -> Host:
    """What parks and unparks guests, for a run or for its recovery."""
    return Host(
        domains=Parking(hypervisor, life_ns=_LIFE_NS),
        records=ParkedRecords(settings.state),
        hook=hook_of(settings.state, config),
        find_pid=find_pid,
        save_directory=Path(config.paths.libvirt_saves),
        run_id=run_id,
        boot_id=processes.boot_id(),
        uri=hypervisor.uri,
    )


def hook_of(state: Path, config: Config) -> Hook:
    """libvirt's hook of ours."""
    return Hook(Path(config.paths.libvirt_hooks) / "qemu.d/hostupdate", state / "hook")


def find_pid(uuid: str) -> int | None:
    """The process of a guest's QEMU."""
    found = processes.find_qemus([uuid]).get(uuid)
    return found.pid if found else None


class HandoverHand:
    """Fits the engine's HandoverPort. ``program``: the QEMU that guests come under; empty: the one
    that each guest's definition names. ``outlive`` as :class:`Saving` has it."""

    def __init__(
        self,
        host: Host,
        config: Config,
        hypervisor: Hypervisor,
        program: str,
        verify_ram: str,
        *,
        outlive: bool,
    ) -> None:
        self._host = host
        kind = Saving if config.handover.way == "save" else OwnSaving
        self._way = kind(host, outlive=outlive)
        self._hypervisor = hypervisor
        self._timeout_ns = config.deadlines.libvirt_ns
        self._program = program
        self._builds = Path(config.paths.builds)
        self._sample_pages = 0 if verify_ram == "full" else SAMPLE_PAGES
        #: guest -> its emulator's mark, and its build; None: a script, which no package replaces
        self._kept: dict[str, tuple[str, builds.Build | None]] = {}

    def keep(self, uuids: Sequence[str]) -> None:
        kept: dict[str, tuple[str, builds.Build | None]] = {}
        for uuid in uuids:
            emulator = self._way.facts(uuid).emulator
            if emulator not in kept:
                binary = _is_binary(emulator)
                kept[emulator] = mark_of(emulator), self._build(uuid, emulator) if binary else None
            self._kept[uuid] = kept[emulator]

    def _build(self, uuid: str, emulator: str) -> builds.Build:
        """RefusedError: guests could not be run from it."""
        into = self._builds / f"{Path(emulator).name}-{mark_of(emulator)}"
        self._builds.mkdir(mode=0o755, parents=True, exist_ok=True)
        build = builds.keep(Path(emulator), into)
        closed = builds.closed_to_others(build.wrapper)
        if closed is not None:
            raise RefusedError(
                [f"{closed} is closed to others: a guest's QEMU could not be run from {into}"],
                remedy=f"chmod o+x {closed}, or set [paths] builds",
            )
        why = "libvirt cannot start the QEMU that guests may have to go back to"
        self._try(uuid, str(build.wrapper), why)
        return build

    def _try(self, uuid: str, program: str, why: str) -> None:
        try:
            self._host.domains.try_emulator(uuid, Path(program))
        except HypervisorError as error:
            raise RefusedError(
                [f"{why}: {error}"],
                remedy=f"where AppArmor forbids it: a line '{Path(program).parent}/** rmix,' in "
                "/etc/apparmor.d/local/abstractions/libvirt-qemu",
            ) from error

    def drop_kept(self) -> None:
        remove_idle(self._builds)
        self._host.hook.uninstall()
        end_probes(lambda: self._hypervisor)

    def warm(self, uuids: Sequence[str]) -> None:
        self._hypervisor.revive()  # steps of the stage may have started libvirt anew
        wanted = {
            (self._target(uuid), "<domain type='kvm'" in self._hypervisor.xml(uuid)): uuid
            for uuid in uuids
        }
        for (target, kvm), uuid in sorted(wanted.items()):
            capabilities.warm(self._hypervisor, Path(target), _LIFE_NS, kvm=kvm)
            self._try(uuid, target, f"libvirt cannot start {target}")

    def rehearse(self, uuid: str, mark: Callable[[bool], None]) -> tuple[str, int | None, str]:
        pid = find_pid(uuid)
        facts = self._way.facts(uuid)
        if pid is None:
            raise GuestError(facts.name, "its QEMU process was not found")
        scratch = scratch_of(self._host.records.directory.parent)
        scratch.mkdir(mode=0o700, exist_ok=True)
        command = GuestCommand(self._hypervisor, uuid, self._timeout_ns)
        target = Path(self._target(uuid))
        words = builds.command(processes.command_line(pid))
        try:
            found = rehearsal.rehearse(
                command,
                plugged.with_plugged(command, words, self._hypervisor.xml(uuid)),
                target,
                scratch,
                mark=mark,
            )
        except RefusedError as error:
            raise GuestError(facts.name, str(error), remedy=error.remedy) from error
        return found.reason, found.paused_ns, found.new_version

    def end_rehearsal(self, uuid: str) -> None:
        self._hypervisor.revive()
        end_rehearsal(self._hypervisor, uuid)

    def prepare(self, uuid: str) -> ParkedRecord:
        have_hook_called(self._host, uuid)
        record = self._way.prepare(uuid)
        if self._program and self._program != record.old_emulator:  # recovery goes by it
            record = msgspec.structs.replace(record, new_emulator=self._program)
            self._host.records.write(record)
        return record

    def latest(self, record: ParkedRecord) -> ParkedRecord | None:
        return self._host.records.read(record.uuid)

    def park(self, record: ParkedRecord) -> ParkedRecord:
        return self._way.park(record)

    def digest(self, record: ParkedRecord) -> str:
        """Of its RAM files, which nobody can write: it has no QEMU, or one that is paused."""
        parts = hashlib.blake2b(digest_size=16)
        total = sum(each.size_bytes for each in record.ram)
        for each in record.ram:
            share = -(-self._sample_pages * each.size_bytes // total)
            fd = os.open(each.link, os.O_RDONLY | os.O_CLOEXEC)
            try:
                found = ram.digest_file(fd, length_bytes=each.size_bytes, sample_pages=share)
            finally:
                os.close(fd)
            parts.update(f"{each.block} {found.hex} {found.pages}\n".encode())
        return parts.hexdigest()

    def unpark(self, record: ParkedRecord) -> ParkedRecord:
        target = self._program or builds.origin(record.old_emulator)
        return self._way.unpark(record, None if target == record.old_emulator else target)

    def rollback(self, record: ParkedRecord) -> ParkedRecord:
        """Under the very QEMU that it ran under: where its place has another now, or it does not
        take the guest any more, the kept one."""
        mark, build = self._kept[record.uuid]
        kept = record
        if build is not None:
            kept = msgspec.structs.replace(record, old_emulator=str(build.wrapper))
        if record.old_emulator != kept.old_emulator and mark_of(record.old_emulator) == mark:
            try:
                return self._rollback(record)
            except GuestError:
                if record.moved_on:
                    raise
        elif build is None and mark_of(record.old_emulator) != mark:
            raise GuestError(record.name, f"{record.old_emulator} is not what it was")
        return self._rollback(kept)

    def _rollback(self, record: ParkedRecord) -> ParkedRecord:
        try:
            return self._way.rollback(record)
        except GuestError:  # the daemon may have been started anew, without our hook
            if not have_hook_called(self._host, record.uuid):
                raise
            return self._way.rollback(record)

    def commit(self, record: ParkedRecord) -> ParkedRecord:
        return self._way.commit(record)

    def finish(self, record: ParkedRecord) -> None:
        self._way.finish(record)

    def abort(self, record: ParkedRecord) -> ParkedRecord | None:
        facts = self._way.settle(record)
        saved = self._host.hook.guards(record) and Path(record.guard).exists()
        if saved and not facts.active:  # libvirt went away before it could be noted
            return self._way.saved(record)
        self._way.abort(record)
        return None

    def condemn(self, record: ParkedRecord, problem: str) -> ParkedRecord:
        record = msgspec.structs.replace(record, problem=problem)
        self._host.records.write(record)
        return record

    def modules_in_use(self) -> str:
        return kvm_modules.in_use(_MODULES_NS)

    def blackout_ns(self, record: ParkedRecord) -> int | None:
        return self._way.blackout_ns(record)

    def processes(self, uuids: Sequence[str]) -> Mapping[str, tuple[int, int]]:
        found = processes.find_qemus(uuids)
        return {uuid: (qemu.pid, qemu.started) for uuid, qemu in found.items()}

    def _target(self, uuid: str) -> str:
        return self._program or builds.origin(self._way.facts(uuid).emulator)


def have_hook_called(host: Host, uuid: str) -> bool:
    """libvirt's daemon looks for hooks at its start only, and when it is told to. Whether it had to
    be told, and calls ours now."""
    host.hook.install()
    if host.domains.hook_is_called(uuid):
        return False
    processes.reload_libvirt()
    deadline_ns = time.monotonic_ns() + _RELOAD_NS
    while time.monotonic_ns() < deadline_ns:
        if host.domains.hook_is_called(uuid):
            return True
        time.sleep(0.05)
    return False


def _is_binary(program: str) -> bool:
    try:
        with open(program, "rb") as file:
            return file.read(4) == b"\x7fELF"
    except OSError as error:
        raise PrerequisiteError(
            f"{program}, which a guest runs under, cannot be read: {error.strerror}",
            remedy="install it again",
        ) from error


def mark_of(program: str) -> str:
    """Names a binary as it is now; empty where it is gone."""
    try:
        status = os.stat(program)
    except OSError:
        return ""
    text = f"{status.st_dev} {status.st_ino} {status.st_mtime_ns} {status.st_size}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def scratch_of(state: Path) -> Path:
    """Where a rehearsal's QEMU lives."""
    return state / "rehearsal"


def end_rehearsal(hypervisor: Hypervisor, uuid: str) -> None:
    """The guest of a rehearsal that was interrupted runs, where it has not ended."""
    if find_pid(uuid) is None:
        return
    rehearsal.recover(GuestCommand(hypervisor, uuid, _LIFE_NS))


def end_probes(libvirt: Callable[[], Hypervisor]) -> None:
    """What was started to see whether libvirt can start it has ended; libvirt is asked only where
    something has not. HypervisorError, DeadlineError."""
    if not PROBES.isdisjoint(processes.all_qemus().values()):
        Parking(libvirt(), life_ns=_LIFE_NS).end_probes()


def remove_idle(directory: Path) -> None:
    """What was kept, or half kept, and no guest runs under; others' builds are left alone.

    Of its processes only guests' count. A QEMU that libvirt has started to learn what it can
    (``-machine none``) runs on for ever where libvirt's daemon is killed meanwhile: it is ended.
    """
    qemus = processes.all_qemus()
    guests = {pid for pid, name in qemus.items() if name not in PROBES}
    for path in directory.glob("*-*"):
        if not _KEPT.search(path.name):
            continue
        users = processes.running_from(path.absolute())
        if guests.isdisjoint(users):
            processes.end([pid for pid in users if pid not in qemus])
            builds.remove(builds.Build(path))
