"""The libvirt XML of a lab guest."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from hostupdate.guestpolicy import NAMESPACE
from hostupdate.lab.accelerator import Acceleration
from hostupdate.lab.image import GuestImage

AGENT_CHANNEL = "org.qemu.guest_agent.0"

#: Shorten the boot under TCG; none of it changes what a running guest does.
_QUICK_BOOT = (
    "mitigations=off lsm= audit=0 cryptomgr.notests initcall_blacklist=init_kprobe_trace "
    "random.trust_cpu=on nokaslr"
)
#: The other clocks of an emulated PC wrap within seconds of a freeze (PM timer 4.7 s, HPET 43 s),
#: so that the kernel must neither use them nor let them testify against the TSC.
_CLOCK = "tsc=reliable"


@dataclass(frozen=True, slots=True, kw_only=True)
class Witness:
    """How hard the guest's own program works.

    ``fill`` is a part of the free RAM (``50%``) or a size (``64M``), ``rate_ms`` the distance of
    two ticks in ms, ``load`` adds a child that keeps the vCPU busy.
    """

    fill: str = "50%"
    rate_ms: int = 200
    load: bool = False

    def command_line(self) -> str:
        """The words for the kernel command line."""
        return f"hu.fill={self.fill} hu.rate={self.rate_ms} hu.load={int(self.load)}"


def kernel_command_line(witness: Witness) -> str:
    """The whole command line. A guest that panics reboots, and QEMU ends at a reboot."""
    return f"console=ttyS0 loglevel=4 panic=-1 {_CLOCK} {_QUICK_BOOT} {witness.command_line()}"


def domain_xml(
    *,
    name: str,
    uuid: UUID,
    memory_bytes: int,
    image: GuestImage,
    acceleration: Acceleration,
    console: Path,
    witness: Witness | None = None,
    metadata: Mapping[str, str] | None = None,
    ram_in_files: bool = False,
) -> str:
    """The domain's XML: one vCPU, a serial console into the file ``console``, an agent channel.

    No disk, network, balloon, video or USB. RAM is a shared memfd, or ``ram_in_files``: below
    libvirt's ``memory_backing_dir``, as a handover needs it. ``metadata`` holds
    ``urn:hostupdate:guest:1`` elements by name (``{"update-domain": "1"}``); None leaves the
    ``<metadata>`` element out. Pure; raises nothing.
    """
    domain = ET.Element("domain", type=acceleration.domain_type)
    _add(domain, "name", name)
    _add(domain, "uuid", str(uuid))
    if metadata is not None:
        _metadata(domain, metadata)
    _add(domain, "memory", str(memory_bytes // 1024), unit="KiB")
    _add(domain, "vcpu", "1")
    backing = _add(domain, "memoryBacking")
    _add(backing, "source", type="file" if ram_in_files else "memfd")
    _add(backing, "access", mode="shared")
    system = _add(domain, "os")
    _add(system, "type", "hvm", arch="x86_64", machine="pc")
    _add(system, "kernel", str(image.kernel))
    _add(system, "initrd", str(image.initramfs))
    _add(system, "cmdline", kernel_command_line(witness or Witness()))
    # Without ACPI and APIC the guest gets no interrupt from its virtio devices.
    features = _add(domain, "features")
    _add(features, "acpi")
    _add(features, "apic")
    if acceleration.kind == "kvm":
        _add(domain, "cpu", mode="host-passthrough")
    _add(domain, "clock", offset="utc")
    for event in ("on_poweroff", "on_reboot", "on_crash"):
        _add(domain, event, "destroy")
    devices = _add(domain, "devices")
    _add(devices, "emulator", str(acceleration.emulator))
    _add(devices, "controller", type="usb", model="none")
    serial = _add(devices, "serial", type="file")
    _add(serial, "source", path=str(console), append="on")
    _add(serial, "target", port="0")
    channel = _add(devices, "channel", type="unix")
    _add(channel, "target", type="virtio", name=AGENT_CHANNEL)
    _add(devices, "memballoon", model="none")
    ET.indent(domain)
    return ET.tostring(domain, encoding="unicode")


def _add(parent: ET.Element, tag: str, text: str | None = None, **attributes: str) -> ET.Element:
    element = ET.SubElement(parent, tag, attributes)
    element.text = text
    return element


def _metadata(domain: ET.Element, values: Mapping[str, str]) -> None:
    guest = _add(_add(domain, "metadata"), "hu:guest", **{"xmlns:hu": NAMESPACE})
    for name, value in values.items():
        _add(guest, f"hu:{name}", value)
