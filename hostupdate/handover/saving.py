"""Way A: libvirt's save takes the guest down, its restore brings it up.

RAM lies in files that QEMU leaves out of the save (x-ignore-shared), so that the image holds the
state of devices only. As libvirt writes it, it loads under no QEMU that was not told the same, and
libvirt tells none: an image that cannot be started by mistake. It stays where it is until the guest
runs; beside the hook it is the second thing that keeps others from starting the guest. What is
loaded is a copy, rewritten, which says of the guest that it was paused: the third.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import ClassVar

import msgspec

from hostupdate.core.address_space import held
from hostupdate.errors import (
    DeadlineError,
    GuestError,
    HostUpdateError,
    HypervisorError,
    ImageError,
    PrerequisiteError,
)
from hostupdate.handover import candidate, domain, parked_image, ram_store
from hostupdate.handover.ports import Host
from hostupdate.handover.records import erase, store
from hostupdate.model import GuestState
from hostupdate.parked import DomainFacts, ParkedRecord, ParkedState

_SETTLE_NS = 30_000_000_000
_POLL_S = 0.005
#: Nothing can bring it back but a start, which its owner decides on.
ENDED = "it ended before it was saved"
_RELOAD = "systemctl reload libvirtd (or virtqemud): it looks for hooks then; guests run on"


class Saving:
    """Fits :class:`hostupdate.handover.ports.Way`. Errors are GuestError where a guest cannot be
    handled, and those of the hypervisor; the guest's record tells its state then.

    ``outlive``: the old QEMU's address space is held while it ends, so that nobody waits for its
    memory to be unmapped. It keeps KVM's modules in use until that is done, shortly after
    :meth:`park`: False where something is to be done while guests are parked.
    """

    name: ClassVar[str] = "save"

    def __init__(self, host: Host, *, outlive: bool = True) -> None:
        self._host = host
        self._outlive = outlive

    def prepare(self, uuid: str) -> ParkedRecord:
        """The guest's RAM gets its second name. GuestError: it cannot be parked; nothing is left.
        PrerequisiteError: the record cannot be written."""
        facts = self.facts(uuid)
        record = candidate.linked(self._host, self.name, uuid, facts)
        self._host.hook.install()
        if not self._host.domains.hook_is_called(uuid):
            raise GuestError(facts.name, "libvirt's daemon does not call our hook", remedy=_RELOAD)
        self._host.records.write(record)
        try:
            self._host.records.reserve(uuid, candidate.ROOM_BYTES)
            ram_store.link(record)
        except (GuestError, PrerequisiteError):
            self._host.records.remove(uuid)
            raise
        return record

    def switch(self, record: ParkedRecord, emulator: str | None) -> ParkedRecord:
        """Parks and unparks."""
        return self.unpark(self.park(record), emulator)

    def park(self, record: ParkedRecord) -> ParkedRecord:
        """The guest has no QEMU then.

        GuestError: it runs, or its QEMU has ended by itself, and its handover is aborted. Any
        other error: its record is as it was; recovery finds out whether the guest runs.
        """
        domains = self._host.domains
        facts = self.facts(record.uuid)
        if not facts.active or facts.busy:
            self.abort(record)
            raise GuestError(record.name, f"it is {facts.state} now, or libvirt is at work on it")
        running = facts.state is GuestState.RUNNING
        if record.was_running is not running:
            record = msgspec.structs.replace(record, was_running=running)
            self._host.records.write(record)
        self._host.hook.guard(record, self._host.records.spare(record.uuid))
        try:
            pid = self._same_qemu(record)
        except GuestError:
            if self.settle(record).active:
                self.abort(record)
            else:
                self.forget(record)
            raise
        wrote = None
        try:
            domains.set_ignore_shared(record.uuid, True)
            with held(pid) if self._outlive else nullcontext():  # to unmap a GiB takes 60 ms
                wrote = self._save(record)
        except HostUpdateError as error:
            domains.cancel(record.uuid)
            if self.settle(record).active:
                self.abort(record)
                raise GuestError(record.name, f"it was not saved, and runs: {error}") from error
            if not Path(record.guard).exists():
                self.forget(record)
                raise GuestError(record.name, f"{ENDED}: {error}") from error
        return self.saved(record, wrote)

    def _same_qemu(self, record: ParkedRecord) -> int:
        """The guest's QEMU, once nobody can start another. GuestError: it is not that which
        :meth:`prepare` has seen, or has other RAM; what is saved of it would meet the old RAM."""
        pid = self._host.find_pid(record.uuid)
        if pid is None or not ram_store.is_mapped(record, pid):
            raise GuestError(record.name, "it was started anew since its handover was prepared")
        if ram_store.find(record.name, record.uuid, pid).files != record.ram:
            raise GuestError(record.name, "its RAM has changed since its handover was prepared")
        return pid

    def _save(self, record: ParkedRecord) -> bytes | None:
        """Leaves an image in ``record.guard``, and no QEMU. What it wrote there itself."""
        if record.persistent:
            self._host.domains.managed_save(record.uuid)
        else:
            self._host.domains.save(record.uuid, Path(record.guard))
        return None

    def saved(self, record: ParkedRecord, wrote: bytes | None = None) -> ParkedRecord:
        """Notes a guest that has been saved. ``wrote``: its image, where that is known better than
        by ``record.guard``. GuestError: its image is not right."""
        data = wrote or parked_image.checked(record, Path(record.guard))
        if record.guard != record.image:
            store(Path(record.image), data, spare=self._host.records.spare(record.uuid))
        stamp = self._host.domains.stopped(record.uuid) if record.was_running else None
        record = msgspec.structs.replace(
            record,
            state=ParkedState.SAVED,
            image_sha256=hashlib.sha256(data).hexdigest(),
            stopped_monotonic_ns=stamp.monotonic_ns if stamp else None,
            stopped_realtime_ns=stamp.realtime_ns if stamp else None,
        )
        self._host.records.write(record)
        return record

    def unpark(self, record: ParkedRecord, emulator: str | None) -> ParkedRecord:
        """The guest is under a QEMU again, paused, on its own RAM. ``emulator`` None: the one that
        its image names.

        GuestError: it is parked as before, and this may be repeated, also with another emulator.
        """
        if record.state is ParkedState.RUNNING:
            raise _moved_on(record)
        problem = ram_store.problem_of(record)
        if problem:
            raise GuestError(record.name, f"{problem}; it stays parked")
        loadable = self._host.records.loadable(record.uuid)
        ticket = secrets.token_hex(16)
        try:
            data = parked_image.loadable(parked_image.intact(record), emulator, ticket)
            store(loadable, data, durable=False, spare=self._host.records.spare(record.uuid))
        except ImageError as error:
            raise GuestError(record.name, f"{error}; it stays parked") from error
        record = msgspec.structs.replace(record, state=ParkedState.STRIPPED, new_emulator=emulator)
        self._host.records.write(record)
        self._host.hook.install()
        self._host.hook.allow(record, ticket, self._host.records.spare(record.uuid))
        try:
            try:
                self._host.domains.restore(loadable)
            except (HypervisorError, DeadlineError) as error:
                facts = self.settle(record)
                if not facts.active:
                    raise self._still_parked(record, str(error)) from error
            self.verify(record)
        except BaseException:
            self._host.hook.guard(record, self._host.records.spare(record.uuid))
            raise
        loadable.unlink(missing_ok=True)
        return record

    def verify(self, record: ParkedRecord) -> None:
        """GuestError where the guest's QEMU does not have its parked RAM. One that is paused is
        ended then, and is parked as before."""
        facts = self.facts(record.uuid)
        pid = self._host.find_pid(record.uuid)
        if pid is not None and ram_store.is_mapped(record, pid):
            return
        if facts.let_run:
            raise _booted(record)
        self._host.domains.destroy(record.uuid)
        raise self._still_parked(record, "QEMU did not get its parked RAM")

    def rollback(self, record: ParkedRecord) -> ParkedRecord:
        """From a guest that is paused under the new QEMU, or parked, to one that is paused under
        the old one. GuestError: it has been let run, or the old one does not take it either."""
        if record.state is ParkedState.RUNNING:
            raise _moved_on(record)
        facts = self.settle(record)
        if facts.let_run:
            raise GuestError(record.name, "somebody has let it run under its new QEMU: no way back")
        if facts.active:
            self.leave(record)
        return self.unpark(record, record.old_emulator)

    def leave(self, record: ParkedRecord) -> None:
        """Ends the QEMU that a guest is paused under. GuestError: nothing was done, since the guest
        could not be unparked any more."""
        problem = ram_store.problem_of(record)
        if problem:
            raise GuestError(record.name, f"{problem}; it stays paused under its new QEMU")
        parked_image.intact(record)
        status = ""
        with suppress(HypervisorError, DeadlineError):  # one that hangs is ended
            status = self._host.domains.status(record.uuid)
        if status == "running":  # libvirt has not learnt of it yet
            raise GuestError(record.name, "somebody has let it run under its new QEMU: no way back")
        self._host.domains.destroy(record.uuid)

    def commit(self, record: ParkedRecord) -> ParkedRecord:
        """Lets the guest run, if it did before. No way back from here. Safe to repeat.

        After an error its record tells whether it may run: a QEMU that has ended, or does not
        answer, is found out before. GuestError: it must not.
        """
        if record.problem:
            raise GuestError(record.name, record.problem)
        if record.state is not ParkedState.RUNNING:
            self._host.domains.stream_state(record.uuid)  # libvirt learns of an end a bit later
            record = msgspec.structs.replace(record, state=ParkedState.RUNNING)
            self._host.records.write(record)
        if record.was_running:
            try:
                self._host.domains.resume(record.uuid)
            except (HypervisorError, DeadlineError):
                if self.facts(record.uuid).state is not GuestState.RUNNING:
                    raise
        return record

    def blackout_ns(self, record: ParkedRecord) -> int | None:
        """From the guest's own stop to its own run, both as QEMU said. None: it did not run
        before, or this process or the one that parked it has not seen the event."""
        if record.stopped_monotonic_ns is None or record.stopped_realtime_ns is None:
            return None
        stamp = self._host.domains.resumed(record.uuid)
        if stamp is None:
            return None
        if record.boot_id != self._host.boot_id:  # the monotonic clock began anew
            return stamp.realtime_ns - record.stopped_realtime_ns
        return stamp.monotonic_ns - record.stopped_monotonic_ns

    def finish(self, record: ParkedRecord) -> None:
        """Clears up after a guest that runs. Safe to repeat."""
        self._forget_save(record)
        self.forget(record)
        with suppress(HypervisorError, DeadlineError):  # an old ticket opens nothing
            self._host.domains.drop_metadata(record.uuid, domain.NAMESPACE)

    def abort(self, record: ParkedRecord) -> None:
        """The guest is under its old QEMU as if nothing had been. Safe to repeat. Raises what the
        hypervisor does, the record is still there then. GuestError: it has been saved, or what was
        saved of it cannot be removed."""
        facts = self.settle(record)
        if facts.active:
            if self._host.hook.guards(record):  # one that is dying must not lose its image as well
                self._host.domains.status(record.uuid)
            self._erase_images(record)
            self._let_go_on(record, facts)
            # A daemon that has just been started says what it remembers, until QEMU has answered.
            self._host.domains.set_ignore_shared(record.uuid, False)
            self._let_go_on(record, self.facts(record.uuid))
        elif self._host.hook.guards(record):
            raise GuestError(record.name, "it has no QEMU any more: unpark it")
        self.forget(record)

    def forget(self, record: ParkedRecord) -> None:
        """Gives up what is parked, but for libvirt's image. For a guest that does not need it."""
        ram_store.unlink(record)
        self._host.hook.release(record)
        self._host.records.remove(record.uuid)

    def _let_go_on(self, record: ParkedRecord, facts: DomainFacts) -> None:
        """The guest ran when it was about to be parked: who has stopped it since is not told
        reliably by libvirt."""
        stopped = record.was_running and facts.state is GuestState.PAUSED
        if stopped and self._host.hook.guards(record):
            self._host.domains.resume(record.uuid)

    def _erase_images(self, record: ParkedRecord) -> None:
        """Before the guest goes on: an image that is whole would be taken for that of a guest which
        has been saved, should it end."""
        if record.persistent:
            with suppress(HypervisorError):  # it may know of none
                self._host.domains.forget_save(record.uuid)
        try:
            for path in {record.guard, record.image}:
                erase(Path(path))
        except OSError as error:
            raise GuestError(
                record.name, f"its image cannot be removed, so that it must not go on: {error}",
                remedy=f"remove {record.guard} and {record.image}, then `hostupdate resume`",
            ) from error  # fmt: skip

    def _forget_save(self, record: ParkedRecord) -> None:
        """libvirt knows of none any more. No error where the file is gone, or the owner's."""
        if record.persistent and not self._is_saved_since(record):
            try:
                self._host.domains.forget_save(record.uuid)
            except HypervisorError:
                if Path(record.guard).exists():
                    raise

    def _is_saved_since(self, record: ParkedRecord) -> bool:
        """By its owner: another image, of a guest that has no QEMU, or is about to have none."""
        if record.image_sha256 is None or parked_image.is_saved(record, Path(record.guard)):
            return False
        facts = self._host.domains.facts(record.uuid)
        return facts is None or not facts.active or facts.busy

    def facts(self, uuid: str) -> DomainFacts:
        """GuestError: libvirt knows no such guest."""
        facts = self._host.domains.facts(uuid)
        if facts is None:
            raise GuestError(uuid, "libvirt knows no such guest")
        return facts

    def settle(self, record: ParkedRecord) -> DomainFacts:
        """The guest, once libvirt is done with it, and says that it has a QEMU only where it has
        one. DeadlineError: it is not."""
        deadline_ns = time.monotonic_ns() + _SETTLE_NS
        while True:
            facts = self._host.domains.facts(record.uuid)
            if facts is None:  # without a definition it is known only while it has a QEMU
                return DomainFacts(
                    name=record.name,
                    state=GuestState.GONE,
                    busy=False,
                    restored=False,
                    persistent=False,
                    emulator="",
                    memory_bytes=0,
                )
            if not facts.busy and (not facts.active or self._host.find_pid(record.uuid)):
                return facts
            if time.monotonic_ns() >= deadline_ns:
                raise DeadlineError(f"libvirt's work on guest {record.name}", _SETTLE_NS)
            time.sleep(_POLL_S)

    def _still_parked(self, record: ParkedRecord, problem: str) -> GuestError:
        """A QEMU without the guest's RAM often does not even load the rest."""
        remedy = ""
        with suppress(HypervisorError, DeadlineError):
            if not self._host.domains.hook_is_called(record.uuid):
                remedy = _RELOAD
        return GuestError(record.name, f"{problem}; it stays parked", remedy=remedy)


def _booted(record: ParkedRecord) -> GuestError:
    return GuestError(
        record.name,
        "it runs, but not as it was parked: somebody has booted it",
        remedy="look into it; `hostupdate resume --discard GUEST` forgets what was parked",
    )


def _moved_on(record: ParkedRecord) -> GuestError:
    return GuestError(
        record.name, "it has been let run under its new QEMU and moved on: there is no way back"
    )
