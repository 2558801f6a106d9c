"""A parked guest's image, found again: what lies at its place may be anything."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import msgspec
import pytest

from hostupdate.errors import GuestError
from hostupdate.handover import image, parked_image
from hostupdate.parked import ParkedRecord
from tests.unit.test_image import SAVE
from tests.unit.test_parked import RECORD


@pytest.fixture
def record(tmp_path: Path) -> ParkedRecord:
    """Of a guest whose image lies where libvirt keeps it; our copy is gone."""
    (tmp_path / "guard").write_bytes(SAVE)
    return msgspec.structs.replace(
        RECORD,
        image=str(tmp_path / "image"),
        guard=str(tmp_path / "guard"),
        image_sha256=hashlib.sha256(SAVE).hexdigest(),
    )


def test_one_of_two_is_enough(record: ParkedRecord) -> None:
    assert parked_image.intact(record).path == Path(record.guard)


@pytest.mark.parametrize("what", ["fifo", "link", "device", "large"])
def test_what_is_no_image_is_not_read(record: ParkedRecord, what: str) -> None:
    guard = Path(record.guard)
    kept = guard.rename(guard.with_name("kept"))
    match what:
        case "fifo":
            os.mkfifo(guard)
        case "link":
            guard.symlink_to(kept)
        case "device":
            guard.symlink_to("/dev/zero")
        case "large":
            guard.touch()
            os.truncate(guard, image.SIZE_MAX_BYTES + 1)
    with pytest.raises(GuestError, match="no image of it is intact"):
        parked_image.intact(record)
