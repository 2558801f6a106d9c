"""Which devices a guest's command line lacks or has too many, and what is told of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from hostupdate.errors import HypervisorError, RefusedError
from hostupdate.handover.plugged import with_plugged

_BLK = {"bus": "pci.0", "addr": 0x30, "drive": "libvirt-1-format", "num-queues": 1, "serial": ""}
_NET = {"bus": "pci.0", "addr": 0x18, "vectors": 3, "netdev": "hostnet0", "mac": "52:54:00:00:00:1"}
_DISK = '{"driver":"virtio-blk-pci","bus":"pci.0","addr":"0x6","drive":"n","id":"virtio-disk0"}'
_CARD = '{"driver":"virtio-net-pci","netdev":"hostnet0","id":"net0","vectors":3,"addr":"0x3"}'
_TAP = '{"type":"tap","fd":"31","id":"hostnet0"}'
_START = ["/usr/bin/qemu", "-S", "-device", _DISK, "-netdev", _TAP, "-device", _CARD]


class Qemu:
    """Fits Command. ``devices``: type and properties by id; a bus is its last name or its path."""

    def __init__(self, **devices: tuple[str, Mapping[str, Any]]) -> None:
        self.devices = {"virtio-disk0": ("virtio-blk-pci", _BLK), "net0": ("virtio-net-pci", _NET)}
        self.devices |= {name.replace("_", "-"): found for name, found in devices.items()}
        self.cpus: list[dict[str, Any]] = []
        self.network = "net0: index=0,type=nic\n \\ hostnet0: index=0,type=tap,fd=31\n"
        self.asked: list[str] = []

    def __call__(self, name: str, arguments: Mapping[str, Any], *, fd: int | None = None) -> Any:
        self.asked.append(name)
        match name:
            case "qom-list":
                found = [{"name": n, "type": f"child<{k}>"} for n, (k, _) in self.devices.items()]
                return [{"name": "type", "type": "string"}, *found]
            case "qom-get":
                _, _, home, device = [*arguments["path"].split("/"), ""][:4]
                if home == "iothreads" or device not in self.devices:
                    raise HypervisorError(f"no {arguments['path']}")
                return self._property(device, arguments["property"])
            case "device-list-properties":
                return self._listed(arguments["typename"])
            case "query-block":
                image = {"image": {"virtual-size": 1 << 20}, "ro": False}
                names = [name for name in self.devices if "disk" in name]
                return [{"qdev": f"/machine/peripheral/{n}/x", "inserted": image} for n in names]
            case "query-hotpluggable-cpus":
                return self.cpus
            case "human-monitor-command":
                return self.network
        raise AssertionError(name)

    def _property(self, device: str, key: str) -> Any:
        fields = self.devices[device][1]
        if key == "parent_bus":
            bus = fields.get("bus", "")
            return bus if "/" in bus or not bus else f"/machine/i440fx/{bus}"
        if key not in fields:
            raise HypervisorError(f"no property {key}")
        return fields[key]

    def _listed(self, kind: str) -> list[dict[str, Any]]:
        of_kind = [fields for found, fields in self.devices.values() if found == kind]
        if not of_kind:
            raise HypervisorError(f"no type {kind}")
        kinds = {"addr": "int32", "rng": "link<rng-backend>", "core": "child<core>"}
        defaults = {"num-queues": 1, "bootindex": -1}
        keys = [key for key in of_kind[0] if key != "bus"]
        return [
            {"name": key, "type": kinds.get(key, "x")}
            | ({"default-value": defaults[key]} if key in defaults else {})
            for key in keys
        ]


def made(qemu: Qemu, *known: str, start: list[str] | None = None) -> list[str]:
    """What is added to the words that stay."""
    found = with_plugged(qemu, start or _START, xml(*known))
    assert found[: len(start or _START)] == (start or _START)
    return found[len(start or _START) :]


def xml(*known: str) -> str:
    aliases = "".join(f"<disk><alias name='{name}'/></disk>" for name in known)
    return f"<domain><devices>{aliases}</devices></domain>"


def test_with_the_devices_of_its_start_nothing_changes() -> None:
    qemu = Qemu()
    assert with_plugged(qemu, _START, "not even looked at") == _START
    assert set(qemu.asked) == {"qom-list", "qom-get"}


def test_a_device_may_have_two_names_for_its_type() -> None:
    qemu = Qemu(sata0=("ich9-ahci", {"addr": 0xFA}))
    start = [*_START, "-device", "ahci,id=sata0,addr=0x1f.0x2"]
    assert with_plugged(qemu, start, "") == start


def test_an_address_of_another_bus_tells_nothing() -> None:
    qemu = Qemu(odd=("odd", {"addr": 7}))
    start = [*_START, "-device", '{"driver":"odd","id":"odd","addr":"left"}']
    assert with_plugged(qemu, start, "") == start


def test_a_disk_is_told_with_what_is_not_by_default() -> None:
    disk = {"bus": "pci.0", "addr": 0x53, "drive": "libvirt-1-format", "serial": "a,b"}
    disk |= {"num-queues": 1, "bootindex": 2, "x-age": 1, "romfile": "", "core": "/c", "size": 7}
    assert made(Qemu(virtio_disk1=("virtio-blk-pci-new", disk)), "virtio-disk1") == [
        "-device",
        '{"driver":"virtio-blk-pci-new","id":"virtio-disk1","bus":"pci.0","addr":"0xa.0x3",'
        '"drive":"plugged-virtio-disk1","serial":"a,b","bootindex":2,"romfile":""}',
    ]


def test_an_empty_drive_is_told_without_its_node() -> None:
    qemu = Qemu(cd=("scsi-cd", {"bus": "scsi0.0", "lun": 2, "drive": ""}))
    assert made(qemu, "cd")[1] == '{"driver":"scsi-cd","id":"cd","bus":"scsi0.0","lun":2}'


def test_words_are_json_where_the_others_are() -> None:
    """QEMU makes those in JSON last."""
    start = ["qemu", "-device", "virtio-blk-pci,id=virtio-disk0,addr=0x6"]
    start += ["-device", "virtio-net-pci,id=net0,vectors=3,addr=0x3"]
    qemu = Qemu(t=("usb-tablet", {"bus": "usb.0", "port": "4", "on": True}))
    assert made(qemu, "t", start=start) == [
        "-device",
        "driver=usb-tablet,id=t,bus=usb.0,port=4,on=on",
    ]


@pytest.mark.parametrize(("queues", "more"), [(1, ""), (2, ',"queues":2')])
def test_a_network_card_has_what_it_had_on_the_host(queues: int, more: str) -> None:
    qemu = Qemu(net1=("virtio-net-pci", _NET | {"addr": 0x58, "netdev": "hostnet1"}))
    for n in range(queues):
        qemu.network += f"net1: index={n},type=nic\n \\ hostnet1: index={n},type=tap,fd={n}\n"
    netdev, card = made(qemu, "net1")[1::2]
    assert netdev == f'{{"id":"hostnet1","type":"tap"{more}}}'
    assert '"netdev":"hostnet1"' in card


def test_what_a_device_needs_is_made_unless_it_is_there() -> None:
    rng = {"bus": "pci.0", "rng": "/objects/objrng1"}
    port = {"bus": "s.0", "chardev": "charchannel1"}
    qemu = Qemu(r=("virtio-rng-pci", rng), c=("virtserialport", port))
    found = made(qemu, "r", "c")
    assert found[:2] == ["-chardev", "id=charchannel1,backend=null"]
    assert found[4:6] == ["-object", '{"id":"objrng1","qom-type":"rng-builtin"}']
    start = [*_START, "-object", "rng-random,id=objrng1", "-chardev", "pty,id=charchannel1"]
    assert [*made(qemu, "r", "c", start=start)][::2] == ["-device", "-device"]


def test_a_controller_comes_before_what_is_on_it() -> None:
    bus = "/machine/peripheral/z-scsi/virtio-backend/z-scsi.0"
    qemu = Qemu(disk1=("scsi-hd", {"bus": bus}), z_scsi=("virtio-scsi-pci", {"bus": "pci.0"}))
    first, second = made(qemu, "disk1", "z-scsi")[1::2]
    assert "virtio-scsi-pci" in first and '"bus":"z-scsi.0"' in second


def test_a_processor_is_told_by_its_place() -> None:
    qemu = Qemu(vcpu1=("qemu64-x86_64-cpu", {"sse": True}))
    place = {"qom-path": "/machine/peripheral/vcpu1", "props": {"socket-id": 1}}
    qemu.cpus = [{"props": {"socket-id": 2}}, place]
    assert made(qemu)[1] == '{"driver":"qemu64-x86_64-cpu","id":"vcpu1","socket-id":1}'


def test_what_is_gone_goes_with_all_that_was_its_own() -> None:
    qemu = Qemu()
    del qemu.devices["net0"]
    assert with_plugged(qemu, _START, xml()) == _START[:4]


def test_an_iothread_may_be_anothers_too() -> None:
    disk = '{"driver":"virtio-blk-pci","iothread":"io1","id":"virtio-disk9","addr":"0x9"}'
    start = [*_START, "-object", '{"qom-type":"iothread","id":"io1"}']
    assert with_plugged(Qemu(), [*start, "-device", disk], xml()) == start


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("virtio-net-pci", {"addr": 0x20}),
        ("virtio-net-pci", {"vectors": 6}),
        ("e1000", {"romfile": "x"}),
    ],
)
def test_another_device_of_the_same_name_replaces_it(kind: str, changes: dict[str, Any]) -> None:
    qemu = Qemu(net0=(kind, _NET | changes), old=("virtio-net-pci", {"bus": "pci.0"}))
    start = [*_START, "-device", "virtio-net-pci,id=old"]
    words = with_plugged(qemu, start, xml("net0"))
    assert words.count("-netdev") == 1 and _CARD not in words and _TAP not in words
    assert f'"driver":"{kind}","id":"net0"' in words[-1]


def test_what_cannot_be_told_of_is_refused_all_at_once() -> None:
    card = _NET | {"netdev": "hostnet9", "addr": 8}
    qemu = Qemu(net9=("virtio-net-pci", card), by_hand=("usb-tablet", {"bus": "usb.0"}))
    with pytest.raises(RefusedError) as refused:
        with_plugged(qemu, _START, xml("net9"))
    by_hand, net9 = refused.value.reasons
    assert "by-hand (usb-tablet): libvirt does not know it" in by_hand
    assert "net9 (virtio-net-pci): QEMU does not tell of hostnet9" in net9
    assert refused.value.remedy
