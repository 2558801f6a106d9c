"""The domain XML in a save image: whose it is, and by which QEMU it is restored."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass
from uuid import UUID
from xml.parsers import expat
from xml.sax.saxutils import escape

from hostupdate.errors import ImageError

_REMEDY = "check the guest's definition: `virsh managedsave-dumpxml GUEST`"
_OPEN, _CLOSE = b"<emulator>", b"</emulator>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """A guest as its XML has it; ``machine`` and ``emulator`` are empty where it does not say."""

    name: str
    uuid: UUID
    machine: str
    emulator: str


def parse(xml: str, source: str) -> Domain:
    """Raises ``ImageError``, with ``source`` as the name of the XML, where it is no domain's."""
    try:
        root = ET.fromstring(xml)
        if root.tag != "domain":
            raise ValueError(f"<{root.tag}>, expected <domain>")
        kind = root.find("os/type")
        return Domain(
            name=root.findtext("name", ""),
            uuid=UUID(root.findtext("uuid", "")),
            machine="" if kind is None else kind.get("machine", ""),
            emulator=root.findtext("devices/emulator", ""),
        )
    except (ET.ParseError, ValueError) as error:
        raise ImageError(source, "XML", None, str(error), remedy=_REMEDY) from error


def with_emulator(xml: str, emulator: str, source: str) -> str:
    """``xml`` with ``emulator``, an absolute path, as the domain's; all else to the byte as it is.

    Raises ``ImageError`` unless the domain has just one emulator.
    """
    if not emulator.startswith("/") or not emulator.isprintable():
        problem = f"{emulator!r} is no absolute path"
        raise ImageError(source, "domain/devices/emulator", None, problem, remedy=_REMEDY)
    raw = xml.encode()
    path: list[str] = []
    begins: list[int] = []
    ends: list[int] = []
    parser = expat.ParserCreate("UTF-8")

    def started(name: str, _attributes: object) -> None:
        path.append(name)
        if path == ["domain", "devices", "emulator"]:
            begins.append(parser.CurrentByteIndex)

    def ended(_name: str) -> None:
        if path == ["domain", "devices", "emulator"]:
            ends.append(parser.CurrentByteIndex)
        path.pop()

    parser.StartElementHandler = started
    parser.EndElementHandler = ended
    try:
        parser.Parse(raw, True)
    except expat.ExpatError as error:
        raise ImageError(source, "XML", None, str(error), remedy=_REMEDY) from error
    if len(begins) != 1:
        problem = f"{len(begins)} of them, expected one"
        raise ImageError(source, "domain/devices/emulator", None, problem, remedy=_REMEDY)
    begin, end = begins[0] + len(_OPEN), ends[0]
    if raw[begins[0] : begin] != _OPEN or raw[end : end + len(_CLOSE)] != _CLOSE:
        problem = "not written as libvirt writes it"
        raise ImageError(source, "domain/devices/emulator", begins[0], problem, remedy=_REMEDY)
    return (raw[:begin] + escape(emulator).encode() + raw[end:]).decode()
