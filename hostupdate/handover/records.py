"""The parked records of a host, one file a guest, and the images beside them."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from hostupdate.errors import InputError, PrerequisiteError
from hostupdate.parked import ParkedRecord, decode_parked, encode_parked


class ParkedRecords:
    """``STATE/parked/UUID.json``. A guest that is through has no file here."""

    def __init__(self, state: Path) -> None:
        self.directory = state / "parked"

    def path(self, uuid: str) -> Path:
        """Where a guest's record lies."""
        return self.directory / f"{uuid}.json"

    def image(self, uuid: str) -> Path:
        """Where our copy of its image lies."""
        return self.directory / f"{uuid}.image"

    def loadable(self, uuid: str) -> Path:
        """Where the image lies that a QEMU can load; there only while one does."""
        return self.directory / f"{uuid}.loadable"

    def spare(self, uuid: str) -> Path:
        """Room on the disk that is given up where there is no other: a guest that is parked must
        not wait for an operator to make some."""
        return self.directory / f"{uuid}.spare"

    def reserve(self, uuid: str, size_bytes: int) -> None:
        """Takes that room. PrerequisiteError: there is not so much."""
        path = self.spare(uuid)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, size_bytes)
            finally:
                os.close(fd)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise _no_room(path, error) from error

    def write(self, record: ParkedRecord) -> None:
        """Replaces the guest's record as a whole; on disk when it returns. PrerequisiteError:
        the one before is still there."""
        store(self.path(record.uuid), encode_parked(record), spare=self.spare(record.uuid))

    def read(self, uuid: str) -> ParkedRecord | None:
        """A guest's record; None where it has none. InputError: damaged, foreign, or of another
        guest."""
        path = self.path(uuid)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InputError(
                str(path), "", error.strerror or "cannot be read", remedy="run as root"
            ) from error
        record = decode_parked(data, str(path))
        if record.uuid != uuid:
            raise InputError(
                str(path), "record.uuid", f"{record.uuid} is not the guest that the file names",
                remedy="give the file the name that its record says",
            )  # fmt: skip
        return record

    def uuids(self) -> list[str]:
        """Guests that have a record, whatever its state."""
        return sorted(path.stem for path in self.directory.glob("*.json"))

    def remove(self, uuid: str) -> None:
        """Removes the images, then the record. Safe to repeat."""
        for path in (self.spare(uuid), self.loadable(uuid), self.image(uuid), self.path(uuid)):
            _unfinished(path).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            sync_directory(self.directory)


def store(
    path: Path, data: bytes, *, mode: int = 0o600, durable: bool = True, spare: Path | None = None
) -> None:
    """Writes a file whole or not at all; on disk when it returns, where ``durable``. Makes its
    directory, for us alone. ``spare`` is removed where there is no room. PrerequisiteError: what
    was there before still is."""
    try:
        _store(path, data, mode, durable)
    except OSError as error:
        if spare is not None and error.errno in (errno.ENOSPC, errno.EDQUOT) and spare.exists():
            spare.unlink()
            store(path, data, mode=mode, durable=durable)
            return
        raise _no_room(path, error) from error


def _store(path: Path, data: bytes, mode: int, durable: bool) -> None:
    temporary = _unfinished(path)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            temporary.unlink()  # of a run that was killed
        # libvirt's directory of images is its QEMUs': a link of theirs is not followed.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(temporary, flags, 0o600)
        try:
            while data:
                data = data[os.write(fd, data) :]
            if durable:
                os.fsync(fd)
            if mode != 0o600:  # libvirt runs whatever is executable among its hooks
                os.fchmod(fd, mode)
                os.fsync(fd)
        finally:
            os.close(fd)
        temporary.rename(path)
        if durable:
            sync_directory(path.parent)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def erase(path: Path) -> None:
    """Removes a file that :func:`store` or another has written, for good. Safe to repeat.
    OSError."""
    try:
        for each in (_unfinished(path), path):
            each.unlink(missing_ok=True)
        sync_directory(path.parent)
    except (FileNotFoundError, NotADirectoryError):
        pass  # nor is its directory there


def _unfinished(path: Path) -> Path:
    """The file before it is whole."""
    return path.with_name(path.name + ".new")


def _no_room(path: Path, error: OSError) -> PrerequisiteError:
    return PrerequisiteError(
        f"{path} cannot be written: {error.strerror}", remedy=f"make room on {path.parent}"
    )


def sync_directory(path: Path) -> None:
    """Flushes a directory: what was renamed or removed in it stays so."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
