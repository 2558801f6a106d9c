"""The host's configuration, and the decoding of TOML that it shares with the manifest.

No file is read here: callers pass what they read, and a name for it. Whatever is wrong in a
document becomes one InputError that names the file, the field, the value and what to write.

A Struct field is written with hyphens for its underscores, and without the ``_ns`` of a duration.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, inspect

from hostupdate.durations import (
    MILLISECOND,
    MINUTE,
    SECOND,
    DurationError,
    bare,
    durations_to_ns,
    quoted,
    span,
)
from hostupdate.errors import InputError
from hostupdate.model import HARD_CAP_NS

MAX_DOCUMENT_BYTES = 1 << 20

T = TypeVar("T")
Switch = Annotated[bool, Meta(description="true or false")]


def _written(name: str) -> str:
    return name.removesuffix("_ns").replace("_", "-")


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename=_written):
    """A TOML table that refuses keys it does not know."""


class Pause(Table, frozen=True, kw_only=True):
    """How guests are paused."""

    #: auto: freeze while the predicted blackout is within freeze-limit, else stop.
    method: Literal["auto", "freeze", "stop"] = "auto"
    #: Longest predicted blackout for which auto takes freeze.
    freeze_limit_ns: Annotated[int, span(HARD_CAP_NS)] = 10 * SECOND
    #: Longest time for libvirt to stop all guests.
    stop_timeout_ns: Annotated[int, span(HARD_CAP_NS)] = 5 * SECOND


class Budget(Table, frozen=True, kw_only=True):
    """The longest allowed blackout."""

    host_ns: Annotated[int, span(HARD_CAP_NS)] = HARD_CAP_NS


class Deadlines(Table, frozen=True, kw_only=True):
    """How long to wait for others."""

    #: Each libvirt call of a run.
    libvirt_ns: Annotated[int, span(MINUTE)] = 5 * SECOND
    #: Each libvirt call of the recovery; then the guest's own monitor socket is used.
    recovery_libvirt_ns: Annotated[int, span(HARD_CAP_NS)] = 2 * SECOND
    #: Once the keeper has thawed guests: for a live orchestrator to answer before recovery runs.
    keeper_grace_ns: Annotated[int, span(10 * SECOND)] = 2 * SECOND


class Residency(Table, frozen=True, kw_only=True):
    """Guest RAM stays in RAM, and the proof of it."""

    #: Digest of guest RAM before and after the pause: some pages, all of them, or none.
    verify_ram: Literal["sample", "full", "off"] = "sample"
    #: The keeper locks guest RAM that the cgroup cannot protect.
    lock: Switch = True


class Clock(Table, frozen=True, kw_only=True):
    """Guests' clocks after a pause."""

    #: A guest's clock is right within this, or within what can be measured.
    tolerance_ns: Annotated[int, span(MINUTE)] = MILLISECOND
    #: all: guests get the host's time; ours: only what the pause took; off: measured only.
    correct: Literal["all", "ours", "off"] = "all"
    #: A guest whose clock cannot be verified makes the run end degraded.
    require: Switch = False
    #: The host's clock is right although the kernel says that nothing synchronises it.
    trust_host: Switch = False
    #: Network links of guests are down from before the pause until their clocks are right.
    hold_network: Switch = False
    #: Programs may be run in guests: to set a clock by date, to look for lockups by dmesg.
    guest_exec: Switch = False
    #: Longest time to measure all guests, and to correct all guests.
    timeout_ns: Annotated[int, span(MINUTE)] = 10 * SECOND


#: libvirtd takes so many calls of one connection and one more (max_client_requests in
#: libvirtd.conf); it would not even see a keepalive beyond that.
WORKERS_MAX = 4


class Handover(Table, frozen=True, kw_only=True):
    """Guests under another QEMU."""

    #: save: libvirt saves a guest; own-save: its QEMU is made to, and ended, which is quicker.
    way: Literal["save", "own-save"] = "own-save"
    #: How many are parked or unparked at a time, where all must be parked. 0: one a core, up to 4.
    workers: Annotated[int, Meta(ge=0, le=WORKERS_MAX, description="0 to 4", examples=[2])] = 0


#: A file or directory of this host.
Place = Annotated[
    str,
    Meta(
        pattern=r"\A/[^\x00-\x1f\x7f]*\Z",
        description="an absolute path",
        examples=["/etc/libvirt/hooks"],
    ),
]


class Paths(Table, frozen=True, kw_only=True):
    """Where things are on this host."""

    #: The mount of cgroup v2; "" finds it, "none" acts as if the host had no cgroup v2.
    cgroup2: Annotated[
        str,
        Meta(
            pattern=r"\A(none|/[^\x00-\x1f\x7f]*)?\Z",
            description='an absolute path, "none" or ""',
            examples=["/sys/fs/cgroup"],
        ),
    ] = ""
    #: Where libvirt looks for hooks.
    libvirt_hooks: Place = "/etc/libvirt/hooks"
    #: Where libvirt keeps images of saved guests.
    libvirt_saves: Place = "/var/lib/libvirt/qemu/save"
    #: libvirt's settings of its QEMU driver.
    qemu_conf: Place = "/etc/libvirt/qemu.conf"
    #: Where QEMUs are kept that guests may have to go back to; guests' users must reach it.
    builds: Place = "/var/lib/hostupdate-qemu"


class Config(Table, frozen=True, kw_only=True):
    """All of the configuration. ``Config()`` is what a host without any file has."""

    pause: Pause = Pause()
    budget: Budget = Budget()
    deadlines: Deadlines = Deadlines()
    residency: Residency = Residency()
    clock: Clock = Clock()
    handover: Handover = Handover()
    paths: Paths = Paths()


def decode_config(documents: Sequence[tuple[str, bytes]]) -> Config:
    """Merges ``documents``, (source, TOML) in rising precedence, into one Config.

    Tables are merged key by key, the last document that has a key wins. Every document must be
    right by itself, so an InputError names the file that holds the mistake.
    """
    merged: dict[str, object] = {}
    for source, data in documents:
        document = decode_toml(data, source)
        convert(document, Config, source)
        merged = _merge(merged, document)
    return convert(merged, Config, "configuration")


def _merge(below: Mapping[str, object], above: Mapping[str, object]) -> dict[str, object]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        merged[key] = _merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def decode_toml(data: bytes, source: str) -> dict[str, object]:
    """The raw document. Raises InputError with line and column where it is not TOML."""

    def error(problem: str, remedy: str) -> InputError:
        return InputError(source, "", problem, remedy=remedy)

    if len(data) > MAX_DOCUMENT_BYTES:
        raise error(f"more than {MAX_DOCUMENT_BYTES} bytes", "name the right file")
    try:
        text = data.decode()
    except UnicodeDecodeError as bad:
        line = data.count(b"\n", 0, bad.start) + 1
        raise error(
            f"line {line}: byte 0x{data[bad.start]:02x} is not UTF-8", "save the file as UTF-8"
        ) from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as bad:
        at = re.search(r"at line (\d+), column \d+", str(bad))
        shown = ": " + quoted(text.split("\n")[int(at[1]) - 1].strip()) if at else ""
        raise error(
            f"not valid TOML: {bad}{shown}",
            'correct the line; texts and durations are written in quotes, e.g. timeout = "5s"',
        ) from None
    except (RecursionError, ValueError) as bad:  # nested 300 deep; a number of 4300 digits
        raise error(f"not readable as TOML: {bad}", "simplify the file") from None


def convert(document: Mapping[str, object], into: type[T], source: str) -> T:
    """``document`` as the Table ``into``. Raises InputError for its first mistake."""
    kind = inspect.type_info(into)
    try:
        return msgspec.convert(durations_to_ns(document, kind), into)
    except DurationError as bad:
        at = _Place(document, kind, bad.keys)
        raise at.error(source, f"{at.shown} {bad.problem}", bad.remedy) from None
    except msgspec.ValidationError as bad:
        text = str(bad)
    # The one place that reads msgspec's words, such as: Expected `str`, got `int` - at `$.step[0]`
    path = re.search(r" - at `\$([^`]*)`\Z", text)
    tokens = re.findall(r"\.([^.\[]+)|\[(\d+)\]", path[1]) if path else []
    keys = tuple(name or int(index) for name, index in tokens)
    at = _Place(document, kind, keys)
    if text.startswith("Object contains unknown field"):
        names = at.names
        key = next(key for key in at.value if key not in names)
        near = difflib.get_close_matches(key, names, n=1)
        guess = f"did you mean {near[0]}? " if near else ""
        problem, remedy = f"unknown key {quoted(key)}", f"{guess}valid keys: {', '.join(names)}"
        at = _Place(document, kind, (*keys, key))
    elif missing := re.match(r"Object missing required field `([^`]+)`", text):
        at = _Place(document, kind, (*keys, missing[1]))
        problem, remedy = "missing", f"add it: {at.wanted}"
    else:
        problem, remedy = f"{at.shown} is not {at.words}", f"write {at.wanted}"
    raise at.error(source, problem, remedy)


class _Place:
    """A place in a raw document: the value there, and what the types say of it."""

    def __init__(self, document: Any, kind: inspect.Type, keys: Sequence[str | int]) -> None:
        self.value, self._declared = document, kind
        self._field = self._entry = ""
        for key in keys:
            outer = bare(self._declared)
            if isinstance(outer, inspect.StructType):
                types = {field.encode_name: field.type for field in outer.fields}
                self._declared = types.get(str(key), inspect.AnyType())
            elif isinstance(outer, inspect.VarTupleType):
                self._declared = outer.item_type
            if isinstance(key, int):  # an entry of [[step]]; people count from 1
                self.value = self.value[key]
                name = self.value.get("name") if isinstance(self.value, dict) else None
                if isinstance(name, str) and keys[-1] != "name":
                    self._entry = f" ({self._field} {quoted(name)})"
                self._field += f"[{key + 1}]"
            else:
                self.value = self.value.get(key)
                part = key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else quoted(key)
                self._field += f".{part}" if self._field else part

    def error(self, source: str, problem: str, remedy: str) -> InputError:
        return InputError(source, self._field, problem + self._entry, remedy=remedy)

    @property
    def names(self) -> list[str]:
        """The keys that may be written here."""
        kind = bare(self._declared)
        return [f.encode_name for f in kind.fields] if isinstance(kind, inspect.StructType) else []

    @property
    def shown(self) -> str:
        if isinstance(self.value, dict | list):
            return "a table" if isinstance(self.value, dict) else f"a list of {len(self.value)}"
        return quoted(self.value) if isinstance(self.value, str) else str(self.value).lower()

    @property
    def words(self) -> str:
        """What belongs here."""
        kind = bare(self._declared)
        if isinstance(kind, inspect.LiteralType):
            return "one of " + ", ".join(f'"{value}"' for value in kind.values)
        plain = "a table" if isinstance(kind, inspect.StructType) else "a text"
        return str(self._schema.get("description", plain))

    @property
    def wanted(self) -> str:
        examples = self._schema.get("examples")
        return f"{self.words}, e.g. {json.dumps(examples[0])}" if examples else self.words

    @property
    def _schema(self) -> dict[str, Any]:
        kinds = [self._declared]
        if isinstance(self._declared, inspect.UnionType):
            kinds = list(self._declared.types)
        found = (kind.extra_json_schema for kind in kinds if isinstance(kind, inspect.Metadata))
        return next(found, None) or {}
