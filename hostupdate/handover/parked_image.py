"""A parked guest's image: whether it is right, whether it is still the same, and what a QEMU loads
of it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from uuid import UUID

from hostupdate.errors import GuestError, ImageError
from hostupdate.handover import domain, image
from hostupdate.parked import ParkedRecord


def checked(record: ParkedRecord, path: Path) -> bytes:
    """An image that is complete, this guest's, and without just the RAM that is parked.
    GuestError: it is not."""
    try:
        found = image.read_image(path)
        files = {ram.block: ram.size_bytes for ram in record.ram}
        kept = {}
        for name, size_bytes in found.stripped.kept.items():
            block = name.rpartition("/")[2]  # QEMU may give it as /objects/NAME
            file_bytes = files.pop(block, 0)  # files end with whole pages, which may be huge
            kept[name] = min(size_bytes, file_bytes)
        image.check(found, uuid=UUID(record.uuid), kept=kept | files)
    except ImageError as error:
        raise GuestError(record.name, f"it has been saved, but {error}") from error
    return found.content


def intact(record: ParkedRecord) -> image.SaveImage:
    """The image as it was saved: our copy, or libvirt's. GuestError: neither is what it was."""
    problems = []
    for path in dict.fromkeys((record.image, record.guard)):
        try:
            data = image.read(Path(path))
        except ImageError as error:
            problems.append(str(error))
            continue
        if hashlib.sha256(data).hexdigest() == record.image_sha256:
            return image.parse(Path(path), data)
        problems.append(f"{path} has changed")
    problem = "; ".join(problems)
    raise GuestError(record.name, f"no image of it is intact ({problem}); it stays parked")


def is_saved(record: ParkedRecord, path: Path) -> bool:
    """Whether the file at ``path`` is what was saved of the guest."""
    try:
        return hashlib.sha256(image.read(path)).hexdigest() == record.image_sha256
    except ImageError:
        return False


def loadable(saved: image.SaveImage, emulator: str | None, ticket: str) -> bytes:
    """What a QEMU takes that nobody told of RAM in files: the guest, paused, with the ``ticket``
    by which the hook knows it. ImageError."""
    xml = domain.with_ticket(saved.xml, ticket, str(saved.path))
    if emulator is not None:
        xml = domain.with_emulator(xml, emulator, str(saved.path))
    head = image.head(xml, saved.cookie, running=False, stored=image.GZIP)
    return head + image.gzipped(saved.stripped.stream)
