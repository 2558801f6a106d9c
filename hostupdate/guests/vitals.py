"""Looks at running guests for what would hang a run, and for what a run has made worse."""

from __future__ import annotations

import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import libvirt
import msgspec

from hostupdate.durations import MILLISECOND, format_duration
from hostupdate.errors import AgentError, DeadlineError, HypervisorError
from hostupdate.guests.agent import Agents
from hostupdate.guests.hypervisor import Hypervisor
from hostupdate.guests.links import interfaces, link_state
from hostupdate.guests.workers import Worker
from hostupdate.vitals import Vitals

#: (files, timeout_ns) -> what is wrong with each file, given as (pid, path); host.storage.
StorageProbe = Callable[[Sequence[tuple[int, str]], int], Mapping[tuple[int, str], str]]
#: (pid, patience_ns) -> why threads of that process cannot run; host.threads.
ThreadsProbe = Callable[[int, int], str]

T = TypeVar("T")

_FAILURES = (HypervisorError, DeadlineError, libvirt.libvirtError)
_AGENT_CHANNEL = "org.qemu.guest_agent.0"
_POLL_S = 0.02
_OPERATION = "VIR_DOMAIN_JOB_OPERATION_"
_JOBS = {
    getattr(libvirt, name): name.removeprefix(_OPERATION).lower().replace("_", " ")
    for name in dir(libvirt)
    if name.startswith(_OPERATION)
}


class VitalSigns:
    """The vital signs of an open connection's guests."""

    def __init__(
        self, hypervisor: Hypervisor, *, storage: StorageProbe, threads: ThreadsProbe
    ) -> None:
        self._hypervisor = hypervisor
        self._storage = storage
        self._threads = threads

    def look(self, guests: Sequence[tuple[str, int]], timeout_ns: int) -> dict[str, Vitals]:
        """Looks at the running guests, given as (uuid, pid of its QEMU), all at once.

        Never raises for a guest: what does not answer is told in its vitals, and keeps no other
        from being looked at. Takes little more than twice ``timeout_ns`` at most, milliseconds
        where all is well. Nothing is changed; a question that QEMU does not answer stays with it,
        and keeps libvirt's job lock of that one guest until it does.
        """
        looks = [_Look(uuid, pid, self._hypervisor, self._threads) for uuid, pid in guests]
        try:
            return self._look(looks, timeout_ns)
        finally:
            deadline_ns = time.monotonic_ns() + timeout_ns // 10
            for call in [look.worker.submit("close", look.close) for look in looks]:
                with suppress(DeadlineError, libvirt.libvirtError):
                    call.result(deadline_ns, timeout_ns)
            for look in looks:
                look.worker.close()

    def _look(self, looks: Sequence[_Look], timeout_ns: int) -> dict[str, Vitals]:
        found: dict[str, Vitals] = {}
        deadline_ns = time.monotonic_ns() + timeout_ns
        for look, call in [(look, look.worker.submit("libvirt", look.describe)) for look in looks]:
            try:
                call.result(deadline_ns, timeout_ns)
            except _FAILURES as error:
                found[look.uuid] = Vitals(monitor=str(error))
        known = [look for look in looks if look.uuid not in found]
        deadline_ns = time.monotonic_ns() + timeout_ns
        calls = [
            (look, look.worker.submit("QEMU", partial(look.ask, deadline_ns - timeout_ns // 10)))
            for look in known
        ]
        files = [file for look in known for disk in look.disks.values() for file in disk]
        storage = self._storage(files, timeout_ns)
        for look, answer in calls:
            try:
                vitals = answer.result(deadline_ns, timeout_ns)
            except _FAILURES as error:
                vitals = Vitals(monitor=str(error))
            disks = {
                target: next((storage[file] for file in disk if storage[file]), "")
                for target, disk in look.disks.items()
            }
            found[look.uuid] = msgspec.structs.replace(vitals, disks=disks, links=look.links)
        return found


class _Look:
    """One guest in a look, with a connection and a thread of its own."""

    def __init__(self, uuid: str, pid: int, hypervisor: Hypervisor, threads: ThreadsProbe) -> None:
        self.uuid = uuid
        self.worker = Worker(f"look-{uuid[:8]}")
        self.disks: dict[str, list[tuple[int, str]]] = {}
        self.links: dict[str, str] = {}
        self._pid = pid
        self._hypervisor = hypervisor
        self._threads = threads
        self._own: Hypervisor | None = None
        self._has_agent = False

    def describe(self) -> None:
        """Connects, and reads the live XML, for which libvirt does not ask QEMU."""
        self._own = self._hypervisor.apart()
        xml = self._own.call(
            "describe a guest", lambda c: c.lookupByUUIDString(self.uuid).XMLDesc()
        )
        self.disks = {target: [(self._pid, p) for p in paths] for target, paths in disk_paths(xml)}
        self.links = {mac: link_state(device) for mac, device in interfaces(xml).items()}
        channels = ET.fromstring(xml).iterfind("devices/channel/target")
        self._has_agent = any(channel.get("name") == _AGENT_CHANNEL for channel in channels)

    def ask(self, deadline_ns: int) -> Vitals:
        """Asks QEMU and the agent, unless QEMU cannot answer: no call is left waiting for it."""
        stuck = self._threads(self._pid, _left_ns(deadline_ns) // 2)
        if stuck:
            return Vitals(stuck=stuck)
        job = ""
        try:
            patience_ns = time.monotonic_ns() + _left_ns(deadline_ns) * 3 // 4
            job = self._call("a libvirt job", partial(_job, patience_ns), deadline_ns)
            self._call("QEMU's monitor", _round_trip, deadline_ns)
        except (HypervisorError, DeadlineError) as error:
            return Vitals(job=job, monitor=str(error))
        agent, ticking = self._ask_agent(deadline_ns) if self._has_agent else (None, None)
        return Vitals(agent=agent, ticking=ticking, job=job)

    def close(self) -> None:
        """Closes the connection."""
        if self._own is not None:
            self._hypervisor.let_go(self._own)

    def _ask_agent(self, deadline_ns: int) -> tuple[bool | None, bool | None]:
        """Whether it answers, and whether its clock moves between two answers."""
        assert self._own is not None
        agents = Agents(self._own)
        command = {"execute": "guest-get-time"}
        try:
            first, second = (
                agents.ask(self.uuid, lambda _: command, _left_ns(deadline_ns)).value
                for _ in range(2)
            )
        except AgentError as error:
            return (None if error.missing else error.refused), None
        except (HypervisorError, DeadlineError):
            return False, None
        if isinstance(first, int) and isinstance(second, int):
            return True, second > first
        return True, None

    def _call(self, what: str, ask: Callable[[Any], T], deadline_ns: int) -> T:
        assert self._own is not None
        return self._own.call(
            what, lambda c: ask(c.lookupByUUIDString(self.uuid)), _left_ns(deadline_ns)
        )


def _left_ns(deadline_ns: int) -> int:
    return max(1, deadline_ns - time.monotonic_ns())


def _job(patience_ns: int, domain: Any) -> str:
    """The name of the guest's libvirt job, or empty.

    To ask for it takes the guest's job lock, for which libvirt lets a call wait for 30 s. Whether
    somebody holds that lock is told without it (qemuDomainGetControlInfo), so that is looked at
    until ``patience_ns`` (CLOCK_MONOTONIC) first; HypervisorError where it is not let go of.
    """
    while True:
        control, detail, since_ms = domain.controlInfo()
        if control in (libvirt.VIR_DOMAIN_CONTROL_OK, libvirt.VIR_DOMAIN_CONTROL_JOB):
            break
        if detail == libvirt.VIR_DOMAIN_CONTROL_ERROR_REASON_MONITOR:
            raise HypervisorError("libvirt has lost the connection to its monitor")
        if time.monotonic_ns() >= patience_ns:
            waits = f"for {format_duration(since_ms * MILLISECOND)} " if since_ms else ""
            raise HypervisorError(f"another libvirt call has held its job lock {waits}all along")
        time.sleep(_POLL_S)
    try:
        job = domain.jobStats()
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_OPERATION_UNSUPPORTED:
            return "migration in"  # it has statistics on the other host only
        raise
    if job["type"] == libvirt.VIR_DOMAIN_JOB_NONE:
        return ""
    return _JOBS.get(job.get("operation", 0), "unknown")


def _round_trip(domain: Any) -> None:
    """A question that libvirt always hands on to QEMU and that needs no device: it is
    query-migrate-parameters (qemuDomainMigrateGetMaxDowntime). It touches no storage, as
    query-block would, and leaves no taint, as a monitor command of ours would."""
    domain.migrateGetMaxDowntime()


def disk_paths(xml: str) -> list[tuple[str, list[str]]]:
    """Each disk's target and the paths of this host that it lies on, backing files included.

    Not those of a host's own CD drive: to open it would move its tray.
    """
    found = []
    for disk in ET.fromstring(xml).iterfind("devices/disk"):
        target = disk.find("target")
        drive = disk.get("device") in ("cdrom", "floppy") and disk.get("type") == "block"
        sources = [] if drive else disk.iter("source")
        paths = [path for s in sources if (path := s.get("file") or s.get("dev"))]
        if target is not None:
            found.append((str(target.get("dev")), paths))
    return found
