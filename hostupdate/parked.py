"""The parked record: what is known of one guest whose QEMU is being replaced.

It crosses an update: another version of this program, in another boot of the host, may be the one
that reads it. Its form is frozen by a golden file; a new form gets a new schema.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum

import msgspec

from hostupdate.errors import InputError
from hostupdate.model import GuestState

PARKED_SCHEMA = "hostupdate-parked-v1"
_REMEDY = "check the guest by hand; `virsh list --all` shows whether it runs"


class ParkedState(StrEnum):
    """How far a handover has come. A guest that is through has no record."""

    LINKED = "linked"  #: it runs under its old QEMU, or is being saved; its RAM has a second name
    SAVED = "saved"  #: no QEMU; the image is complete and the RAM lies in its files
    STRIPPED = "stripped"  #: as saved; a QEMU may be loading it, or hold it paused
    RUNNING = "running"  #: it was let run under the new QEMU: the image is history


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainFacts:
    """What libvirt says of a guest. ``busy``: it is saving, starting or moving the guest right now.
    ``restored``: it is paused as a restore leaves it, and has not run since. ``problem`` says why
    it cannot be parked, as far as its definition tells; empty where it can."""

    name: str
    state: GuestState
    busy: bool
    restored: bool
    persistent: bool
    emulator: str
    memory_bytes: int
    problem: str = ""

    @property
    def active(self) -> bool:
        """It has a QEMU."""
        return self.state in (GuestState.RUNNING, GuestState.PAUSED)

    @property
    def let_run(self) -> bool:
        """It runs or did under the QEMU that it has, whatever has stopped it since: its owner, or a
        disk that is full. Its RAM has moved on."""
        return self.active and not (self.restored or self.busy)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """When QEMU said that a guest stopped or ran, by its own event."""

    realtime_ns: int
    monotonic_ns: int


class RamFile(msgspec.Struct, frozen=True, kw_only=True):
    """One block of a guest's RAM. ``block`` names it for QEMU and in libvirt's directory; ``link``
    is our own name of the file. ``device`` means something in one boot only."""

    block: str
    link: str
    size_bytes: int
    inode: int
    device: int


class ParkedRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One guest. Paths are absolute.

    ``guard`` is the image where libvirt keeps it: it loads under no QEMU as it is, and so keeps
    others from starting the guest. ``image`` is our copy of it. ``ram_directory`` holds a
    directory ``ID-short_name`` for each running guest. ``stopped_*_ns``: the STOP event.
    ``problem``: why it must not be let run, as long as nobody says that it is all the same.
    """

    run_id: str
    boot_id: str
    uri: str
    name: str
    uuid: str
    way: str
    state: ParkedState
    persistent: bool
    was_running: bool
    ram_directory: str
    short_name: str
    ram: tuple[RamFile, ...]
    image: str
    guard: str
    old_emulator: str
    image_sha256: str | None = None
    new_emulator: str | None = None  #: None: the one that the image names
    skew_ns: int | None = None  #: its real time minus the host's, before the pause
    stopped_monotonic_ns: int | None = None
    stopped_realtime_ns: int | None = None
    problem: str = ""

    @property
    def moved_on(self) -> bool:
        """It was let run under its new QEMU, or may have been; not under the old one again."""
        return self.state is ParkedState.RUNNING and self.new_emulator != self.old_emulator


class _Sealed(msgspec.Struct, kw_only=True):
    schema: str
    sha256: str
    record: msgspec.Raw


class _Header(msgspec.Struct):
    schema: str = ""


def encode_parked(record: ParkedRecord) -> bytes:
    """The record as it goes to disk: JSON, with a checksum over the bytes of ``record``."""
    body = msgspec.json.format(msgspec.json.encode(record), indent=2)
    digest = hashlib.sha256(body).hexdigest()
    sealed = _Sealed(schema=PARKED_SCHEMA, sha256=digest, record=msgspec.Raw(body))
    return msgspec.json.encode(sealed) + b"\n"


def decode_parked(data: bytes, source: str) -> ParkedRecord:
    """What :func:`encode_parked` wrote. InputError: damaged, or of another version; ``source``
    names where it comes from."""
    try:
        schema = msgspec.json.decode(data, type=_Header).schema
        if schema != PARKED_SCHEMA:
            raise InputError(
                source, "schema", f"{schema!r} is not {PARKED_SCHEMA!r}",
                remedy="finish it with the version of hostupdate that wrote it",
            )  # fmt: skip
        sealed = msgspec.json.decode(data, type=_Sealed)
        if hashlib.sha256(bytes(sealed.record)).hexdigest() != sealed.sha256:
            raise InputError(source, "sha256", "does not fit the record", remedy=_REMEDY)
        return msgspec.json.decode(sealed.record, type=ParkedRecord)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(source, "", f"damaged: {error}", remedy=_REMEDY) from error
