"""Domains that libvirt is asked to start, to see whether it can, and that are ended at once.

They end with the connection that started them (VIR_DOMAIN_START_AUTODESTROY), which a daemon that
is started anew has forgotten.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import libvirt

from hostupdate import faults

_HOOK_PROBE = "hostupdate-hook-probe"
_EMULATOR_PROBE = "hostupdate-emulator-probe"  #: which the hook lets pass
#: Names of theirs. One of each name can be there at a time.
PROBES = frozenset({_HOOK_PROBE, _EMULATOR_PROBE})
_THROWN_AWAY = libvirt.VIR_DOMAIN_START_PAUSED | libvirt.VIR_DOMAIN_START_AUTODESTROY


def hook_is_called(connection: Any, uuid: str) -> bool:
    """Whether libvirt asks our hook before it starts a guest like this one: it is asked to start
    one of a name that the hook refuses before there is a QEMU."""
    try:
        _start_and_end(connection, _probe(connection, uuid, _HOOK_PROBE))
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_HOOK_SCRIPT_FAILED:
            return True
        raise
    return False


def try_emulator(connection: Any, uuid: str, emulator: Path) -> None:
    """Has ``emulator`` started for a domain of the guest's kind, on its default machine; libvirt's
    own error where it cannot be."""
    _start_and_end(connection, _probe(connection, uuid, _EMULATOR_PROBE, emulator))


def _start_and_end(connection: Any, xml: str) -> None:
    end(connection)  # of a run that died
    domain = connection.createXML(xml, _THROWN_AWAY)
    faults.point("probe.started")
    domain.destroy()


def end(connection: Any) -> None:
    """Ends probes that are there. No error where there is none."""
    for name in PROBES:
        try:
            connection.lookupByName(name).destroy()
        except libvirt.libvirtError as error:
            # The second: it has ended meanwhile.
            gone = (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID)
            if error.get_error_code() not in gone:
                raise


def _probe(connection: Any, uuid: str, name: str, emulator: Path | None = None) -> str:
    """The least domain of the guest's kind; under another ``emulator`` with its default machine."""
    like = ET.fromstring(connection.lookupByUUIDString(uuid).XMLDesc())
    probe = ET.Element("domain", type=like.get("type", "qemu"))
    ET.SubElement(probe, "name").text = name
    ET.SubElement(probe, "memory", unit="KiB").text = "1024"
    kind = like.find("os/type")
    if kind is not None:
        kind.tail = None
        if emulator is not None:
            kind.attrib.pop("machine", None)
        ET.SubElement(probe, "os").append(kind)
    # Without ACPI libvirt 9.0 says -no-acpi, which QEMU does not know any more since 9.0.
    acpi = like.find("features/acpi")
    if acpi is not None:
        ET.SubElement(ET.SubElement(probe, "features"), "acpi")
    devices = ET.SubElement(probe, "devices")
    ET.SubElement(devices, "emulator").text = (
        str(emulator) if emulator is not None else like.findtext("devices/emulator")
    )
    return ET.tostring(probe, encoding="unicode")
