"""Which migration streams are those of a handover, and what is cut out of them."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hostupdate.errors import ImageError
from hostupdate.handover.stream import strip
from tests.unit.golden import golden

MIB = 1 << 20
SUBSECTION = b"\5\x1aconfiguration/capabilities\0\0\0\1\0\0\0\1\x0fx-ignore-shared"
HANDOVERS = {
    "qemu-7.2-pc": "pc-i440fx-7.2",
    "qemu-7.2-q35": "pc-q35-7.2",
    "qemu-7.2-numa": "pc-q35-7.2",
    "qemu-10.0-pc": "pc-i440fx-10.0",
    "qemu-10.0-q35": "pc-q35-10.0",
    "qemu-10.0-uuid": "pc-i440fx-10.0",
    "qemu-10.0-video": "pc-i440fx-10.0",
}
SMALL = golden("qemu-7.2-numa.stream")
PARSED = SMALL.index(b"\4", SMALL.rindex(b"\x7e\0\0\0\2", 0, 50_000))


@pytest.mark.parametrize(("name", "machine"), HANDOVERS.items())
def test_what_a_handover_wrote_is_stripped(name: str, machine: str) -> None:
    stream = golden(f"{name}.stream")
    found = strip(stream)
    assert found.machine == machine
    kept = {"pc.ram": 16 * MIB} | ({"n1": 16 * MIB} if "numa" in name else {})
    assert found.kept == kept
    assert {block.name for block in found.blocks} > {"pc.bios", "pc.rom", *kept}
    assert stream.count(SUBSECTION) == 1
    assert found.removed_bytes == len(SUBSECTION) + 8 * len(found.blocks)
    # The same by another way: the list of blocks is rebuilt, all else is what it was.
    expected = stream.replace(SUBSECTION, b"")
    for block in found.blocks:
        assert block.address is not None
        entry = bytes([len(block.name)]) + block.name.encode() + block.size_bytes.to_bytes(8, "big")
        expected = expected.replace(entry + block.address.to_bytes(8, "big"), entry, 1)
    assert found.stream == expected


@pytest.mark.parametrize("name", HANDOVERS)
def test_a_stripped_stream_is_stripped_to_itself(name: str) -> None:
    once = strip(golden(f"{name}.stream"))
    twice = strip(once.stream)
    assert twice.stream is once.stream
    assert twice.removed_bytes == 0
    assert (twice.kept, twice.machine) == (once.kept, once.machine)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("qemu-7.2-plain", "all RAM is in the stream"),
        ("qemu-10.0-plain", "all RAM is in the stream"),
        ("qemu-10.0-postcopy", "the start of the section ram expected"),
        ("qemu-10.0-mapped", "2 capabilities, expected x-ignore-shared alone"),
    ],
)
def test_what_no_handover_wrote_is_refused(name: str, problem: str) -> None:
    with pytest.raises(ImageError, match=problem) as raised:
        strip(golden(f"{name}.stream"), "some.save")
    assert str(raised.value).startswith("some.save: ")
    assert raised.value.remedy


RAM_START = b"\1\0\0\0\2\3ram\0\0\0\0\0\0\0\4"
PAGE = SMALL.index(b"\2\0\0\0\2", SMALL.index(RAM_START)) + 5
EOS = (0x10).to_bytes(8, "big")


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (b"QEVM\0\0\0\3", b"QEVM\0\0\0\2", "format version 3 expected"),
        (b"x-ignore-shared", b"x-ignore-sharex", "x-ignore-sharex is on"),
        (
            b"\x1aconfiguration/capabilities",
            b"\x1aconfiguration/capabilitiez",
            "unknown subsection",
        ),
        (SUBSECTION, SUBSECTION + SUBSECTION, "a second time"),
        (SUBSECTION, SUBSECTION.replace(b"\0\1", b"\0\2", 1), "subsection version 1"),
        (
            SUBSECTION,
            b"\5\x1econfiguration/target-page-bits\0\0\0\1\0\0\0\x10" + SUBSECTION,
            "a target page of 4096 bytes expected",
        ),
        (b"\7\0\0\0\x0a", b"\7\0\0\1\x0a", "a machine type of 266 bytes"),
        (b"\3ram\0\0\0\0\0\0\0\4", b"\3rom\0\0\0\0\0\0\0\4", "section rom is before ram"),
        (b"\3ram\0\0\0\0\0\0\0\4", b"\3ram\0\0\0\0\0\0\0\5", "version 4 expected"),
        (RAM_START, b"\4" + RAM_START[1:], "the start of the section ram expected"),
        (b"\6pc.ram\0\0\0\0\1", b"\6pc.ram\0\0\0\0\7", "of [0-9]+ that are left"),
        (b"\6pc.ram\0\0\0\0\1\0\0\0", b"\6pc.ram\0\0\0\0\1\0\0\1", "of [0-9]+ that are left"),
        (EOS, (0x200).to_bytes(8, "big"), "multifd is on"),
        (EOS + b"\x7e\0\0\0\2", EOS + b"\x7e\0\0\0\3", "the footer of the section ram"),
        (EOS + b"\x7e\0\0\0\2", EOS + b"\x7e\0\0\0\2\1", "type 01 before the end of ram"),
        (EOS + b"\x7e\0\0\0\2", EOS + b"\x7e\0\0\0\2\x08\0\1\0\0", "the switchover command"),
    ],
)
def test_what_is_not_known_is_refused(old: bytes, new: bytes, problem: str) -> None:
    assert old in SMALL
    with pytest.raises(ImageError, match=problem):
        strip(SMALL.replace(old, new, 1))


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (b"\0\0\0\0\0\0\0\x02\6pc.ram\0", "1 of 4096 pages of pc.ram are written"),
        (b"\0\0\0\0\0\0\0\x08\6pc.ram" + bytes(4096), "1 of 4096 pages of pc.ram are written"),
        (b"\0\0\0\0\0\0\0\x02\6no.ram\0", "a page of no.ram, which is no RAM block"),
        (b"\0\0\0\0\1\0\0\x02\6pc.ram\0", "a page beyond the end of pc.ram: 0x1000000"),
        (b"\0\0\0\0\0\0\0\x02\6pc.ram\1", "a zero page that is not zero"),
        (b"\0\0\0\0\0\0\0\x22\0", "a page of no block"),
        (b"\0\0\0\0\0\0\0\x42\0", "unknown flags 0x42"),
        (b"\0\0\0\0\0\0\0\x40\6pc.ram", "unknown flags 0x40"),
        (b"\0\0\0\0\0\0\1\x00\6pc.ram", "unknown flags 0x100"),
        (b"\0\0\0\0\0\0\0\x80", "unknown flags 0x80"),
        (b"\0\0\0\0\0\0\x10\x10", "unknown flags 0x10"),
    ],
)
def test_pages_of_ram_and_unknown_records_are_refused(record: bytes, problem: str) -> None:
    with pytest.raises(ImageError, match=problem):
        strip(SMALL[:PAGE] + record + SMALL[PAGE:])


def test_a_page_written_twice_counts_once() -> None:
    name = SMALL[PAGE + 8 : PAGE + 9 + SMALL[PAGE + 8]]
    again = SMALL[PAGE : PAGE + 7] + b"\x02" + name + b"\0"
    assert strip(SMALL[:PAGE] + again + SMALL[PAGE:]).kept == strip(SMALL).kept


def test_the_switchover_command_of_newer_machines_is_known() -> None:
    command = b"\x08\0\x0b\0\0"
    assert command in golden("qemu-10.0-pc.stream")
    assert command not in SMALL


@given(st.integers(0, len(SMALL) - 1))
@example(0)
@example(PARSED)
@example(len(SMALL) - 1)
def test_any_truncated_stream_is_refused(length: int) -> None:
    with pytest.raises(ImageError):
        strip(SMALL[:length])


def test_bytes_after_the_end_are_refused() -> None:
    for extra in (b"\0", b"}", b"\n", bytes(4096)):
        with pytest.raises(ImageError, match="not the end of a whole stream"):
            strip(SMALL + extra)


@given(st.integers(0, len(SMALL) - 1), st.integers(1, 255))
def test_a_changed_byte_is_refused_or_carried_over(at: int, flip: int) -> None:
    changed = bytearray(SMALL)
    changed[at] ^= flip
    try:
        found = strip(bytes(changed))
    except ImageError:
        return
    before = strip(SMALL)
    assert found.removed_bytes == before.removed_bytes
    assert sorted(found.kept.values()) == sorted(before.kept.values())
    pairs = zip(found.stream, before.stream, strict=True)
    assert sum(new != old for new, old in pairs) <= 1


@given(st.integers(0, 400), st.integers(1, 255))
def test_a_changed_byte_of_what_is_parsed_changes_no_size(at: int, flip: int) -> None:
    test_a_changed_byte_is_refused_or_carried_over.hypothesis.inner_test(at, flip)  # type: ignore[attr-defined]


@given(st.binary(max_size=300))
def test_garbage_is_refused(garbage: bytes) -> None:
    for content in (garbage, SMALL[:24] + garbage, SMALL[:PAGE] + garbage):
        with pytest.raises(ImageError):
            strip(content)
