"""libvirt's save image: read, judge, rewrite for a restore, or make one.

The format (src/qemu/qemu_saveimage.c; the same in libvirt 9.0 and 11.x)::

    92 bytes, integers in the byte order of the host that saved:
        "LibvirtQemudSave", u32 version 2, u32 data_len, u32 was_running, u32 format, u32 cookie
        offset, 14 unused u32
    data_len bytes: domain XML, NUL, [at the cookie offset: cookie, NUL,] NULs (64 KiB of them, so
        that the XML may grow)
    QEMU's migration stream (see ``stream``), raw or through ``format``'s compressor

An image that is not complete begins with "LibvirtQemudPart"; libvirt deletes such a one, and one
that is too short, when the guest is started, and boots the guest anew (qemuSaveImageIsCorrupt,
qemuDomainObjRestore). So an image here is only ever replaced as a whole, by rename.

A rewritten image holds the stream gzipped: libvirt feeds it through a pipe then, where a raw one is
given to QEMU as a file, which QEMU since 11 refuses. It is stored, not compressed (12 ms less for
0.7 MB).
"""

from __future__ import annotations

import os
import stat
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NoReturn
from uuid import UUID

from hostupdate.errors import DeadlineError, ImageError, PrerequisiteError
from hostupdate.handover import domain
from hostupdate.handover.stream import REMEDY, Stripped, strip
from hostupdate.handover.unpacking import unpacked

_HEADER = struct.Struct("<16s5I56s")
_MAGIC, _PARTIAL = b"LibvirtQemudSave", b"LibvirtQemudPart"
_VERSION = 2
_UNUSED = bytes(56)
#: What libvirt leaves free behind XML and cookie (virQEMUSaveDataWrite).
_PADDING_BYTES = 64 << 10

RAW, GZIP = 0, 1
_FORMATS = ("raw", "gzip", "bzip2", "xz", "lzop", "zstd", "sparse")
_SPARSE = 6

#: The image of a handover has device state, ROMs and video memory; one with a guest's RAM is larger
#: than this.
SIZE_MAX_BYTES = 64 << 20
_DATA_MAX_BYTES = 16 << 20
#: Stored only: the guest waits for it.
_GZIP_LEVEL = 0
_GZIP_WINDOW = 16 + zlib.MAX_WBITS


@dataclass(frozen=True, kw_only=True)
class SaveImage:
    """A save image in memory. ``content`` is the whole file; ``format`` is ``RAW``, ``GZIP``, or
    another that libvirt packs a stream with.

    ``stream_offset_bytes`` is where the migration stream begins.
    """

    path: Path
    xml: str
    cookie: str
    was_running: bool
    format: int
    data_bytes: int
    content: bytes = field(repr=False)

    @property
    def stream_offset_bytes(self) -> int:
        return _HEADER.size + self.data_bytes

    @cached_property
    def stripped(self) -> Stripped:
        """The stream as a QEMU without ``x-ignore-shared`` takes it. Raises ``ImageError``."""
        payload = self.content[self.stream_offset_bytes :]
        if self.format != RAW:
            payload = _unpack(payload, self.format, str(self.path), self.stream_offset_bytes)
        return strip(payload, str(self.path))

    @cached_property
    def guest(self) -> domain.Domain:
        """Whose image it is. Raises ``ImageError`` where the XML does not tell."""
        return domain.parse(self.xml, str(self.path))


def read_image(path: Path) -> SaveImage:
    """The save image at ``path``, whole and understood up to its migration stream.

    Raises ``ImageError``: no regular file, not readable, incomplete, not of this byte order,
    version or size, not one stream, packed or not, or with anything unknown in it.
    """
    return parse(path, read(path))


def check(
    image: SaveImage, *, uuid: UUID, kept: Mapping[str, int], machine: str | None = None
) -> None:
    """Raises ``ImageError`` unless ``image`` is of that guest, for RAM that is just ``kept``.

    ``kept`` holds name and bytes of each RAM block that is parked; one more or one less would
    resume the guest with empty memory. ``machine`` is compared where given; the stream's machine
    type always is with that of the XML.
    """

    def refuse(field: str, found: object, expected: object) -> None:
        problem = f"{found}, expected {expected}"
        raise ImageError(str(image.path), field, None, problem, remedy=REMEDY)

    if image.guest.uuid != uuid:
        refuse("domain/uuid", image.guest.uuid, uuid)
    stripped = image.stripped
    for expected in filter(None, (image.guest.machine, machine)):
        if stripped.machine != expected:
            refuse("machine type", stripped.machine, expected)
    if stripped.kept != dict(kept):
        refuse("RAM that is not in the image", stripped.kept, dict(kept))


def head(xml: str, cookie: str, *, running: bool, stored: int) -> bytes:
    """What is before the stream in an image; ``stored`` is ``RAW`` or ``GZIP``, ``cookie`` may be
    empty."""
    text = xml.encode() + b"\0"
    offset = len(text) if cookie else 0
    if cookie:
        text += cookie.encode() + b"\0"
    data_bytes = len(text) + _PADDING_BYTES
    fields = (_MAGIC, _VERSION, data_bytes, int(running), stored, offset, _UNUSED)
    return _HEADER.pack(*fields) + text.ljust(data_bytes, b"\0")


def gzipped(stream: bytes) -> bytes:
    """The same bytes for the same stream: without a time in it."""
    press = zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, _GZIP_WINDOW)
    return press.compress(stream) + press.flush()


def read(path: Path) -> bytes:
    """A file that may be an image, whole. ``ImageError``: not regular, too large, not readable."""
    try:
        # Not blocking: a FIFO under this name is no image, and nobody may ever write to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            problem = ""
            if not stat.S_ISREG(status.st_mode):
                problem = "no regular file"
            elif status.st_size > SIZE_MAX_BYTES:
                problem = (
                    f"{status.st_size} bytes, at most {SIZE_MAX_BYTES} expected: the guest's RAM "
                    "is in it, so it was not saved for a handover"
                )
            if problem:
                raise ImageError(str(path), "file", None, problem, remedy=REMEDY)
            return file.read(SIZE_MAX_BYTES + 1)
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
        raise ImageError(str(path), "file", None, problem, remedy=REMEDY) from error


def parse(path: Path, content: bytes) -> SaveImage:
    """``read_image`` of what has been read already; ``path`` only names it."""

    def refuse(field: str, offset: int | None, problem: str, remedy: str = REMEDY) -> NoReturn:
        raise ImageError(str(path), field, offset, problem, remedy=remedy)

    if len(content) < _HEADER.size:
        refuse("header", 0, f"{len(content)} bytes in the file, {_HEADER.size} expected")
    magic, version, data, running, stored, cookie_at, unused = _HEADER.unpack_from(content)
    if magic == _PARTIAL:
        refuse(
            "magic", 0, "libvirt did not finish this image", "libvirt deletes it at `virsh start`"
        )
    if magic != _MAGIC:
        refuse("magic", 0, f"{magic!r}, expected {_MAGIC!r}")
    if version != _VERSION:
        swapped = " (of a host of the other byte order)" if version == _VERSION << 24 else ""
        refuse("version", 16, f"{version}, expected {_VERSION}{swapped}")
    if running > 1:
        refuse("was_running", 24, f"{running}, expected 0 or 1")
    if stored >= _SPARSE:
        name = _FORMATS[stored] if stored < len(_FORMATS) else "unknown"
        remedy = f'{REMEDY}; later ones: save_image_format = "raw" in qemu.conf'
        refuse("format", 28, f"{stored} ({name}), expected raw or packed as a whole", remedy)
    if unused != _UNUSED:
        refuse("header", 36, "a field that we do not know is in use")
    left = len(content) - _HEADER.size
    if not 0 < data <= min(left, _DATA_MAX_BYTES):
        refuse("data_len", 20, f"{data} bytes of XML, {left} bytes follow the header")
    if cookie_at >= data:
        refuse("cookieOffset", 32, f"{cookie_at}, at most {data - 1} expected")
    begin = _HEADER.size
    texts = []
    for name, start, end in (("XML", 0, cookie_at or data), ("cookie", cookie_at, data)):
        if name == "cookie" and not cookie_at:
            texts.append("")
            continue
        text, terminator, padding = content[begin + start : begin + end].partition(b"\0")
        if not text or not terminator or padding.strip(b"\0"):
            refuse(name, begin + start, "a text, and NULs up to its end, expected")
        try:
            texts.append(text.decode())
        except UnicodeDecodeError as error:
            refuse(name, begin + start + error.start, "not UTF-8")
    if left == data:
        refuse("stream", begin + data, "the file ends before it")
    xml, cookie = texts
    return SaveImage(
        path=path,
        xml=xml,
        cookie=cookie,
        was_running=bool(running),
        format=stored,
        data_bytes=data,
        content=content,
    )


def _unpack(payload: bytes, stored: int, source: str, offset: int) -> bytes:
    if stored == GZIP:
        stream, problem = _gunzip(payload)
    else:
        stream, problem = _unpack_by_program(_FORMATS[stored], payload)
    if len(stream) > SIZE_MAX_BYTES:
        problem = f"more than {SIZE_MAX_BYTES} bytes: the guest's RAM is in it"
    if problem:
        raise ImageError(source, "stream", offset, problem, remedy=REMEDY)
    return stream


def _gunzip(payload: bytes) -> tuple[bytes, str]:
    press = zlib.decompressobj(_GZIP_WINDOW)
    try:
        stream = press.decompress(payload, SIZE_MAX_BYTES + 1)
    except zlib.error as error:
        return b"", f"not gzip: {error}"
    if not press.eof:
        return stream, "the gzipped stream is truncated"
    if press.unused_data:
        return stream, f"{len(press.unused_data)} bytes after the end of the gzipped stream"
    return stream, ""


def _unpack_by_program(program: str, payload: bytes) -> tuple[bytes, str]:
    try:
        stream = unpacked(program, payload, SIZE_MAX_BYTES)
    except (PrerequisiteError, DeadlineError) as error:
        return b"", f"cannot be unpacked: {error}{error.remedy and '; '}{error.remedy}"
    return (stream, "") if stream is not None else (b"", f"{program} cannot unpack it")
