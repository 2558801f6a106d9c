"""The domain XML in a save image: whose it is, by which QEMU it is restored, and at whose word."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass
from uuid import UUID
from xml.sax.saxutils import escape

from hostupdate.errors import ImageError
from hostupdate.xmltext import Place, edited, places

_REMEDY = "check the guest's definition: `virsh managedsave-dumpxml GUEST`"
#: Of what is in the metadata of a guest that we let libvirt restore, until it is through.
NAMESPACE = "urn:hostupdate:ticket:1"


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
    found = [e for e in _places(raw, source) if e.path == "domain/devices/emulator"]
    if len(found) != 1:
        problem = f"{len(found)} of them, expected one"
        raise ImageError(source, "domain/devices/emulator", None, problem, remedy=_REMEDY)
    new = f"<emulator>{escape(emulator)}</emulator>".encode()
    return edited(raw, [(found[0].start, found[0].end, new)]).decode()


def with_ticket(xml: str, ticket: str, source: str) -> str:
    """``xml`` with ``ticket``, plain words, in the domain's metadata, which libvirt keeps as they
    are and shows to hooks; in place of one that is there. ImageError: no domain's XML."""
    raw = xml.encode()
    found = _places(raw, source)
    edits = [
        (e.start, e.end, b"") for e in found if e.attributes.get("xmlns:hostupdate") == NAMESPACE
    ]
    element = f'<hostupdate:ticket xmlns:hostupdate="{NAMESPACE}">{ticket}</hostupdate:ticket>'
    metadata = next((e for e in found if e.path == "domain/metadata"), None)
    uuid = next((e for e in found if e.path == "domain/uuid"), None)
    if metadata is not None:
        begun = raw.index(b">", metadata.start) + 1
        if begun == metadata.end:  # <metadata/>
            new = f"<metadata>{element}</metadata>".encode()
            edits.append((metadata.start, metadata.end, new))
        else:
            edits.append((begun, begun, element.encode()))
    elif uuid is not None:
        edits.append((uuid.end, uuid.end, f"<metadata>{element}</metadata>".encode()))
    else:
        raise ImageError(source, "domain/uuid", None, "there is none", remedy=_REMEDY)
    return edited(raw, edits).decode()


def _places(raw: bytes, source: str) -> list[Place]:
    try:
        return places(raw)
    except ValueError as error:
        raise ImageError(source, "XML", None, str(error), remedy=_REMEDY) from error
