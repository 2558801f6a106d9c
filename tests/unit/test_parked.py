"""The parked record: what crosses an update must be read by whoever comes after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hostupdate.errors import GuestError, InputError, PrerequisiteError
from hostupdate.handover.records import ParkedRecords
from hostupdate.handover.recovery import recover
from hostupdate.parked import (
    ParkedRecord,
    ParkedState,
    RamFile,
    decode_parked,
    encode_parked,
)

GOLDEN = Path(__file__).parent / "golden/parked-v1.json"
UUID = "4dea22b3-1d52-d8f3-2516-782e98ab3fa0"
RECORD = ParkedRecord(
    run_id="20260102T030405Z-abcdef",
    boot_id="8a6f2c1e-0000-4000-8000-000000000000",
    uri="qemu:///system",
    name="g1",
    uuid=UUID,
    way="save",
    state=ParkedState.SAVED,
    persistent=True,
    was_running=True,
    ram_directory="/dev/shm/hostupdate/libvirt/qemu",
    short_name="g1",
    ram=(
        RamFile(
            block="pc.ram",
            link=f"/dev/shm/hostupdate/hostupdate-parked/{UUID}/pc.ram",
            size_bytes=536870912,
            inode=7,
            device=26,
        ),
    ),
    image=f"/var/lib/hostupdate/parked/{UUID}.image",
    guard="/var/lib/libvirt/qemu/save/g1.save",
    old_emulator="/usr/bin/qemu-system-x86_64",
    image_sha256="e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    new_emulator="/var/lib/hostupdate/qemu/10.0/qemu",
    skew_ns=-1500000,
    stopped_monotonic_ns=5000000000,
    stopped_realtime_ns=1767323045000000000,
)


def test_the_record_of_this_version_is_read_by_every_later_one() -> None:
    assert decode_parked(GOLDEN.read_bytes(), "golden") == RECORD
    assert encode_parked(RECORD) == GOLDEN.read_bytes()


def test_every_bit_counts() -> None:
    data = GOLDEN.read_bytes()
    for offset in range(0, len(data) - 1, 7):
        spoilt = data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :]
        with pytest.raises(InputError):
            decode_parked(spoilt, "spoilt")


@pytest.mark.parametrize("cut", [0, 1, 100, -20])
def test_a_part_of_a_record_is_none(cut: int) -> None:
    with pytest.raises(InputError, match="damaged"):
        decode_parked(GOLDEN.read_bytes()[:cut], "cut")


def test_another_schema_says_who_can_read_it() -> None:
    data = json.dumps(json.loads(GOLDEN.read_bytes()) | {"schema": "hostupdate-parked-v2"})
    with pytest.raises(InputError, match="parked-v2") as caught:
        decode_parked(data.encode(), "later")
    assert "version of hostupdate" in caught.value.remedy


def test_a_store_of_records(tmp_path: Path) -> None:
    records = ParkedRecords(tmp_path)
    assert records.read(UUID) is None and records.uuids() == []
    records.write(RECORD)
    assert records.read(UUID) == RECORD and records.uuids() == [UUID]
    assert records.directory.stat().st_mode & 0o777 == 0o700
    assert records.path(UUID).stat().st_mode & 0o777 == 0o600
    running = msgspec.structs.replace(RECORD, state=ParkedState.RUNNING)
    records.write(running)
    assert records.read(UUID) == running
    records.image(UUID).write_bytes(b"i")
    records.loadable(UUID).write_bytes(b"l")
    records.remove(UUID)
    records.remove(UUID)
    assert list(records.directory.iterdir()) == []


def test_the_record_of_another_guest(tmp_path: Path) -> None:
    records = ParkedRecords(tmp_path)
    records.write(RECORD)
    other = UUID.replace("4", "5")
    records.path(UUID).rename(records.path(other))
    with pytest.raises(InputError, match=UUID):
        records.read(other)


def test_a_record_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    records = ParkedRecords(tmp_path)
    records.write(RECORD)
    in_the_way = records.path(UUID).with_name(f"{UUID}.json.new")
    in_the_way.mkdir()
    with pytest.raises(PrerequisiteError):
        records.write(msgspec.structs.replace(RECORD, state=ParkedState.RUNNING))
    in_the_way.rmdir()
    assert records.read(UUID) == RECORD


def test_a_way_that_this_version_does_not_know() -> None:
    """Said before anything is touched: there is nothing here to touch."""
    nowhere: Any = None
    with pytest.raises(GuestError, match="by-post") as caught:
        recover(nowhere, msgspec.structs.replace(RECORD, way="by-post"))
    assert "version" in caught.value.remedy
