"""What becomes of a guest's command line for a rehearsal."""

from __future__ import annotations

import json

import pytest

from hostupdate.errors import RefusedError
from hostupdate.handover.harmless import Disk, harmless

RAM = {"pc.ram": "/dev/shm/hu/pc.ram"}
DISKS = {"disk0": Disk(1 << 20, False), "flash": Disk(512 << 10, True)}


def made(*words: str, read_only_ram: bool = False) -> list[str]:
    given = ["/usr/bin/qemu", "-nodefaults", *words]
    found = harmless(given, RAM, DISKS, read_only_ram=read_only_ram)
    assert found[-4:] == ["-uuid", "00000000-0000-0000-0000-000000000000", "-display", "none"]
    found.remove("-nodefaults")
    return found[:-4]


def fields(word: str) -> dict[str, object]:
    found = json.loads(word)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(
    "words",
    [
        ("-machine", "pc-q35-7.2,usb=off,memory-backend=pc.ram", "-accel", "kvm"),
        ("-cpu", "host,migratable=on", "-m", "size=192k", "-smp", "2", "-enable-kvm"),
        ("-kernel", "/boot/vmlinuz", "-append", "a, b", "-no-hpet"),
        ("-device", '{"driver":"virtio-net-pci","netdev":"n","id":"net0"}'),
        ("-numa", "node,nodeid=0,cpus=0-1,memdev=pc.ram", "-global", "a.b=c"),
        ("-object", '{"qom-type":"iothread","id":"io1"}'),
        ("-object", '{"qom-type":"rng-builtin","id":"r"}'),
    ],
)
def test_the_machine_is_kept_word_for_word(words: tuple[str, ...]) -> None:
    assert made(*words) == list(words)


@pytest.mark.parametrize(
    "words",
    [
        ("-name", "guest=g", "-S", "-uuid", "1", "-msg", "timestamp=on", "-no-shutdown"),
        ("-mon", "chardev=m", "-qmp", "unix:/x", "-pidfile", "/x", "-incoming", "defer"),
        ("-vnc", "127.0.0.1:0", "-spice", "port=1", "-display", "gtk", "-nographic"),
        ("-sandbox", "off", "-daemonize", "-D", "/log", "-add-fd", "set=1,fd=2", "-L", "/roms"),
        ("-blockdev", '{"driver":"file","filename":"/disk","node-name":"n"}'),
        ("-object", '{"qom-type":"secret","id":"s","file":"/key"}'),
        ("-object", "tls-creds-x509,id=t,dir=/etc/pki"),
        ("-overcommit", "mem-lock=on", "--watchdog-action", "reset"),
    ],
)
def test_what_reaches_out_is_dropped(words: tuple[str, ...]) -> None:
    assert made(*words) == []


@pytest.mark.parametrize(
    ("option", "given", "expected"),
    [
        ("-chardev", "socket,id=c,path=/x,server=on", "null,id=c"),
        ("-chardev", '{"backend":"pty","id":"c"}', "null,id=c"),
        ("-audiodev", '{"driver":"alsa","id":"a"}', "none,id=a"),
        (
            "-object",
            "rng-random,id=r,filename=/dev/x",
            "qom-type=rng-random,id=r,filename=/dev/urandom",
        ),
        ("-object", "rng-egd,id=r,chardev=c", "qom-type=rng-builtin,id=r"),
        (
            "-netdev",
            "user,id=n,hostfwd=tcp::1-:2,net=10.1.0.0/16",
            "type=user,id=n,net=10.1.0.0/16,restrict=on",
        ),
        (
            "-netdev",
            "tap,fds=3:4,id=n,vhost=on,vhostfds=5:6",
            "type=tap,id=n,ifname=rehearsal1,script=no,downscript=no,vhost=off,queues=2",
        ),
        ("-netdev", "stream,id=n,addr.type=unix,addr.path=/x", "type=hubport,id=n,hubid=0"),
    ],
)
def test_backends_are_replaced(option: str, given: str, expected: str) -> None:
    assert made(option, given) == [option, expected]


def test_each_tap_has_a_name_of_its_own() -> None:
    tap = '{"type":"tap","fd":"31","id":"n"}'
    first, second = made("-netdev", tap, "-netdev", tap)[1::2]
    assert fields(first)["ifname"] != fields(second)["ifname"]
    assert fields(first)["vhost"] is False and "fd" not in fields(first)
    assert "queues" not in fields(first)


@pytest.mark.parametrize("read_only", [True, False])
def test_ram_is_a_private_copy_of_the_file_as_it_is_named_now(read_only: bool) -> None:
    word = (
        '{"qom-type":"memory-backend-file","id":"pc.ram","mem-path":"/old","share":true,'
        '"x-use-canonical-path-for-ramblock-id":false,"prealloc":true,"discard-data":true,"size":7}'
    )
    found = fields(made("-object", word, read_only_ram=read_only)[1])
    assert found == {
        "qom-type": "memory-backend-file",
        "id": "pc.ram",
        "mem-path": "/dev/shm/hu/pc.ram",
        "share": False,
        "reserve": False,
        "size": 7,
        "x-use-canonical-path-for-ramblock-id": False,
    } | ({"readonly": True, "rom": "off"} if read_only else {})


def test_disks_become_null_disks_of_their_size() -> None:
    device = '{"driver":"virtio-blk-pci","drive":"libvirt-9-format","id":"disk0"}'
    node, kept = made("-device", device)[1::2]
    assert fields(node) == {
        "driver": "null-co",
        "node-name": "libvirt-9-format",
        "size": 1 << 20,
        "read-zeroes": True,
        "read-only": False,
    }
    assert kept == device


def test_firmware_flash_becomes_a_null_disk_too() -> None:
    words = made("-machine", "q35,pflash0=flash")
    assert fields(words[1])["node-name"] == "flash" and fields(words[1])["read-only"] is True
    assert words[2:] == ["-machine", "q35,pflash0=flash"]


def test_an_empty_drive_stays_empty() -> None:
    assert fields(made("-device", '{"driver":"ide-cd","drive":"n","id":"cd"}')[1]) == {
        "driver": "ide-cd",
        "id": "cd",
    }
    assert made("-device", "scsi-cd,drive=n,id=cd")[1] == "driver=scsi-cd,id=cd"


def test_commas_in_values_stay() -> None:
    assert made("-device", "isa-serial,id=a,,b,chardev=c")[1] == (
        "driver=isa-serial,id=a,,b,chardev=c"
    )


@pytest.mark.parametrize(
    "words",
    [
        ("-drive", "file=/x,if=virtio"),
        ("-serial", "stdio"),
        ("-fsdev", "local,id=f,path=/x"),
        ("-tpmdev", "emulator,id=t,chardev=c"),
        ("-readconfig", "/x"),
        ("-set", "a.b.c=d"),
        ("disk.img",),
        ("-device", "vfio-pci,host=00:01.0,id=h"),
        ("-device", '{"driver":"vhost-vsock-pci","id":"v","guest-cid":3,"vhostfd":"4"}'),
        ("-device", '{"driver":"usb-host","id":"u","hostbus":1}'),
        ("-device", '{"driver":"virtio-input-host-pci","evdev":"/dev/input/event0","id":"i"}'),
        ("-device", '{"driver":"scsi-block","drive":"disk0","id":"s"}'),
        ("-device", '{"driver":"virtio-blk-pci","drive":"unknown","id":"d"}'),
        ("-netdev", "vhost-user,id=n,chardev=c"),
        ("-netdev", "vhost-vdpa,id=n,vhostdev=/dev/vhost-vdpa-0"),
        ("-object", "memory-backend-memfd,id=m,size=7"),
        ("-object", "memory-backend-file,id=other,mem-path=/x,size=7"),
        ("-object", "sev-guest,id=s"),
        ("-object", "filter-dump,id=f,netdev=n,file=/x"),
        ("-machine", "q35,confidential-guest-support=s"),
        ("-machine", "q35,pflash1=unknown"),
        ("-a-word-of-the-future", "x"),
    ],
)
def test_what_is_not_known_to_be_harmless_is_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(RefusedError) as refused:
        made(*words)
    assert len(refused.value.reasons) == 1 and refused.value.remedy
    assert words[0] in refused.value.reasons[0] or "unknown" in refused.value.reasons[0]


def test_default_devices_are_refused_and_all_is_told_at_once() -> None:
    with pytest.raises(RefusedError) as refused:
        harmless(["qemu", "-drive", "x", "-serial", "y"], {}, {}, read_only_ram=False)
    assert len(refused.value.reasons) == 3
    assert "-nodefaults" in refused.value.reasons[0]
