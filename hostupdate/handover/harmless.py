"""A QEMU's command line, made harmless: the same machine for the guest, and nothing of the world.

What is not known to be harmless, or how to make it so, is refused: a guest's files, sockets and
devices must not be touched by a second QEMU. Built for what libvirt writes (qemu_command.c).

Disks become null-co nodes of their size, character devices null, RAM files private copies. A tap
stays a tap, made anew: virtio-net loads only where the same offloads are there
(virtio_net_vnet_post_load), so that the QEMU must run in a network namespace of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from hostupdate.errors import RefusedError

#: What a guest may have asked for and a rehearsal does not need: words with an argument, without.
# fmt: off
_DROPPED = {
    "-name", "-sandbox", "-msg", "-mon", "-qmp", "-qmp-pretty", "-monitor", "-pidfile", "-D", "-d",
    "-trace", "-incoming", "-L", "-add-fd", "-runas", "-chroot", "-run-with", "-vnc", "-spice",
    "-display", "-k", "-watchdog-action", "-action", "-overcommit", "-compat", "-gdb", "-blockdev",
    "-uuid",
}
_DROPPED_FLAGS = {"-S", "-daemonize", "-nographic", "-no-shutdown", "-no-reboot"}
#: The machine itself, and files that are only read.
_KEPT = {
    "-M", "-accel", "-cpu", "-m", "-smp", "-numa", "-rtc", "-boot", "-global", "-smbios",
    "-kernel", "-initrd", "-append", "-dtb", "-bios", "-fw_cfg", "-acpitable", "-option-rom",
    "-vga",
}
_KEPT_FLAGS = {
    "-enable-kvm", "-nodefaults", "-no-user-config", "-no-hpet", "-no-acpi", "-no-fd-bootchk",
    "-usb",
}
# fmt: on
_KEPT_OBJECTS = {"iothread", "throttle-group", "rng-builtin", "memory-backend-ram"}
_DROPPED_OBJECTS = re.compile(r"secret|secret_keyring|tls-.*|authz-.*|pr-manager-helper|input-.*")
_HOST_DEVICES = re.compile(r"vfio|vhost|usb-host|scsi-generic|scsi-block|tpm|9p|doorbell|ccid-card")
_HOST_FIELDS = {"host", "sysfsdev", "hostbus", "hostdevice", "evdev", "fd", "vhostfd", "socket"}
_REMOVABLE = {"ide-cd", "scsi-cd", "floppy"}
_SOCKET_NETDEVS = {"socket", "stream", "dgram", "l2tpv3", "vde", "hubport"}
_USER_OUTSIDE = {"hostfwd", "guestfwd", "smb", "smbserver", "tftp", "bootfile"}
#: Of a RAM backend, what costs memory or ends it; ``pmem`` wants the file itself.
_RAM_COSTS = {"prealloc", "prealloc-threads", "prealloc-context", "discard-data", "pmem"}

_NO_UUID = "00000000-0000-0000-0000-000000000000"


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk as it is now."""

    size_bytes: int
    read_only: bool


def harmless(
    command_line: Sequence[str],
    ram: Mapping[str, str],
    disks: Mapping[str, Disk],
    *,
    read_only_ram: bool,
) -> list[str]:
    """The words for another QEMU, without its program and its monitor.

    ``ram`` holds the path of each RAM file by the id of its backend, ``disks`` what they are by
    node name and by device id. ``read_only_ram``: the QEMU can map a file privately that it opens
    for reading only (``rom``, since 8.2). RefusedError names every word that cannot be kept.
    """
    made = _Made(ram, disks, read_only_ram)
    if "-nodefaults" not in command_line:
        made.refuse("-nodefaults is not among its words: its default devices are unknown")
    words = iter(command_line[1:])
    for word in words:
        option = "-" + word.lstrip("-") if word.startswith("-") else word
        if option in _KEPT_FLAGS:
            made.words.append(option)
        elif option not in _DROPPED_FLAGS:
            made.take(option, next(words, ""))
    if made.refused:
        raise RefusedError(
            [f"a rehearsal cannot replace {each}" for each in made.refused],
            remedy="remove it from the guest",
        )
    nodes = [word for node in made.nodes.values() for word in ("-blockdev", node)]
    return [*nodes, *made.words, "-uuid", _NO_UUID, "-display", "none"]


class _Made:
    """What has become of the words so far."""

    def __init__(self, ram: Mapping[str, str], disks: Mapping[str, Disk], read_only: bool) -> None:
        self._ram, self._disks, self._read_only = ram, disks, read_only
        self.words: list[str] = []
        self.nodes: dict[str, str] = {}
        self.refused: list[str] = []
        self._taps = 0

    def refuse(self, what: str) -> None:
        self.refused.append(what)

    def take(self, option: str, text: str) -> None:
        match option:
            case "-machine":
                self._machine(Value.parse(text, "type"))
                self.words += [option, text]
            case "-chardev":
                value = Value.parse(text, "backend")
                self.words += [option, f"null,id={value.fields.get('id')}"]
            case "-audiodev":
                value = Value.parse(text, "driver")
                self.words += [option, f"none,id={value.fields.get('id')}"]
            case "-object":
                self._add(option, self._object(Value.parse(text, "qom-type")))
            case "-netdev":
                self._add(option, self._netdev(Value.parse(text, "type")))
            case "-device":
                self._add(option, self._device(Value.parse(text, "driver")))
            case _ if option in _KEPT:
                self.words += [option, text]
            case _ if option not in _DROPPED:
                self.refuse(f"{option} {text}".strip())

    def _add(self, option: str, value: Value | None) -> None:
        if value is not None:
            self.words += [option, value.text()]

    def _machine(self, value: Value) -> None:
        for name in ("confidential-guest-support", "memory-encryption"):
            if name in value.fields:
                self.refuse(f"-machine {name}")
        for name in ("pflash0", "pflash1"):
            if name in value.fields:
                self._node(value.fields[name], self._disks.get(value.fields[name]))

    def _object(self, value: Value) -> Value | None:
        kind, name = value.fields.get("qom-type", ""), value.fields.get("id", "")
        if kind == "memory-backend-file" and name in self._ram:
            return value.but(
                without=_RAM_COSTS,
                **{"mem-path": self._ram[name], "share": False, "reserve": False},
                **({"readonly": True, "rom": "off"} if self._read_only else {}),
            )
        if kind == "rng-random":
            return value.but(filename="/dev/urandom")
        if kind == "rng-egd":
            return Value({"qom-type": "rng-builtin", "id": name}, value.json)
        if kind in _KEPT_OBJECTS:
            return value.but(without=_RAM_COSTS)
        if not _DROPPED_OBJECTS.fullmatch(kind):
            self.refuse(f"-object {kind} {name}")
        return None

    def _netdev(self, value: Value) -> Value | None:
        kind, name = value.fields.get("type", ""), value.fields.get("id", "")
        if kind == "user":
            return value.but(without=_USER_OUTSIDE, restrict=True)
        if kind in ("tap", "bridge"):
            self._taps += 1
            fields: dict[str, Any] = {"type": "tap", "id": name, "ifname": f"rehearsal{self._taps}"}
            fields |= {"script": "no", "downscript": "no", "vhost": False}
            queues = len(str(value.fields.get("fds", "")).split(":"))
            queues = int(value.fields.get("queues", queues))
            return Value(fields | ({"queues": queues} if queues > 1 else {}), value.json)
        if kind in _SOCKET_NETDEVS:
            return Value({"type": "hubport", "id": name, "hubid": 0}, value.json)
        self.refuse(f"-netdev {kind} {name}")
        return None

    def _device(self, value: Value) -> Value | None:
        driver, name = value.fields.get("driver", ""), value.fields.get("id", "")
        if _HOST_DEVICES.search(driver) or not _HOST_FIELDS.isdisjoint(value.fields):
            self.refuse(f"-device {driver} {name}".rstrip())
            return None
        node = value.fields.get("drive")
        if node is None:
            return value
        disk = self._disks.get(name)
        if disk is None and driver in _REMOVABLE:  # its medium was taken out
            return value.but(without={"drive"})
        self._node(node, disk or self._disks.get(node))
        return value

    def _node(self, name: str, disk: Disk | None) -> None:
        if disk is None:
            self.refuse(f"disk {name}, whose size is unknown")
            return
        node = {"driver": "null-co", "node-name": name, "size": disk.size_bytes}
        node |= {"read-zeroes": True, "read-only": disk.read_only}
        self.nodes[name] = msgspec.json.encode(node).decode()


@dataclass(frozen=True, slots=True)
class Value:
    """An option's argument: JSON, or ``first,key=value``."""

    fields: dict[str, Any]
    json: bool

    @staticmethod
    def parse(text: str, first: str) -> Value:
        if text.startswith("{"):
            return Value(msgspec.json.decode(text, type=dict[str, Any]), True)
        parts = [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]
        pairs = [part.partition("=") for part in parts]
        if not pairs[0][1]:
            pairs[0] = (first, "=", parts[0])
        return Value({key: value if equals else "on" for key, equals, value in pairs}, False)

    def but(self, without: set[str] | None = None, **changes: Any) -> Value:
        fields = {k: v for k, v in self.fields.items() if k not in (without or ())}
        return Value(fields | changes, self.json)

    def text(self) -> str:
        if self.json:
            return msgspec.json.encode(self.fields).decode()
        return ",".join(self._pairs())

    def _pairs(self) -> Iterator[str]:
        for key, value in self.fields.items():
            shown = ("off", "on")[value] if isinstance(value, bool) else value
            yield f"{key}={str(shown).replace(',', ',,')}"
