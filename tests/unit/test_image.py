"""libvirt's save images: which are a handover's, and how one becomes what libvirt restores."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import struct
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostupdate.errors import ImageError
from hostupdate.handover import domain, image, parked_image, unpacking
from hostupdate.handover.stream import strip
from tests.unit.golden import golden

SAVE = golden("libvirt-9.0.save")
UUID_OF_SAVE = UUID("6b0c7a52-53ef-4d1a-9d1c-1f6c2b2f8f11")
KEPT = {"pc.ram": 16 << 20}
DATA = struct.unpack_from("<I", SAVE, 20)[0]
STREAM = SAVE[92 + DATA :]
TICKET = "0123456789abcdef"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "golden.save"
    path.write_bytes(SAVE)
    path.chmod(0o640)
    return path


def field(offset: int, value: int, content: bytes = SAVE) -> bytes:
    return content[:offset] + struct.pack("<I", value) + content[offset + 4 :]


def gzip_of(content: bytes) -> bytes:
    return packed(1, gzip.compress(content))


def packed(stored: int, content: bytes) -> bytes:
    return field(28, stored)[: 92 + DATA] + content


def crafted(xml: str, cookie: str) -> bytes:
    return image.head(xml, cookie, running=True, stored=image.RAW) + STREAM


def test_what_libvirt_wrote_is_read(saved: Path) -> None:
    found = image.read_image(saved)
    assert found.xml.startswith("<domain type='qemu'")
    assert found.cookie.startswith("<cookie>")
    assert found.was_running and found.format == image.RAW
    assert found.content[found.stream_offset_bytes :] == STREAM
    assert found.guest.name == "golden"
    assert found.guest.uuid == UUID_OF_SAVE
    assert found.guest.machine == found.stripped.machine == "pc-i440fx-7.2"
    assert found.guest.emulator == "/usr/bin/qemu-system-x86_64"


def test_what_a_qemu_loads(saved: Path) -> None:
    """The same guest, paused, its stream stripped, all else to the byte as it was."""
    before = image.read_image(saved)
    assert before.stripped.removed_bytes > 0
    after = image.parse(Path("x"), parked_image.loadable(before, "/opt/a & b/qemu", TICKET))
    old, new = "/usr/bin/qemu-system-x86_64</emulator>", "/opt/a &amp; b/qemu</emulator>"
    uuid = f"<uuid>{UUID_OF_SAVE}</uuid>"
    metadata = f"{uuid}<metadata>{element(TICKET)}</metadata>"
    assert after.xml == before.xml.replace(old, new).replace(uuid, metadata)
    assert after.guest.emulator == "/opt/a & b/qemu"
    assert after.cookie == before.cookie and not after.was_running
    assert after.format == image.GZIP
    assert gzip.decompress(after.content[after.stream_offset_bytes :]) == strip(STREAM).stream
    assert after.stripped.removed_bytes == 0


def test_an_emulator_that_is_not_named_stays(saved: Path) -> None:
    found = image.parse(Path("x"), parked_image.loadable(image.read_image(saved), None, TICKET))
    assert found.guest.emulator == "/usr/bin/qemu-system-x86_64"


def test_an_xml_of_any_length_has_room_behind_it(saved: Path) -> None:
    emulator = "/" + "x" * 70_000
    read = image.read_image(saved)
    after = image.parse(Path("x"), parked_image.loadable(read, emulator, TICKET))
    assert after.guest.emulator == emulator and after.data_bytes > 70_000 + (64 << 10)


def element(ticket: str) -> str:
    start = '<hostupdate:ticket xmlns:hostupdate="urn:hostupdate:ticket:1">'
    return f"{start}{ticket}</hostupdate:ticket>"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("<a/><uuid>u</uuid><b/>", f"<a/><uuid>u</uuid><metadata>{element('t')}</metadata><b/>"),
        ("<metadata/>", f"<metadata>{element('t')}</metadata>"),
        ("<metadata x='1'>é <y/></metadata>", f"<metadata x='1'>{element('t')}é <y/></metadata>"),
        (f"<metadata> {element('old')}</metadata>", f"<metadata>{element('t')} </metadata>"),
        (
            f"<metadata><x y='/'/>{element('').replace('></', '/></')}</metadata>".replace(
                "</hostupdate:ticket>", ""
            ),
            f"<metadata>{element('t')}<x y='/'/></metadata>",
        ),
    ],
)
def test_a_ticket_is_put_among_what_owners_have_there(before: str, after: str) -> None:
    before, after = (f"<domain>{text}</domain>" for text in (before, after))
    assert domain.with_ticket(before, "t", "x") == after
    assert domain.with_ticket(after, "t", "x") == after


@pytest.mark.parametrize("xml", ["<domain/>", "<domain>"])
def test_an_xml_that_takes_no_ticket(xml: str) -> None:
    with pytest.raises(ImageError):
        domain.with_ticket(xml, "t", "x")


@pytest.mark.parametrize(
    ("xml", "emulator", "problem"),
    [
        ("<domain><devices/></domain>", "/q", "0 of them, expected one"),
        ("<domain><emulator>/a</emulator></domain>", "/q", "0 of them"),
        (
            "<domain><devices><emulator>/a</emulator><emulator>/b</emulator></devices></domain>",
            "/q",
            "2 of them",
        ),
        ("<domain><devices>", "/q", "no element found"),
        ("<domain><devices><emulator>/a</emulator></devices></domain>", "q", "no absolute path"),
        ("<domain><devices><emulator>/a</emulator></devices></domain>", "/q\n", "no absolute path"),
    ],
)
def test_an_emulator_that_cannot_be_replaced_is_told(xml: str, emulator: str, problem: str) -> None:
    with pytest.raises(ImageError, match=problem):
        domain.with_emulator(xml, emulator, "x")


@pytest.mark.parametrize("written", ["<emulator/>", "<emulator x='>'>/a</emulator>"])
def test_an_emulator_may_be_written_in_any_way(written: str) -> None:
    xml = f"<domain><devices>{written}</devices></domain>"
    wanted = "<domain><devices><emulator>/q</emulator></devices></domain>"
    assert domain.with_emulator(xml, "/q", "x") == wanted


@pytest.mark.parametrize("cookie", ["", "<cookie/>"])
def test_an_image_that_was_made_is_read_back(cookie: str) -> None:
    content = crafted("<domain>é</domain>", cookie)
    found = image.parse(Path("x"), content)
    assert (found.xml, found.cookie, found.was_running) == ("<domain>é</domain>", cookie, True)
    assert found.stripped.kept == KEPT


@pytest.mark.parametrize(
    ("content", "where", "problem"),
    [
        (b"", "header", "0 bytes in the file, 92 expected"),
        (SAVE[:91], "header", "91 bytes"),
        (b"LibvirtQemudPart" + SAVE[16:], "magic", "libvirt did not finish this image"),
        (b"LibvirtQemudSavf" + SAVE[16:], "magic", "expected b'LibvirtQemudSave'"),
        (field(16, 3), "version", "3, expected 2"),
        (field(16, 1), "version", "1, expected 2"),
        (field(16, 0x02000000), "version", "other byte order"),
        (field(20, 0), "data_len", "0 bytes of XML"),
        (field(20, len(SAVE)), "data_len", "follow the header"),
        (field(20, 0xFFFFFFFF), "data_len", "follow the header"),
        (field(24, 2), "was_running", "expected 0 or 1"),
        (field(28, 3), "stream", "xz cannot unpack it"),
        (field(28, 6), "format", r"6 \(sparse\)"),
        (field(28, 77), "format", r"77 \(unknown\)"),
        (field(32, DATA), "cookieOffset", "expected"),
        (field(32, 0), "XML", "NULs up to its end"),
        (field(32, 10), "XML", "NULs up to its end"),
        (field(88, 1), "header", "a field that we do not know"),
        (SAVE[:92] + b"\xff" + SAVE[93:], "XML", "not UTF-8"),
        (SAVE[: 92 + DATA], "stream", "the file ends before it"),
        (SAVE[: 92 + DATA - 1], "data_len", "follow the header"),
        (SAVE[:-1], "end of the stream", "truncated"),
        (SAVE + b"\0", "end of the stream", "not the end of a whole stream"),
        (field(28, 1), "stream", "not gzip"),
        (gzip_of(STREAM)[:-1], "stream", "truncated"),
        (gzip_of(STREAM) + b"\0", "stream", "1 bytes after the end"),
        (packed(3, lzma.compress(STREAM)[:-1]), "stream", "xz cannot unpack it"),
        (packed(3, lzma.compress(STREAM) + b"x"), "stream", "xz cannot unpack it"),
        (packed(3, lzma.compress(bytes(image.SIZE_MAX_BYTES + 1))), "stream", "RAM is in it"),
        (gzip_of(STREAM[:-1]), "end of the stream", "truncated"),
        (gzip_of(bytes(image.SIZE_MAX_BYTES + 1)), "stream", "the guest's RAM is in it"),
        (field(28, 0, gzip_of(STREAM)), "header", "QEMU's magic expected"),
    ],
)
def test_what_is_no_handovers_image_is_refused(
    tmp_path: Path, content: bytes, where: str, problem: str
) -> None:
    path = tmp_path / "bad.save"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=problem) as raised:
        _ = image.read_image(path).stripped
    assert raised.value.field == where
    assert str(raised.value).startswith(f"{path}: {where}") and raised.value.remedy


def test_an_image_with_the_guests_ram_is_not_even_read(saved: Path) -> None:
    os.truncate(saved, image.SIZE_MAX_BYTES + 1)
    with pytest.raises(ImageError, match="the guest's RAM is in it"):
        image.read_image(saved)


def test_only_a_regular_file_is_an_image(saved: Path) -> None:
    fifo, link = saved.with_name("fifo"), saved.with_name("link")
    os.mkfifo(fifo)
    link.symlink_to(saved)
    for path, problem in ((fifo, "no regular"), (link, "cannot be read"), (link / "x", "cannot")):
        with pytest.raises(ImageError, match=problem):
            image.read_image(path)
    with pytest.raises(ImageError, match="No such file"):
        image.read_image(saved.with_name("none"))


def test_a_gzipped_image_of_libvirts_own_is_stripped_too(saved: Path) -> None:
    saved.write_bytes(gzip_of(STREAM))
    assert image.read_image(saved).stripped.stream == strip(STREAM).stream


@pytest.mark.parametrize(("stored", "press"), [(2, bz2.compress), (3, lzma.compress)])
def test_an_image_that_a_program_packed_is_unpacked(
    saved: Path, stored: int, press: Callable[[bytes], bytes]
) -> None:
    """As ``save_image_format`` of qemu.conf may have it."""
    wanted = image.read_image(saved).stripped.stream
    saved.write_bytes(packed(stored, press(STREAM)))
    assert image.read_image(saved).stripped.stream == wanted


@pytest.mark.parametrize(
    ("text", "problem"), [(None, "install xz"), ("exec sleep 1000", "no answer within")]
)
def test_a_program_that_does_not_unpack(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, problem: str
) -> None:
    program = tmp_path / "bin/xz"
    program.parent.mkdir()
    if text:
        program.write_text(f"#!/bin/sh\nPATH=/bin:/usr/bin\n{text}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    monkeypatch.setattr(unpacking, "_UNPACK_NS", 200_000_000)
    saved.write_bytes(packed(3, lzma.compress(STREAM)))
    with pytest.raises(ImageError, match=problem):
        _ = image.read_image(saved).stripped


def test_an_image_is_of_its_guest_and_of_its_ram(saved: Path) -> None:
    found = image.read_image(saved)
    image.check(found, uuid=UUID_OF_SAVE, kept=KEPT, machine="pc-i440fx-7.2")
    for wrong, problem in (
        ({"uuid": UUID(int=1)}, "domain/uuid"),
        ({"kept": {}}, "RAM that is not in the image"),
        ({"kept": {"pc.ram": 32 << 20}}, "RAM that is not in the image"),
        ({"kept": KEPT | {"dimm": 1 << 20}}, "RAM that is not in the image"),
        ({"machine": "pc-q35-7.2"}, "machine type"),
    ):
        asked = {"uuid": UUID_OF_SAVE, "kept": KEPT} | wrong
        with pytest.raises(ImageError, match=problem):
            image.check(found, **asked)  # type: ignore[arg-type]


def test_the_xml_and_the_stream_are_of_one_machine(saved: Path) -> None:
    assert SAVE.count(b"'pc-i440fx-7.2'") == 1
    saved.write_bytes(SAVE.replace(b"'pc-i440fx-7.2'", b"'pc-i440fx-7.1'"))
    with pytest.raises(ImageError, match="machine type: "):
        image.check(image.read_image(saved), uuid=UUID_OF_SAVE, kept=KEPT)


@pytest.mark.parametrize(
    "xml", ["", "<x/>", "<domain/>", "<domain><uuid>7</uuid></domain>", "<domain>"]
)
def test_an_xml_without_a_guest_is_refused(xml: str) -> None:
    found = image.parse(Path("x"), crafted(xml or " ", ""))
    with pytest.raises(ImageError, match="XML"):
        image.check(found, uuid=UUID_OF_SAVE, kept=KEPT)


@given(st.integers(0, 91), st.integers(1, 255))
def test_a_changed_byte_of_the_header_is_refused_or_means_what_it_says(at: int, flip: int) -> None:
    content = bytearray(SAVE)
    content[at] ^= flip
    try:
        found = image.parse(Path("x"), bytes(content))
        kept = found.stripped.kept
    except ImageError:
        return
    assert kept == KEPT
    assert at == 24 and not found.was_running


@given(st.integers(0, len(SAVE) - 1))
def test_any_truncated_image_is_refused(length: int) -> None:
    with pytest.raises(ImageError):
        assert image.parse(Path("x"), SAVE[:length]).stripped.kept


@given(st.binary(max_size=200))
def test_garbage_is_refused(garbage: bytes) -> None:
    for content in (garbage, SAVE[:16] + garbage, SAVE[:92] + garbage, SAVE[: 92 + DATA] + garbage):
        with pytest.raises(ImageError):
            assert image.parse(Path("x"), content).stripped.kept
