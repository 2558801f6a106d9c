"""What becomes of a guest whose handover was interrupted, whatever interrupted it.

What the record says is where the handover was at least; what is, libvirt and the files tell.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path

import msgspec

from hostupdate.errors import GuestError
from hostupdate.handover.ports import Host
from hostupdate.handover.saving import ENDED, Saving
from hostupdate.handover.ways import WAYS
from hostupdate.parked import ParkedRecord, ParkedState


class Recovered(StrEnum):
    """What :func:`recover` found and did. There is no record any more."""

    UNTOUCHED = "untouched"  #: it is under its old QEMU
    ENDED = "ended"  #: likewise, and its owner has ended it, or the host's end has
    UNPARKED = "unparked"  #: it was parked and runs again
    COMMITTED = "committed"  #: it had been let run under its new QEMU


def recover(
    host: Host,
    record: ParkedRecord,
    emulator: str | None = None,
    *,
    stay: bool = True,
    ran: Callable[[ParkedRecord], None] = lambda _: None,
) -> Recovered:
    """Lets a guest run again on its own RAM, or leaves it parked. Safe to repeat.

    ``emulator`` is what a parked guest comes under; None: that of its image. ``stay``: one that is
    paused under a QEMU already stays there; else that one is ended. ``ran`` is told of a guest that
    runs, or has since, under the QEMU of that record, while there still is one; what it raises
    leaves it there.

    GuestError: it stays as it is and needs a human, or another try; or it is lost, and has no
    record any more. HypervisorError and DeadlineError: libvirt does not answer; nothing is known
    then.
    """
    if record.way not in WAYS:
        raise GuestError(
            record.name, f"it was parked in a way that this version does not know: {record.way}",
            remedy="finish it with the version of hostupdate that parked it",
        )  # fmt: skip
    way = Saving(host)  # however a guest was taken down, it is brought up like this
    if record.state is ParkedState.LINKED and host.hook.guards(record):
        host.domains.cancel(record.uuid)  # a save whose caller is gone may stand still
    facts = way.settle(record)
    if record.state is ParkedState.LINKED:
        if facts.active or not host.hook.guards(record):
            way.abort(record)
            return Recovered.UNTOUCHED if facts.active else Recovered.ENDED
        if not Path(record.guard).exists():
            way.forget(record)
            raise GuestError(record.name, ENDED, remedy="look at its disks, then start it")
        record = way.saved(record)
    if record.state is ParkedState.RUNNING:
        if not facts.active:
            raise GuestError(
                record.name, "it was let run under its new QEMU, and has ended since",
                remedy=_DISCARD,
            )  # fmt: skip
        if record.was_running and facts.restored:
            host.domains.resume(record.uuid)
        ran(record)
        way.finish(record)
        return Recovered.COMMITTED
    if facts.active:
        way.verify(record)  # somebody's start, or ours
        if facts.let_run:
            ran(record)
            way.finish(record)
            return Recovered.COMMITTED
    if record.problem:
        raise GuestError(record.name, record.problem, remedy=_DOUBTFUL)
    if facts.active and stay:
        back = emulator == record.old_emulator
        record = msgspec.structs.replace(
            record, new_emulator=emulator if back else record.new_emulator
        )
    else:
        if facts.active:
            way.leave(record)
        record = way.unpark(record, emulator)
    record = way.commit(record)
    ran(record)
    way.finish(record)
    return Recovered.UNPARKED


def discard(host: Host, record: ParkedRecord) -> None:
    """Gives up what is parked, at its owner's word: the guest can be booted anew then, as after a
    power failure. Its image and its RAM are gone."""
    Saving(host).finish(record)


_DOUBTFUL = (
    "`virsh resume GUEST` where it is paused lets it run all the same; `virsh destroy GUEST`, then "
    "`hostupdate resume --discard GUEST` gives it up"
)
_DISCARD = (
    "look at its disks, then `hostupdate resume --discard GUEST`; it can be started anew then"
)
