"""A QEMU started as libvirt starts it, without libvirt: its monitor is ours."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from qemu.qmp import ExecuteError, QMPClient, QMPError

from hostupdate.errors import HypervisorError

RAM_BYTES = 64 << 20
_TIMEOUT_S = 60


def machine(ram: Path, machine_type: str = "pc-q35-7.2") -> list[str]:
    """What libvirt writes for a plain guest (qemu_command.c)."""
    backend = f'"qom-type":"memory-backend-file","id":"pc.ram","mem-path":"{ram}","share":true'
    return [
        *("-name", "guest=bare,debug-threads=on", "-S"),
        *("-machine", f"{machine_type},usb=off,dump-guest-core=off,memory-backend=pc.ram"),
        *("-accel", "tcg", "-cpu", "qemu64", "-m", str(RAM_BYTES >> 20)),
        *("-object", f'{{{backend},"prealloc":true,"size":{RAM_BYTES}}}'),
        *("-overcommit", "mem-lock=off", "-smp", "2,sockets=2,cores=1,threads=1"),
        *("-uuid", "0fe1051a-94d8-4103-8831-248742b0c3e4", "-no-user-config", "-nodefaults"),
        *("-rtc", "base=utc", "-no-shutdown", "-boot", "strict=on"),
        *("-display", "none", "-msg", "timestamp=on"),
    ]


def devices(directory: Path) -> list[str]:
    """What libvirt wrote for a guest with much in it: disks, taps, screen, serial, USB, sound."""
    for name, size in {"a.raw": 32 << 20, "b.raw": 16 << 20}.items():
        with (directory / name).open("wb") as file:
            file.write(_BOOT_SECTOR)
            file.truncate(size)
    return [word % {"directory": directory} for word in _DEVICES]


#: Reads its own sector again and again: mov ax, 0x201; mov cx, 1; mov dx, 0x80; int 0x13; jmp.
_BOOT_SECTOR = bytes.fromhex("31c08ed88ec0bb007eb80102b90100ba8000cd13ebf0").ljust(510, b"\0")
_BOOT_SECTOR += b"\x55\xaa"

_DEVICES = [
    *("-object", '{"qom-type":"secret","id":"masterKey0","format":"raw","data":"c2VjcmV0"}'),
    *("-object", '{"qom-type":"iothread","id":"iothread1"}'),
    *("-device", '{"driver":"pcie-root-port","port":16,"chassis":1,"id":"pci.1","bus":"pcie.0",'
      '"multifunction":true,"addr":"0x2"}'),
    *("-device", '{"driver":"pcie-root-port","port":17,"chassis":2,"id":"pci.2","bus":"pcie.0",'
      '"addr":"0x2.0x1"}'),
    *("-device", '{"driver":"pcie-root-port","port":18,"chassis":3,"id":"pci.3","bus":"pcie.0",'
      '"addr":"0x2.0x2"}'),
    *("-device", '{"driver":"pcie-pci-bridge","id":"pci.10","bus":"pci.1","addr":"0x0"}'),
    *("-device", '{"driver":"qemu-xhci","id":"usb","bus":"pci.10","addr":"0x3"}'),
    *("-device", '{"driver":"virtio-scsi-pci","iothread":"iothread1","id":"scsi0",'
      '"bus":"pci.3","addr":"0x0"}'),
    *("-device", '{"driver":"virtio-serial-pci","id":"virtio-serial0","bus":"pci.10",'
      '"addr":"0x2"}'),
    *("-blockdev", '{"driver":"file","filename":"%(directory)s/a.raw","node-name":'
      '"libvirt-2-storage","auto-read-only":true,"discard":"unmap"}'),
    *("-blockdev", '{"node-name":"libvirt-2-format","read-only":false,"driver":"raw",'
      '"file":"libvirt-2-storage"}'),
    *("-device", '{"driver":"virtio-blk-pci","bus":"pci.2","addr":"0x0","drive":'
      '"libvirt-2-format","id":"virtio-disk0","bootindex":1,"write-cache":"on"}'),
    *("-blockdev", '{"driver":"file","filename":"%(directory)s/b.raw","node-name":'
      '"libvirt-1-storage","read-only":true}'),
    *("-device", '{"driver":"scsi-cd","bus":"scsi0.0","channel":0,"scsi-id":0,"lun":0,'
      '"drive":"libvirt-1-storage","id":"scsi0-0-0-0"}'),
    *("-device", '{"driver":"ide-cd","bus":"ide.1","id":"sata0-0-1"}'),
    *("-netdev", '{"type":"user","id":"hostnet0"}'),
    *("-device", '{"driver":"virtio-net-pci","netdev":"hostnet0","id":"net0",'
      '"mac":"52:54:00:46:81:49","bus":"pci.10","addr":"0x4"}'),
    *("-netdev", '{"type":"tap","ifname":"guest1","script":"no","downscript":"no",'
      '"queues":2,"id":"hostnet1"}'),
    *("-device", '{"driver":"virtio-net-pci","mq":true,"vectors":6,"netdev":"hostnet1",'
      '"id":"net1","mac":"52:54:00:e1:08:af","bus":"pci.10","addr":"0x5"}'),
    *("-chardev", "pty,id=charserial0"),
    *("-device", '{"driver":"isa-serial","chardev":"charserial0","id":"serial0","index":0}'),
    *("-chardev", "socket,id=charchannel0,path=%(directory)s/agent,server=on,wait=off"),
    *("-device", '{"driver":"virtserialport","bus":"virtio-serial0.0","nr":1,"chardev":'
      '"charchannel0","id":"channel0","name":"org.qemu.guest_agent.0"}'),
    *("-device", '{"driver":"usb-tablet","id":"input0","bus":"usb.0","port":"1"}'),
    *("-audiodev", '{"id":"audio1","driver":"none"}'),
    *("-vnc", "unix:%(directory)s/vnc,audiodev=audio1"),
    *("-device", '{"driver":"VGA","id":"video0","vgamem_mb":16,"bus":"pcie.0","addr":"0x1"}'),
    *("-device", '{"driver":"ich9-intel-hda","id":"sound0","bus":"pcie.0","addr":"0x1b"}'),
    *("-device", '{"driver":"hda-duplex","id":"sound0-codec0","bus":"sound0.0","cad":0,'
      '"audiodev":"audio1"}'),
    *("-device", '{"driver":"i6300esb","id":"watchdog0","bus":"pci.10","addr":"0x1"}'),
    *("-watchdog-action", "reset"),
    *("-device", '{"driver":"virtio-balloon-pci","id":"balloon0","bus":"pci.10","addr":"0x6"}'),
    *("-object", '{"qom-type":"rng-random","id":"objrng0","filename":"/dev/urandom"}'),
    *("-device", '{"driver":"virtio-rng-pci","rng":"objrng0","id":"rng0","bus":"pci.10",'
      '"addr":"0x7"}'),
    *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
    *("-device", '{"driver":"pvpanic"}'),
]  # fmt: skip


class BareGuest:
    """A context: a QEMU that runs, in a network namespace of its own. Fits handover's Command."""

    def __init__(self, program: Path, words: Sequence[str]) -> None:
        self.command_line = [str(program), *words]
        self._runner = asyncio.Runner()
        self._client = QMPClient("bare")

    def __enter__(self) -> BareGuest:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            monitor = f"socket,id=charmonitor,fd={theirs.fileno()}"
            self.command_line += ["-chardev", monitor, "-mon", "chardev=charmonitor,mode=control"]
            self._process = subprocess.Popen(
                ["unshare", "--net", *self.command_line], pass_fds=[theirs.fileno()]
            )
            theirs.close()
            self._runner.run(self._client.connect(ours.dup()))
        self("cont", {})
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        with suppress(QMPError, OSError, EOFError):
            self._runner.run(self._client.disconnect())
        self._runner.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def __call__(self, name: str, arguments: Mapping[str, Any], *, fd: int | None = None) -> Any:
        async def send() -> object:
            async with asyncio.timeout(_TIMEOUT_S):
                if fd is not None:
                    self._client.send_fd_scm(fd)
                return await self._client.execute(name, dict(arguments))

        try:
            return self._runner.run(send())
        except (ExecuteError, QMPError) as error:
            raise HypervisorError(str(error)) from error

    @property
    def running(self) -> bool:
        return bool(self("query-status", {})["running"])

    def wait_for_reads(self, count: int) -> None:
        """Until so many more sectors were read from the first disk."""
        wanted = self._reads() + count
        deadline_ns = time.monotonic_ns() + _TIMEOUT_S * 1_000_000_000
        while self._reads() < wanted:
            assert time.monotonic_ns() < deadline_ns, "the guest does not read its disk"
            time.sleep(0.01)

    def _reads(self) -> int:
        (disk,) = (d for d in self("query-blockstats", {}) if "virtio-disk0" in d.get("qdev", ""))
        return int(disk["stats"]["rd_operations"])

    @property
    def ignores_shared(self) -> bool:
        found = self("query-migrate-capabilities", {})
        return any(c["state"] for c in found if c["capability"] == "x-ignore-shared")


def same_pages(ram: Path) -> bytes:
    """All of a RAM file."""
    with ram.open("rb") as file:
        return os.pread(file.fileno(), RAM_BYTES, 0)
