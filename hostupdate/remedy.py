"""The changes that make a guest eligible at its next start, as texts: everything that is not
changed stays as it was written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from xml.etree import ElementTree

import msgspec

from hostupdate.eligibility import RAM_FILE_SYSTEMS
from hostupdate.errors import InputError, RefusedError
from hostupdate.xmltext import Place, edited, places

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


def memory_backing_dir(qemu_conf: str) -> str | None:
    """What a qemu.conf sets; None: nothing. The last of several lines counts."""
    found = re.findall(
        r'^[ \t]*memory_backing_dir[ \t]*=[ \t]*"([^"\n]*)"', qemu_conf, re.MULTILINE
    )
    return found[-1] if found else None


class BackingDirectory(msgspec.Struct, frozen=True, kw_only=True):
    """Where RAM files are to lie, or the place where that directory would be made.

    ``total_bytes`` and ``free_bytes`` are None where the file system has no limit of its own;
    ``foreign``: somebody who is not root decides what is there, or may before libvirt does.
    """

    path: str
    file_system: str
    dax: bool
    noswap: bool
    total_bytes: int | None
    free_bytes: int | None
    foreign: str = ""


def judge_directory(
    found: BackingDirectory, guest_bytes: int, swap_bytes: int
) -> tuple[list[str], list[str]]:
    """Why RAM files must not lie there, and what to mind where they may."""
    reasons, warnings = [], []
    if found.file_system not in RAM_FILE_SYSTEMS and not found.dax:
        what = found.file_system or "no file system"
        reasons.append(f"{found.path} is on {what}: a guest's RAM would be written to a disk")
    elif found.foreign:
        warnings.append(
            f"{found.foreign}: who is there before libvirt, say after a boot, reads guests' RAM; "
            f"write 'd {found.path} 0755 root root' to /etc/tmpfiles.d/hostupdate.conf"
        )
    if found.total_bytes is not None and found.total_bytes < guest_bytes:
        reasons.append(
            f"{found.path} holds {found.total_bytes >> 20} MiB, the guest has {guest_bytes >> 20}"
        )
    elif found.free_bytes is not None and found.free_bytes < guest_bytes:
        warnings.append(
            f"{found.path} has {found.free_bytes >> 20} MiB left, the guest needs "
            f"{guest_bytes >> 20}: a guest whose RAM file cannot grow is killed"
        )
    if found.file_system == "tmpfs" and swap_bytes and not found.noswap:
        warnings.append(
            f"{found.path} may be swapped out: mount it with noswap (Linux 6.4), or swapoff"
        )
    return reasons, warnings


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
    try:
        elements = places(content)
    except ValueError as error:
        raise _not_a_domain(str(error)) from error
    edits = list(_shared(content, elements))
    found = next((e for e in elements if e.path == _MEMORY_BACKING), None)
    if found is not None:
        old = content[found.start : found.end].decode()
        new = _backing(old, on_hugetlbfs)
        edits.append((found.start, found.end, new.encode()))
    else:
        memory = next((e for e in reversed(elements) if e.path == "domain/memory"), None)
        if memory is None:
            raise _not_a_domain("no <memory> in it")
        new = "\n  " + _backing("<memoryBacking/>", False)
        edits.append((memory.end, memory.end, new.encode()))
    return edited(content, edits).decode()


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


def _shared(content: bytes, elements: list[Place]) -> Iterator[tuple[int, int, bytes]]:
    for element in elements:
        attribute = _PRIVATE.get(element.path)
        if attribute and element.attributes.get(attribute) == "private":
            tag = content[element.start : content.index(b">", element.start)].decode()
            new = re.sub(rf"({attribute}\s*=\s*[\"'])private", r"\1shared", tag)
            yield element.start, element.start + len(tag.encode()), new.encode()


def _not_a_domain(problem: str) -> InputError:
    return InputError("domain XML", "", problem, remedy="give the output of virsh dumpxml")
