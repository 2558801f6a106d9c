"""QEMU's migration stream: which RAM it leaves out, and the form that a QEMU without
``x-ignore-shared`` takes.

A stream written with that capability on leaves out RAM in shared files. It differs from one
without RAM to write in two places only, both before any device: the configuration section names
the capability, and the list of RAM blocks gives each block's guest-physical address. ``strip``
cuts these out, for libvirt cannot set the capability on a QEMU that it starts.

The format (all integers big-endian), from QEMU 7.2 and 10.0, in which it is the same::

    "QEVM", u32 3                                   savevm.c: qemu_savevm_state_header
    07, u32 length, machine type                    savevm.c: vmstate_configuration
        { 05, u8 length, name, u32 1, content }     vmstate.c: vmstate_subsection_save
            configuration/capabilities: u32 count, { u8 length, name }
            configuration/target-page-bits: u32;  configuration/uuid: 16 bytes
    01, u32 id, u8 length, "ram", u32 0, u32 4      savevm.c: save_section_header
        u64 bytes of all blocks | MEM_SIZE          ram.c: ram_save_setup
        { u8 length, name, u64 bytes, [u64 address where x-ignore-shared is on] }
        u64 EOS
    7e, u32 id                                      savevm.c: save_section_footer
    { 02 or 03, u32 id, { page }, u64 EOS, 7e, u32 id }       ram.c: ram_save_iterate, _complete
        page: u64 offset | flags, [u8 length, block name unless CONTINUE], 00 or 4096 bytes
    08, u16 11, u16 0                               since 10.0: MIG_CMD_SWITCHOVER_START
    { 04, u32 id, u8 length, name, u32 instance, u32 version, device state, 7e, u32 id }
    00, 06, u32 length, JSON                        savevm.c: ..._complete_precopy_non_iterable

Only x-ignore-shared and (since 9.0) mapped-ram are ever named as capabilities
(should_validate_capability). ROMs and video memory are not in shared files and travel as pages; a
block is either written whole or left out whole, since the first round sends each page of a block
that is not ignored. Everything else is refused: postcopy (adds the page size to some blocks, and
commands), mapped-ram, multifd, compression, and any section that we do not know before the
devices. The JSON describes the stream for people and is skipped at load; it stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import NoReturn

from hostupdate.errors import ImageError

_PAGE_BITS = 12
_PAGE = 1 << _PAGE_BITS
_OFFSET = ~(_PAGE - 1)
_ZERO, _MEM_SIZE, _WHOLE, _EOS, _CONTINUE = 0x02, 0x04, 0x08, 0x10, 0x20
_MULTIFD_FLUSH = 0x200

_EOF, _START, _PART, _END, _FULL = b"\0", b"\1", b"\2", b"\3", b"\4"
_SUBSECTION, _DESCRIPTION, _CONFIGURATION, _COMMAND, _FOOTER = b"\5", b"\6", b"\7", b"\x08", b"\x7e"
_SWITCHOVER_START = 11
_RAM_VERSION = 4

_CAPABILITY = "x-ignore-shared"
#: More than any guest's DIMMs and ROMs: a bound for a stream that is garbage.
_BLOCKS_MAX = 4096
_U16, _U32, _U64 = Struct(">H"), Struct(">I"), Struct(">Q")

REMEDY = (
    "nothing was changed: keep the image and the guest's RAM file, and do not start the guest "
    "before the cause is known"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RamBlock:
    """One RAM block of a guest: QEMU's name for it (``pc.ram``) and its size.

    ``kept``: the stream holds none of it, so that it must be in a file that outlives QEMU; else
    the stream holds all of it. ``address`` is its guest-physical address where the stream tells.
    """

    name: str
    size_bytes: int
    kept: bool
    address: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stripped:
    """A stream that loads without ``x-ignore-shared``.

    ``removed_bytes`` is 0 for a stream that was so already: then ``stream`` is the one given.
    """

    stream: bytes
    machine: str
    blocks: tuple[RamBlock, ...]
    removed_bytes: int

    @property
    def kept(self) -> dict[str, int]:
        """Block name -> bytes, of the blocks that the stream leaves out: the guest's RAM."""
        return {block.name: block.size_bytes for block in self.blocks if block.kept}


def strip(stream: bytes, source: str = "migration stream") -> Stripped:
    """``stream`` without what only a QEMU with ``x-ignore-shared`` understands.

    Nothing else is changed, and a stripped stream comes back as it is. The parts up to the first
    device are parsed to the byte, the end is checked, so that a truncated stream is noticed; the
    devices between are copied unread.

    Raises ``ImageError`` for any stream that is not one of a handover: truncated, with the guest's
    RAM in it (no block left out, or one that is written in part), or with anything that we do not
    know. ``source`` names it there.
    """
    walk = _Walk(stream, source)
    walk.header()
    machine, ignoring = walk.configuration()
    blocks = walk.ram_setup(ignoring)
    written = walk.ram_pages({name: size for name, size, _ in blocks})
    walk.tail()
    found = []
    for name, size, address in blocks:
        pages = written.get(name, 0)
        if pages and pages << _PAGE_BITS != size:
            walk.refuse("ram", f"{pages} of {size >> _PAGE_BITS} pages of {name} are written", None)
        kept = size > 0 and not pages
        found.append(RamBlock(name=name, size_bytes=size, kept=kept, address=address))
    if not any(block.kept for block in found):
        walk.refuse("ram", "all RAM is in the stream; it was written without x-ignore-shared", None)
    parts, begin = [], 0
    for cut in walk.cuts:
        parts.append(stream[begin : cut.start])
        begin = cut.stop
    return Stripped(
        stream=b"".join([*parts, stream[begin:]]) if parts else stream,
        machine=machine,
        blocks=tuple(found),
        removed_bytes=sum(len(cut) for cut in walk.cuts),
    )


class _Walk:
    """Reads a stream from its start; ``cuts`` are the places to leave out, in order.

    ``at`` is the next byte, ``field`` what is being read there.
    """

    def __init__(self, stream: bytes, source: str) -> None:
        self.stream = stream
        self.source = source
        self.at = 0
        self.field = "header"
        self.cuts: list[range] = []

    def refuse(self, field: str, problem: str, offset: int | None) -> NoReturn:
        raise ImageError(self.source, field, offset, problem, remedy=REMEDY)

    def take(self, count: int) -> bytes:
        begin, end = self.at, self.at + count
        if end > len(self.stream):
            problem = f"the stream ends after {len(self.stream)} bytes, {count} more were expected"
            self.refuse(self.field, problem, begin)
        self.at = end
        return self.stream[begin:end]

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "big")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "big")

    def name(self, length: int | None = None) -> str:
        """``length`` bytes of text; without it, a byte says how many."""
        begin = self.at
        raw = self.take(self.take(1)[0] if length is None else length)
        text = raw.decode("ascii", "replace")
        if not raw or not text.isascii() or not text.isprintable():
            self.refuse(self.field, f"{raw!r} where a name was expected", begin)
        return text

    def expect(self, wanted: bytes, what: str) -> None:
        begin = self.at
        found = self.take(len(wanted))
        if found != wanted:
            problem = f"{what} expected ({wanted.hex(' ')}), found {found.hex(' ')}"
            self.refuse(self.field, problem, begin)

    def header(self) -> None:
        self.expect(b"QEVM", "QEMU's magic")
        self.expect(_U32.pack(3), "format version 3")

    def configuration(self) -> tuple[str, bool]:
        """The machine type, and whether x-ignore-shared was on."""
        self.field = "configuration"
        self.expect(_CONFIGURATION, "the configuration section")
        begin = self.at
        length = self.u32()
        if not 0 < length < 256:
            self.refuse(self.field, f"a machine type of {length} bytes", begin)
        machine = self.name(length)
        ignoring = False
        seen = set()
        while self.stream[self.at : self.at + 1] == _SUBSECTION:
            self.field = "configuration"
            begin = self.at
            self.at += 1
            name = self.name()
            if name in seen:
                self.refuse(self.field, f"{name} a second time", begin)
            seen.add(name)
            self.field = name
            self.expect(_U32.pack(1), "subsection version 1")
            match name:
                case "configuration/capabilities":
                    ignoring = self.capabilities(begin)
                case "configuration/target-page-bits":
                    self.expect(_U32.pack(_PAGE_BITS), "a target page of 4096 bytes")
                case "configuration/uuid":
                    self.take(16)
                case _:
                    self.refuse("configuration", f"unknown subsection {name}", begin)
        return machine, ignoring

    def capabilities(self, begin: int) -> bool:
        """Marks the subsection that starts at ``begin`` to be cut out.

        A capability beside x-ignore-shared would change the rest of the stream, so that the
        subsection never outlives its one entry.
        """
        at = self.at
        count = self.u32()
        if count != 1:
            self.refuse(self.field, f"{count} capabilities, expected {_CAPABILITY} alone", at)
        at = self.at
        name = self.name()
        if name != _CAPABILITY:
            self.refuse(self.field, f"{name} is on; only {_CAPABILITY} may be", at)
        self.cuts.append(range(begin, self.at))
        return True

    def ram_setup(self, ignoring: bool) -> list[tuple[str, int, int | None]]:
        """Name, bytes and address of each RAM block."""
        self.field = "first section"
        begin = self.at
        self.expect(_START, "the start of the section ram")
        self.ram_id = self.take(4)
        name = self.name()
        if name != "ram":
            self.refuse(self.field, f"the section {name} is before ram", begin)
        self.field = "ram setup"
        self.expect(_U32.pack(0), "instance 0")
        self.expect(_U32.pack(_RAM_VERSION), "version 4")
        begin = self.at
        word = self.u64()
        left = word & _OFFSET
        if word & ~_OFFSET != _MEM_SIZE or not left:
            self.refuse(self.field, f"{word:#x} where the size of all RAM was expected", begin)
        blocks: dict[str, tuple[str, int, int | None]] = {}
        while left:
            begin = self.at
            self.field = "ram setup"
            name = self.name()
            self.field = f"RAM block {name}"
            size = self.u64()
            if size > left or not size or size % _PAGE or name in blocks:
                self.refuse(self.field, f"{size} bytes, of {left} that are left", begin)
            if len(blocks) == _BLOCKS_MAX:
                self.refuse(self.field, f"more than {_BLOCKS_MAX} RAM blocks", begin)
            left -= size
            address = None
            if ignoring:
                self.cuts.append(range(self.at, self.at + 8))
                address = self.u64()
            blocks[name] = (name, size, address)
        self.field = "ram setup"
        begin = self.at
        word = self.u64()
        if word != _EOS:
            multifd = " (multifd is on)" if word == _MULTIFD_FLUSH else ""
            self.refuse(self.field, f"{word:#x} where its end was expected{multifd}", begin)
        self.footer()
        return list(blocks.values())

    def ram_pages(self, sizes: dict[str, int]) -> dict[str, int]:
        """Block -> how many of its pages are written, over all sections of ram up to its last."""
        written: dict[str, set[int]] = {}
        block: tuple[str, set[int]] | None = None
        ended = False
        while not ended:
            self.field = "section"
            begin = self.at
            kind = self.take(1)
            if kind == _COMMAND:
                self.expect(_U16.pack(_SWITCHOVER_START) + _U16.pack(0), "the switchover command")
                continue
            if kind not in (_PART, _END):
                self.refuse(self.field, f"type {kind.hex()} before the end of ram", begin)
            ended = kind == _END
            self.expect(self.ram_id, "the section ram")
            self.field = "ram"
            block = self.pages(sizes, written, block)
            self.footer()
        return {name: len(offsets) for name, offsets in written.items()}

    def pages(
        self,
        sizes: dict[str, int],
        written: dict[str, set[int]],
        block: tuple[str, set[int]] | None,
    ) -> tuple[str, set[int]] | None:
        """One section's pages, to its end; the block that a page without a name then belongs to."""
        stream, word_at, at = self.stream, _U64.unpack_from, self.at
        last = len(stream) - 8
        while at <= last:
            begin = at
            (word,) = word_at(stream, at)
            at += 8
            flags = word & ~_OFFSET
            if flags == _EOS and word == _EOS:
                self.at = at
                return block
            kind = flags & ~_CONTINUE
            if kind not in (_ZERO, _WHOLE):
                self.refuse("ram", f"a record with unknown flags {flags:#x}", begin)
            if not flags & _CONTINUE:
                self.at = at
                name = self.name()
                at = self.at
                if name not in sizes:
                    self.refuse("ram", f"a page of {name}, which is no RAM block", begin)
                block = name, written.setdefault(name, set())
            if block is None:
                self.refuse("ram", "a page of no block", begin)
            offset = word & _OFFSET
            if offset >= sizes[block[0]]:
                self.refuse("ram", f"a page beyond the end of {block[0]}: {offset:#x}", begin)
            block[1].add(offset)
            if kind == _WHOLE:
                at += _PAGE
            elif stream[at : at + 1] == b"\0":
                at += 1
            else:
                self.refuse("ram", "a zero page that is not zero", begin)
        self.at = at
        self.take(8)
        return block

    def footer(self) -> None:
        self.expect(_FOOTER + self.ram_id, "the footer of the section ram")

    def tail(self) -> None:
        """The devices begin here, and the stream ends as QEMU ends one."""
        self.field = "devices"
        stream, begin = self.stream, self.at
        self.expect(_FULL, "the first device")
        self.take(4)
        self.name()
        self.take(8)
        self.field = "end of the stream"
        # The JSON holds no NUL; its length, below 16 MiB, has one in its first byte at the latest.
        last_nul = stream.rfind(b"\0", self.at)
        for json in range(last_nul + 1, last_nul + 5):
            head = stream[json - 6 : json]
            if head[:2] == _EOF + _DESCRIPTION and stream[json : json + 1] == b"{":
                whole = _U32.unpack_from(head, 2)[0] == len(stream) - json
                footer = stream[json - 11 : json - 10] == _FOOTER
                if whole and footer and json - 11 > self.at and stream.endswith(b"}"):
                    return
        problem = "not the end of a whole stream: it is truncated, or suppress-vmdesc is on"
        self.refuse(self.field, problem, begin)
