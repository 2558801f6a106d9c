"""The record of a run that has not ended: one small file, whole or not at all.

It holds what lets guests run again, apart from the database: recovery must not depend on more than
it needs, and a boot must see by one look at the directory whether there is anything to do.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

import msgspec

from hostupdate.errors import InputError, PrerequisiteError
from hostupdate.model import PENDING_SCHEMA, PendingRecord

#: Its name in the state directory.
PENDING = "pending.json"


class _Envelope(msgspec.Struct, frozen=True):
    """``sha256`` is of the bytes of ``record`` as they stand in the file."""

    compatible: str
    sha256: str
    record: msgspec.Raw


def write_pending(path: Path, record: PendingRecord) -> None:
    """Replaces the record; on disk when this returns. PrerequisiteError where it cannot be."""
    body = msgspec.json.encode(record)
    envelope = _Envelope(
        compatible=PENDING_SCHEMA,
        sha256=hashlib.sha256(body).hexdigest(),
        record=msgspec.Raw(body),
    )
    data = msgspec.json.encode(envelope) + b"\n"
    temporary = path.with_suffix(".new")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(temporary, flags, 0o600)
        try:
            while data:
                data = data[os.write(fd, data) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        temporary.rename(path)
        _sync_directory(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise PrerequisiteError(
            f"{path} cannot be written: {error.strerror}",
            remedy="make room, or choose another state directory with --state",
        ) from error


def read_pending(path: Path) -> PendingRecord | None:
    """The record, or None where there is none. InputError where it is not as it was written."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _damaged(path, "", error.strerror or "cannot be read") from error
    try:
        envelope = msgspec.json.decode(data, type=_Envelope)
        if envelope.compatible != PENDING_SCHEMA:
            raise InputError(
                str(path), "compatible", f"{envelope.compatible!r} is not {PENDING_SCHEMA!r}",
                remedy="run `hostupdate resume` of the version that wrote it",
            )  # fmt: skip
        if hashlib.sha256(envelope.record).hexdigest() != envelope.sha256:
            raise _damaged(path, "sha256", "is not that of the record")
        return msgspec.json.decode(envelope.record, type=PendingRecord)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _damaged(path, "", f"damaged: {error}") from error


def remove_pending(path: Path) -> None:
    """Every guest runs and nothing is left to do. Safe to repeat."""
    with suppress(FileNotFoundError):
        path.unlink()
        _sync_directory(path.parent)


def _damaged(path: Path, field: str, problem: str) -> InputError:
    return InputError(
        str(path), field, problem,
        # A frozen guest is one that runs, by libvirt's account.
        remedy="see with `hostupdate guests` that every guest runs and none is frozen, "
        f"then remove it: rm {path}",
    )  # fmt: skip


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
