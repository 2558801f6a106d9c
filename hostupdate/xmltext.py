"""Where elements stand in an XML text: what edits one leaves all else to the byte as it was."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from xml.parsers import expat


@dataclass(slots=True)
class Place:
    """One element, ``path`` as ``domain/devices/emulator``; ``start`` to ``end``, in bytes, is all
    of it."""

    path: str
    attributes: dict[str, str]
    start: int
    end: int = 0


def places(content: bytes) -> list[Place]:
    """Every element, in the order in which they begin. ValueError: no well-formed XML."""
    found: list[Place] = []
    open_: list[Place] = []
    hollow: list[bool] = []  #: of those that are open: nothing has come in it
    parser = expat.ParserCreate("UTF-8")

    def start(name: str, attributes: dict[str, str]) -> None:
        path = f"{open_[-1].path}/{name}" if open_ else name
        inside("")
        hollow.append(True)
        open_.append(Place(path, attributes, parser.CurrentByteIndex))
        found.append(open_[-1])

    def inside(_what: str) -> None:
        if hollow:
            hollow[-1] = False

    def end(_name: str) -> None:
        place, at = open_.pop(), parser.CurrentByteIndex
        # For <empty/> expat stands behind it already, else before its end tag.
        empty = hollow.pop() and content.endswith(b"/>", 0, at)
        place.end = at if empty else content.index(b">", at) + 1

    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.DefaultHandler = inside  # texts, comments and all else
    try:
        parser.Parse(content, True)
    except expat.ExpatError as error:
        raise ValueError(str(error)) from error
    return found


def edited(content: bytes, edits: Iterable[tuple[int, int, bytes]]) -> bytes:
    """With each ``(start, end, new)`` in place of what stood there; they do not overlap."""
    for start, end, new in sorted(edits, reverse=True):
        content = content[:start] + new + content[end:]
    return content
