"""The changes that make a guest eligible at its next start, as texts: everything that is not
changed stays as it was written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from xml.etree import ElementTree
from xml.parsers import expat

from hostupdate.errors import InputError, RefusedError

_MEMORY_BACKING = "domain/memoryBacking"
#: Elements whose attribute may make a part of the RAM private again.
_PRIVATE = {"domain/cpu/numa/cell": "memAccess", "domain/devices/memory": "access"}
_SETTING = re.compile(r"^[ \t]*memory_backing_dir[ \t]*=.*$", re.MULTILINE)
_COMMENTED = re.compile(r"^#[ \t]*memory_backing_dir[ \t]*=.*$", re.MULTILINE)


def remedy_changes(
    domain_xml: str, qemu_conf: str, memory_backing_dir: str, *, on_hugetlbfs: bool = False
) -> tuple[str, str]:
    """The inactive ``domain_xml`` and the text of qemu.conf, changed: RAM in a named shared file
    below ``memory_backing_dir``. The same texts where nothing is to be done.

    A guest on huge pages keeps them only where the directory is ``on_hugetlbfs``; RefusedError
    else. InputError for what is no domain XML, or a directory that qemu.conf cannot name.
    """
    if not re.fullmatch(r'/[^"\\\n]+', memory_backing_dir):
        raise InputError(
            "memory_backing_dir",
            "",
            f"{memory_backing_dir!r} is no absolute path without quotes",
            remedy="name a directory on tmpfs or hugetlbfs",
        )
    setting = f'memory_backing_dir = "{memory_backing_dir}"'
    return _change_domain(domain_xml, on_hugetlbfs), _change_conf(qemu_conf, setting)


def _change_conf(text: str, setting: str) -> str:
    """Every line that sets it is changed; a commented one shows the place."""
    if _SETTING.search(text):
        return _SETTING.sub(lambda _: setting, text)
    commented = list(_COMMENTED.finditer(text))
    if commented:
        end = commented[-1].end()
        return f"{text[:end]}\n{setting}{text[end:]}"
    return text + ("" if text.endswith("\n") or not text else "\n") + setting + "\n"


def _change_domain(text: str, on_hugetlbfs: bool) -> str:
    content = text.encode()
    elements = _elements(content)
    edits = list(_shared(content, elements))
    found = next((e for e in elements if e.path == _MEMORY_BACKING), None)
    if found is not None:
        old = content[found.start : found.end].decode()
        new = _backing(old, on_hugetlbfs)
        edits.append((found.start, found.end, new))
    else:
        memory = next((e for e in reversed(elements) if e.path == "domain/memory"), None)
        if memory is None:
            raise _not_a_domain("no <memory> in it")
        edits.append((memory.end, memory.end, "\n  " + _backing("<memoryBacking/>", False)))
    for start, end, new in sorted(edits, reverse=True):
        content = content[:start] + new.encode() + content[end:]
    return content.decode()


def _backing(text: str, on_hugetlbfs: bool) -> str:
    """The element <memoryBacking>, itself where it is right."""
    element = ElementTree.fromstring(text)
    hugepages = element.find("hugepages")
    if hugepages is not None and not on_hugetlbfs:
        raise RefusedError(
            ["it is on huge pages, which libvirt gives no name"],
            remedy="set memory_backing_dir to a directory on hugetlbfs",
        )
    wanted = {"source": ("type", "file"), "access": ("mode", "shared")}
    right = all(
        (child := element.find(tag)) is not None and child.get(name) == value
        for tag, (name, value) in wanted.items()
    )
    if right and hugepages is None and element.find("discard") is None:
        return text
    for tag in ("hugepages", "discard", *wanted):
        for child in element.findall(tag):
            element.remove(child)
    for tag, (name, value) in wanted.items():
        ElementTree.SubElement(element, tag, {name: value})
    ElementTree.indent(element, level=1)
    return ElementTree.tostring(element, encoding="unicode").strip()


def _shared(content: bytes, elements: list[_Place]) -> Iterator[tuple[int, int, str]]:
    for element in elements:
        attribute = _PRIVATE.get(element.path)
        if attribute and element.attributes.get(attribute) == "private":
            tag = content[element.start : content.index(b">", element.start)].decode()
            new = re.sub(rf"({attribute}\s*=\s*[\"'])private", r"\1shared", tag)
            yield element.start, element.start + len(tag.encode()), new


@dataclass(slots=True)
class _Place:
    """Where an element stands, in bytes: ``start`` to ``end`` is all of it."""

    path: str
    attributes: dict[str, str]
    start: int
    end: int = 0


def _elements(content: bytes) -> list[_Place]:
    found: list[_Place] = []
    open_: list[_Place] = []
    parser = expat.ParserCreate()

    def start(name: str, attributes: dict[str, str]) -> None:
        path = f"{open_[-1].path}/{name}" if open_ else name
        open_.append(_Place(path, attributes, parser.CurrentByteIndex))
        found.append(open_[-1])

    def end(_name: str) -> None:
        place, at = open_.pop(), parser.CurrentByteIndex
        # For <empty/> expat stands behind it already.
        place.end = content.index(b">", at) + 1 if content.startswith(b"</", at) else at

    parser.StartElementHandler = start
    parser.EndElementHandler = end
    try:
        parser.Parse(content, True)
    except expat.ExpatError as error:
        raise _not_a_domain(str(error)) from error
    return found


def _not_a_domain(problem: str) -> InputError:
    return InputError("domain XML", "", problem, remedy="give the output of virsh dumpxml")
