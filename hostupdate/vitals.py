"""A running guest's vital signs: what keeps a run from being begun, and what it made worse.

Refused is what would hang a pause, or what a pause would hurt: a monitor that does not answer, a
job, storage that does not answer, threads that cannot be stopped or started. An agent that does
not answer is a warning: the guest can be paused, only its clock cannot be set and verified. A link
that is down before a run is its owner's business.
"""

from __future__ import annotations

import msgspec


class Vitals(msgspec.Struct, frozen=True, kw_only=True):
    """One look at a guest. An empty text says that all is well.

    ``agent``: it answers; None where the guest has no channel for one, or where it was not asked
    since QEMU does not answer. ``ticking``: two of its answers were later one than the other; None
    where it tells no time. ``disks``: target -> what is wrong with the storage below; a disk that
    lies on no path of this host (rbd, nbd, iSCSI by QEMU) is judged by ``monitor`` alone.
    ``links``: MAC address -> up or down. ``job``: the libvirt job under way, such as backup.
    ``monitor``: why QEMU did not answer; empty where it did, and where ``stuck`` kept it from being
    asked. ``stuck``: why threads of its QEMU cannot run.
    """

    agent: bool | None = None
    ticking: bool | None = None
    disks: dict[str, str] = {}
    links: dict[str, str] = {}
    job: str = ""
    monitor: str = ""
    stuck: str = ""


def blockers(vitals: Vitals) -> list[str]:
    """Why no run may be begun while this guest runs; each with what to do about it."""
    found = []
    if vitals.stuck:
        found.append(f"its QEMU cannot be paused cleanly: {vitals.stuck}")
    if vitals.monitor:
        found.append(f"its QEMU does not answer, see `virsh domcontrol`: {vitals.monitor}")
    if vitals.job:
        words = f"libvirt's job {vitals.job!r} is under way on it"
        found.append(f"{words}: wait for its end, or end it by `virsh domjobabort`")
    for target, problem in sorted(vitals.disks.items()):
        if problem:
            found.append(f"its disk {target} is not well, see to its storage: {problem}")
    return found


def warnings(vitals: Vitals) -> list[str]:
    """What a run will miss of this guest, though it may be begun."""
    if vitals.agent is False:
        return ["its agent does not answer: its clock can be neither set nor verified"]
    if vitals.ticking is False:
        return ["its clock stands still, by its agent's account"]
    return []


class Change(msgspec.Struct, frozen=True):
    """``grave``: the guest cannot do its work, so that the run has failed and is undone."""

    text: str
    grave: bool


def changes(before: Vitals, after: Vitals) -> list[Change]:
    """What got worse from one look to the next; nothing that was so before.

    A job that has begun since is its owner's business. A guest whose QEMU does not answer any more
    is not said to have lost its disks as well.
    """
    found = []
    if after.stuck and not before.stuck:
        found.append(Change(f"its QEMU is stuck: {after.stuck}", True))
    if after.monitor and not before.monitor:
        found.append(Change(f"its QEMU does not answer any more: {after.monitor}", True))
    if before.agent and after.agent is False:
        found.append(Change("its agent does not answer any more", False))
    if before.ticking and after.ticking is False:
        found.append(Change("its clock stands still", False))
    for target, problem in sorted(before.disks.items()):
        now = after.disks.get(target, "" if after.monitor else "it is gone")
        if now and not problem:
            found.append(Change(f"its disk {target}: {now}", True))
    for mac, state in sorted(before.links.items()):
        now = after.links.get(mac, "up" if after.monitor else "gone")
        if state == "up" and now != "up":
            found.append(Change(f"its network link {mac} was up and is {now}", True))
    return found
