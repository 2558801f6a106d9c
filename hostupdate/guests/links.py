"""Guests' network links, as if somebody pulled a cable and put it back."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from typing import Any

import libvirt

from hostupdate.guests.hypervisor import Hypervisor


class Links:
    """The links of an open connection's guests, named by MAC address. Errors are those of
    :class:`Hypervisor`."""

    def __init__(self, hypervisor: Hypervisor) -> None:
        self._hypervisor = hypervisor

    def up(self, uuid: str) -> tuple[str, ...]:
        """The links of a running guest that are up."""

        def run(connection: Any) -> tuple[str, ...]:
            found = interfaces(connection.lookupByUUIDString(uuid).XMLDesc())
            return tuple(mac for mac, device in found.items() if link_state(device) == "up")

        return self._hypervisor.call("look at network links", run)

    def set(self, uuid: str, macs: Sequence[str], state: str) -> None:
        """``state`` is up or down. A link that is gone, or is so already, is no error; nor is a
        daemon that was started anew since the last call."""
        self._hypervisor.revive()

        def run(connection: Any) -> None:
            domain = connection.lookupByUUIDString(uuid)
            for mac, device in interfaces(domain.XMLDesc()).items():
                if mac in macs and link_state(device) != state:
                    link = device.find("link")
                    if link is None:
                        link = ET.SubElement(device, "link")
                    link.set("state", state)
                    xml = ET.tostring(device, encoding="unicode")
                    domain.updateDeviceFlags(xml, libvirt.VIR_DOMAIN_AFFECT_LIVE)

        self._hypervisor.call(f"set network links {state}", run)


def interfaces(xml: str) -> dict[str, ET.Element]:
    """The interfaces of a domain's XML by MAC address."""
    found = ET.fromstring(xml).iterfind("devices/interface")
    return {str(mac.get("address")): i for i in found if (mac := i.find("mac")) is not None}


def link_state(device: ET.Element) -> str:
    """An interface's link: up or down."""
    link = device.find("link")
    return "up" if link is None else str(link.get("state", "up"))
