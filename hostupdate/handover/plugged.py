"""A QEMU's command line with the devices that it has now: some were plugged in after its start,
and some of those that it was started with are gone.

A device that is not on the command line is told of by QEMU itself: every property that has not its
default value (device-list-properties, qom-get). libvirt's words would not do: of a definition it
tells those of other network cards than the guest's, without their queues and maybe at other
addresses (qemuConnectDomainXMLToNative). It must know the device all the same, for it is libvirt
that starts the new QEMU.

A state does not load where a device is missing. One too many goes unnoticed, unless another has
its place.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

from hostupdate.errors import HypervisorError, RefusedError
from hostupdate.handover import inquiry
from hostupdate.handover.harmless import Value
from hostupdate.handover.inquiry import Command

_HOME = "/machine/peripheral"
_CHILD = re.compile(r"child<(.*)>")
#: Numbers that tell a device from another that had its name before.
_TELLING = ("vectors", "num-queues", "num_queues", "nr", "scsi-id", "lun")
#: QEMU finds them out, and some cannot be set.
_FOUND_OUT = {"attached", "romsize", "size"}
#: Property of a device -> the option that makes what it names.
_MADE_BY = {"netdev": "-netdev", "chardev": "-chardev"}
_MADE_BY |= dict.fromkeys(("rng", "memdev", "iothread"), "-object")
_SHARED = {"iothread"}  #: more than one device may have it
_FIRST = {"-device": "driver", "-netdev": "type", "-chardev": "backend", "-object": "qom-type"}
#: Of a RAM backend; a rehearsal makes the rest anew.
_RAM = ("size", "share", "mem-path", "x-use-canonical-path-for-ramblock-id")


def with_plugged(command: Command, command_line: Sequence[str], xml: str) -> list[str]:
    """The words that a guest's QEMU would have been started with, had it had its devices of now
    from the first; where it has those of its start, its words as they are. ``xml`` is the guest's
    live definition.

    Raises RefusedError where it has one that cannot be told of, or that libvirt does not know, and
    what ``command`` raises.
    """
    there = _children(command)
    started = {value.fields["id"]: value for value in _devices(command_line)}
    stayed = {
        name
        for name, value in started.items()
        if name in there and _is_same(command, name, there[name], value)
    }
    gone = {name: value for name, value in started.items() if name not in stayed}
    plugged = {name: kind for name, kind in there.items() if name not in stayed}
    if not gone and not plugged:
        return list(command_line)
    words = _without(command_line, gone)
    return [*words, *_Plugged(command, words, xml).words_of(plugged)]


def _children(command: Command) -> dict[str, str]:
    """The devices that have an id, and their types."""
    listed = command("qom-list", {"path": _HOME})
    kinds = {child["name"]: _CHILD.fullmatch(child["type"]) for child in listed}
    return {name: kind[1] for name, kind in sorted(kinds.items()) if kind}


def _devices(words: Sequence[str]) -> list[Value]:
    """Those of a command line that have an id."""
    made = [value for option, value in _made(words) if option == "-device"]
    return [value for value in made if "id" in value.fields]


def _made(words: Sequence[str]) -> Iterator[tuple[str, Value]]:
    """Options that make something, with an id as a rule."""
    for option, text in pairwise(words):
        if option in _FIRST:
            yield option, Value.parse(text, _FIRST[option])


def _get(command: Command, name: str, key: str) -> Any:
    return command("qom-get", {"path": f"{_HOME}/{name}", "property": key})


def _is_same(command: Command, name: str, kind: str, value: Value) -> bool:
    """Whether a device is the one that the command line has under its name."""
    driver = value.fields.get("driver", "")
    if kind != driver:
        with suppress(HypervisorError):  # a name that QEMU lists no type under is another's alias
            command("device-list-properties", {"typename": driver})
            return False
    told = {key: str(value.fields[key]) for key in _TELLING if key in value.fields}
    with suppress(HypervisorError, ValueError):
        place = value.fields.get("addr")
        if isinstance(place, str):
            slot, _, function = place.partition(".")
            told["addr"] = str(int(slot, 16) << 3 | int(function or "0", 16))
        return all(str(_get(command, name, key)) == number for key, number in told.items())
    return True


def _without(command_line: Sequence[str], gone: Mapping[str, Value]) -> list[str]:
    """Without devices, and without what was there for them alone."""
    made = {("-device", name) for name in gone}
    for value in gone.values():
        for key in (_MADE_BY.keys() - _SHARED) & value.fields.keys():
            made.add((_MADE_BY[key], value.fields[key]))
    words: list[str] = []
    rest = iter(command_line)
    for option in rest:
        if option not in _FIRST:
            words.append(option)
            continue
        text = next(rest, "")
        if (option, Value.parse(text, _FIRST[option]).fields.get("id")) not in made:
            words += [option, text]
    return words


class _Plugged:
    """Words for devices that the command line ``words`` has not."""

    def __init__(self, command: Command, words: Sequence[str], xml: str) -> None:
        self._command = command
        self._disks = inquiry.disks(command)
        found = command("query-hotpluggable-cpus", {})
        self._cpus = {cpu["qom-path"]: cpu["props"] for cpu in found if "qom-path" in cpu}
        aliases = ET.fromstring(xml).iterfind("devices/*/alias")
        self._known = {alias.get("name") for alias in aliases}
        #: QEMU makes devices in JSON after all others, whatever their order
        self._json = any(value.json for value in _devices(words))
        self._there = {(option, value.fields.get("id")) for option, value in _made(words)}

    def words_of(self, plugged: Mapping[str, str]) -> list[str]:
        buses = {name: str(_get(self._command, name, "parent_bus")) for name in plugged}
        words: list[str] = []
        problems = []
        for name in _parents_first(buses):
            try:
                words += self._device(name, plugged[name], buses[name].rpartition("/")[2])
            except HypervisorError as error:
                problems.append(f"{name} ({plugged[name]}): {error}")
        if problems:
            raise RefusedError(
                [f"devices were plugged in since it was started: {each}" for each in problems],
                remedy="unplug them",
            )
        return words

    def _device(self, name: str, kind: str, bus: str) -> list[str]:
        fields: dict[str, Any] = {"driver": kind, "id": name}
        if (cpu := self._cpus.get(f"{_HOME}/{name}")) is not None:
            return self._word("-device", fields | cpu)
        if name not in self._known:
            raise HypervisorError("libvirt does not know it, and would start a QEMU without it")
        if bus:
            fields["bus"] = bus
        words = []
        for each in self._command("device-list-properties", {"typename": kind}):
            key = each["name"]
            value = self._value(name, key, each["type"], each.get("default-value"))
            if value is None:
                continue
            fields[key] = value
            if key in _MADE_BY and (_MADE_BY[key], value) not in self._there:
                self._there.add((_MADE_BY[key], value))
                words += self._word(_MADE_BY[key], {"id": value} | self._backend(key, value))
        return [*words, *self._word("-device", fields)]

    def _value(self, name: str, key: str, kind: str, default: Any) -> Any:
        """A property's value; None where it need not be told. What begins with ``x-`` comes from
        the age of the machine."""
        if key == "drive":  # a USB disk has let go of it
            return f"plugged-{name}" if name in self._disks else None
        linked = kind.startswith("link<")
        if key in _FOUND_OUT or key.startswith("x-") or kind.startswith("child<"):
            return None
        if linked and key not in _MADE_BY:
            return None
        value = _get(self._command, name, key)
        if key == "romfile":  # an empty one is none
            return value
        if value in ("", None) or value == default:
            return None
        if key == "addr" and kind == "int32":
            return f"{value >> 3:#x}.{value & 7:#x}"
        return value.rpartition("/")[2] if linked else value

    def _backend(self, key: str, name: str) -> dict[str, Any]:
        match key:
            case "netdev":
                return self._netdev(name)
            case "chardev":
                return {"backend": "null"}
            case "rng":
                return {"qom-type": "rng-builtin"}
            case "iothread":
                return {"qom-type": "iothread"}
        return {
            "qom-type" if each == "type" else each: self._command(
                "qom-get", {"path": f"/objects/{name}", "property": each}
            )
            for each in ("type", *_RAM)
        }

    def _netdev(self, name: str) -> dict[str, Any]:
        """``hostnet1: index=0,type=tap,...``, a line for each of its queues."""
        text = self._command("human-monitor-command", {"command-line": "info network"})
        kinds = re.findall(rf"^\W*{re.escape(name)}: index=\d+,type=([\w-]+)", text, re.MULTILINE)
        if not kinds:
            raise HypervisorError(f"QEMU does not tell of {name}")
        return {"type": kinds[0]} | ({"queues": len(kinds)} if len(kinds) > 1 else {})

    def _word(self, option: str, fields: dict[str, Any]) -> list[str]:
        return [option, Value(fields, self._json and option != "-chardev").text()]


def _parents_first(buses: Mapping[str, str]) -> list[str]:
    """Devices, with the paths of their buses, in an order in which they can be made."""
    ordered: list[str] = []
    left = dict(buses)
    while left:
        for name, bus in [*left.items()]:
            if bus.removeprefix(f"{_HOME}/").split("/")[0] not in left:
                ordered.append(name)
                del left[name]
    return ordered
