"""A writer for the newc archives that the kernel unpacks as its initramfs.

Format: Documentation/driver-api/early-userspace/buffer-format.rst of the Linux tree. The output
depends on nothing but the entries: no times, owners or inode numbers of the building host.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One member. ``name`` is relative, ``mode`` holds type and permission bits (``st_mode``).

    ``data`` is a file's content, or the target of a symbolic link.
    """

    name: str
    mode: int
    data: bytes = b""


def directory(name: str) -> Entry:
    """A directory that everybody may enter and root may write."""
    return Entry(name=name, mode=stat.S_IFDIR | 0o755)


def program(name: str, data: bytes) -> Entry:
    """A regular file that may be executed."""
    return Entry(name=name, mode=stat.S_IFREG | 0o755, data=data)


def text(name: str, content: str) -> Entry:
    """A regular file with ``content`` in UTF-8."""
    return Entry(name=name, mode=stat.S_IFREG | 0o644, data=content.encode())


def link(name: str, target: str) -> Entry:
    """A symbolic link to ``target``."""
    return Entry(name=name, mode=stat.S_IFLNK | 0o777, data=target.encode())


def archive(entries: Iterable[Entry]) -> bytes:
    """The archive of ``entries``, sorted by name so that directories precede their content.

    Raises ``ValueError`` for a name that occurs twice; the kernel would keep the later one.
    """
    members = sorted(entries, key=lambda entry: entry.name)
    names = {entry.name for entry in members}
    if len(names) != len(members):
        raise ValueError("an initramfs member is named twice")
    blocks = [_member(inode, entry) for inode, entry in enumerate(members, start=1)]
    blocks.append(_member(0, Entry(name="TRAILER!!!", mode=0)))
    return b"".join(blocks)


def _member(inode: int, entry: Entry) -> bytes:
    name = entry.name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, 0, 0, len(name), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    return _padded(header + name) + _padded(entry.data)


def _padded(block: bytes) -> bytes:
    return block + b"\0" * (-len(block) % 4)
