"""What taking a guest's QEMU away and giving it another needs of libvirt.

libvirt knows nothing of QEMU's x-ignore-shared and leaves it as it is (qemu_migration_params.c):
what sets it must unset it. A managed save stops the guest, writes its image and ends its QEMU; an
error, or the daemon's death, before the last of these lets the guest go on (qemu_driver.c,
qemu_process.c: qemuProcessRecoverJob).
"""

from __future__ import annotations

import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import libvirt
import libvirt_qemu

from hostupdate.errors import DeadlineError, HypervisorError
from hostupdate.guests import probing, streaming
from hostupdate.guests.hypervisor import _STATES, Hypervisor, _let_run
from hostupdate.model import GuestState
from hostupdate.parked import DomainFacts, Stamp

T = TypeVar("T")

#: A guest that has been restored and is paused says "migration" (qemuProcessStart).
_BUSY = {libvirt.VIR_DOMAIN_PAUSED_SAVE, libvirt.VIR_DOMAIN_PAUSED_STARTING_UP}
_EVENT_S = 1.0


class Parking:
    """Guests of an open connection. Errors are those of :class:`Hypervisor`; ``life_ns`` bounds
    what starts or ends a QEMU."""

    def __init__(self, hypervisor: Hypervisor, *, life_ns: int) -> None:
        self._hypervisor = hypervisor
        self._life_ns = life_ns
        self._watched: Any = None
        self._changed = threading.Condition()
        self._probing = threading.Lock()
        self._stamps: dict[tuple[str, str], Stamp] = {}

    def facts(self, uuid: str) -> DomainFacts | None:
        """None where libvirt knows no such guest."""

        def ask(connection: Any) -> DomainFacts | None:
            try:
                domain = connection.lookupByUUIDString(uuid)
                number, reason = domain.state()
                active = bool(domain.isActive())
                return DomainFacts(
                    name=domain.name(),
                    state=_STATES.get(number, GuestState.UNKNOWN),
                    busy=number == libvirt.VIR_DOMAIN_PAUSED and reason in _BUSY,
                    restored=number == libvirt.VIR_DOMAIN_PAUSED
                    and reason == libvirt.VIR_DOMAIN_PAUSED_MIGRATION,
                    persistent=bool(domain.isPersistent()),
                    memory_bytes=domain.info()[1] * 1024,
                    **_described(domain.XMLDesc(), active),
                )
            except libvirt.libvirtError as error:
                if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                    return None
                raise

        return self._call("inspect a guest", ask)

    def set_ignore_shared(self, uuid: str, on: bool) -> None:
        """A save leaves out RAM that lies in files, or does not. Taints the instance for libvirt
        ("custom-monitor"): a line in its log. A DeadlineError leaves it off, whenever the command
        is done."""
        self._of(
            "set x-ignore-shared",
            uuid,
            lambda domain: streaming.ignore_shared(domain, on),
            on_late=streaming.heed_shared,
        )

    def ignores_shared(self, uuid: str) -> bool:
        """Whether a save would leave out RAM that lies in files."""
        found = self._monitor(uuid, "query-migrate-capabilities", {})
        return any(each["capability"] == "x-ignore-shared" and each["state"] for each in found)

    def managed_save(self, uuid: str) -> None:
        """To where libvirt keeps such an image.

        Not with VIR_DOMAIN_SAVE_PAUSED: a save that fails would then leave the guest stopped
        (qemuDomainSaveInternal takes the flag for what the guest was).
        """
        self._drop(uuid, "STOP")
        self._of("save a guest", uuid, lambda domain: domain.managedSave(), self._life_ns)

    def save(self, uuid: str, path: Path) -> None:
        """To ``path``: how a guest without a definition is saved."""
        self._drop(uuid, "STOP")
        self._of("save a guest", uuid, lambda domain: domain.save(str(path)), self._life_ns)

    def description(self, uuid: str) -> tuple[str, str]:
        """XML and cookie as a save image of the guest has them.

        The XML is that which libvirt sends in a migration; whoever restores it leaves out what
        belongs to this instance only (qemuMigrationSrcBeginXML, VIR_DOMAIN_DEF_PARSE_INACTIVE). The
        cookie is the CPU as the guest sees it (qemuDomainSaveCookieFormat).
        """

        def ask(domain: Any) -> tuple[str, str]:
            secure = libvirt.VIR_DOMAIN_XML_SECURE
            live = ET.fromstring(domain.XMLDesc(secure))
            cookie = ET.Element("cookie")
            cpu = live.find("cpu")
            if cpu is not None:
                for numa in cpu.findall("numa"):
                    cpu.remove(numa)
                cookie.append(cpu)
            if not any(_has_helper_less_slirp(each) for each in live.iterfind("devices/interface")):
                ET.SubElement(cookie, "slirpHelper")
            xml = domain.XMLDesc(secure | libvirt.VIR_DOMAIN_XML_MIGRATABLE)
            return xml, ET.tostring(cookie, encoding="unicode")

        return self._of("describe a guest", uuid, ask)

    def stream(self, uuid: str, fd: int) -> None:
        """Stops the guest and has QEMU write its state to ``fd``, a pipe that somebody reads on
        another thread: QEMU answers nothing while it writes.

        Of what a DeadlineError leaves under way, that which succeeds later is taken back at that
        moment; for the rest there is :meth:`cancel`.
        """
        self._drop(uuid, "STOP")
        lent = streaming.Lent(fd)
        try:
            self._of(
                "save a guest", uuid, lambda domain: streaming.give(domain, lent),
                on_late=streaming.take_back,
            )  # fmt: skip
        finally:
            lent.end()
        ran = self.status(uuid) == "running"
        if ran:
            self._of("stop a guest", uuid, streaming.stop, on_late=streaming.go_on)

        def take_back(domain: Any) -> None:
            with suppress(libvirt.libvirtError, HypervisorError):
                streaming.end(domain)
            if ran:
                streaming.go_on(domain)

        self._of("save a guest", uuid, streaming.start, on_late=take_back)

    def stream_state(self, uuid: str) -> str:
        """What QEMU says of that: ``completed`` when it is through."""
        return str(self._monitor(uuid, "query-migrate", {}).get("status", "none"))

    def status(self, uuid: str) -> str:
        """What QEMU says that the guest does: ``postmigrate`` after a save, until it is resumed."""
        return str(self._monitor(uuid, "query-status", {})["status"])

    def cancel(self, uuid: str) -> None:
        """Ends a save under way, libvirt's or ours. No error where there is none, or where nobody
        answers."""
        with suppress(HypervisorError, DeadlineError):
            try:
                self._of("end a save", uuid, lambda domain: domain.abortJob())
            except HypervisorError:  # libvirt knows of none
                self._of("end a save", uuid, streaming.end)

    def restore(self, path: Path) -> None:
        """A guest from an image; it is paused then."""
        flags = libvirt.VIR_DOMAIN_SAVE_PAUSED
        self._call(
            "restore a guest", lambda conn: conn.restoreFlags(str(path), None, flags), self._life_ns
        )

    def resume(self, uuid: str) -> None:
        """Lets the guest run; no error where it does."""
        self._drop(uuid, "RESUME")
        self._of("resume a guest", uuid, _let_run)

    def destroy(self, uuid: str) -> None:
        """Ends the guest's QEMU at once; no error where it has none."""

        def end(domain: Any) -> None:
            try:
                domain.destroy()
            except libvirt.libvirtError:
                if domain.isActive():
                    raise

        self._of("end a guest's QEMU", uuid, end, self._life_ns)

    def forget_save(self, uuid: str) -> None:
        """Removes libvirt's image of the guest. HypervisorError: also where there is none."""
        self._of("remove a saved image", uuid, lambda domain: domain.managedSaveRemove())

    def drop_metadata(self, uuid: str, namespace: str) -> None:
        """Takes what is there of that namespace out of the metadata of a guest that has a QEMU. No
        error where nothing is there, or the guest has none."""

        def drop(connection: Any) -> None:
            kind, live = libvirt.VIR_DOMAIN_METADATA_ELEMENT, libvirt.VIR_DOMAIN_AFFECT_LIVE
            try:
                domain = connection.lookupByUUIDString(uuid)
                domain.setMetadata(kind, None, None, namespace, live)
            except libvirt.libvirtError as error:
                # The second: it has no QEMU.
                gone = (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID)
                if error.get_error_code() not in gone:
                    raise

        self._call("change a guest's metadata", drop)

    def hook_is_called(self, uuid: str) -> bool:
        """Whether libvirt asks our hook before it starts a guest like this one."""

        def ask(connection: Any) -> bool:
            return probing.hook_is_called(connection, uuid)

        with self._probing:  # its name is the same for all
            return self._call("try libvirt's hook", ask, self._life_ns)

    def try_emulator(self, uuid: str, emulator: Path) -> None:
        """Has libvirt start ``emulator`` for a domain of the guest's kind, under the user and the
        security driver that guests have, and ends it again. HypervisorError: libvirt cannot, in its
        words."""

        def start(connection: Any) -> None:
            probing.try_emulator(connection, uuid, emulator)

        with self._probing:
            try:
                self._call(f"start {emulator}", start, self._life_ns)
            except HypervisorError as error:
                error.remedy = (
                    f"see that the user of libvirt's QEMUs may run {emulator}, and that AppArmor "
                    "or SELinux lets libvirt start it there"
                )
                raise

    def end_probes(self) -> None:
        """Ends what a probe has left: a daemon that was started anew has forgotten that its QEMU
        goes with our connection. No error where there is nothing."""
        with self._probing:
            self._call("end a probe", probing.end, self._life_ns)

    def stopped(self, uuid: str) -> Stamp | None:
        """The STOP event of its last save; waits a little for one that is on its way."""
        return self._stamp(uuid, "STOP")

    def resumed(self, uuid: str) -> Stamp | None:
        """The RESUME event of its last resume, likewise."""
        return self._stamp(uuid, "RESUME")

    def _stamp(self, uuid: str, event: str) -> Stamp | None:
        with self._changed:
            self._changed.wait_for(lambda: (uuid, event) in self._stamps, _EVENT_S)
            return self._stamps.get((uuid, event))

    def _drop(self, uuid: str, event: str) -> None:
        with self._changed:
            self._stamps.pop((uuid, event), None)

    def _event(
        self, _c: Any, domain: Any, event: str, seconds: int, micros: int, _d: Any, _o: Any
    ) -> None:
        realtime_ns = seconds * 1_000_000_000 + micros * 1000
        monotonic_ns = realtime_ns - time.time_ns() + time.monotonic_ns()
        with self._changed:
            stamp = Stamp(realtime_ns=realtime_ns, monotonic_ns=monotonic_ns)
            self._stamps[domain.UUIDString(), event] = stamp
            self._changed.notify_all()

    def _monitor(self, uuid: str, command: str, arguments: dict[str, Any]) -> Any:
        return self._of(command, uuid, lambda domain: streaming.command(domain, command, arguments))

    def _of(
        self,
        what: str,
        uuid: str,
        run: Callable[[Any], T],
        timeout_ns: int | None = None,
        on_late: Callable[[T], None] | None = None,
    ) -> T:
        return self._call(
            what, lambda conn: run(conn.lookupByUUIDString(uuid)), timeout_ns, on_late
        )

    def _call(
        self,
        what: str,
        run: Callable[[Any], T],
        timeout_ns: int | None = None,
        on_late: Callable[[T], None] | None = None,
    ) -> T:
        self._hypervisor.revive()

        def watched(connection: Any) -> T:
            if self._watched is not connection:
                flags = libvirt_qemu.VIR_CONNECT_DOMAIN_QEMU_MONITOR_EVENT_REGISTER_REGEX
                with suppress(libvirt.libvirtError):  # then nothing is measured
                    libvirt_qemu.qemuMonitorEventRegister(
                        connection, None, "^(STOP|RESUME)$", self._event, None, flags
                    )
                self._watched = connection
            return run(connection)

        return self._hypervisor.call(what, watched, timeout_ns, on_late)


def _has_helper_less_slirp(interface: ET.Element) -> bool:
    """QEMU's own user network, which libvirt must not replace by a helper at the restore."""
    return interface.get("type") == "user" and interface.find("backend") is None


def _described(xml: str, active: bool) -> dict[str, Any]:
    domain = ET.fromstring(xml)
    problem = ""
    label = domain.find("seclabel[@model='selinux'][@type='dynamic']")
    if active and label is not None:
        problem = (
            "SELinux gives each QEMU another label, and its RAM files would keep the old one; "
            "not supported yet"
        )
    return {"emulator": domain.findtext("devices/emulator") or "", "problem": problem}
