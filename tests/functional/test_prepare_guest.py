"""A guest is made one that can be handed over, by the program, under a libvirtd of its own."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from hostupdate.guests import Hypervisor
from hostupdate.lab import accelerator, console, domain, image
from tests.functional.cli import Ended, Program
from tests.functional.conftest import make_cache
from tests.functional.daemon import Daemon
from tests.requirements import need

_CALL_NS = 20_000_000_000
_READY_NS = 120_000_000_000
SECRET = "not-to-be-shown"


class Host:
    """A libvirtd whose guest ``plain`` has its RAM in a memfd."""

    def __init__(self, base: Path, room: Path) -> None:
        (base / "state").mkdir(mode=0o700)
        cache = make_cache(base / "state")
        built = image.build(cache)
        acceleration = accelerator.probe(built, cache)
        self.room, self.log, self.conf = room, base / "console.log", base / "etc/qemu.conf"
        self.uuid = uuid4()
        self.daemon = Daemon(base, hide_kvm=acceleration.kind != "kvm")
        config = base / "hostupdate.toml"
        config.write_text(f'[paths]\nqemu-conf = "{self.conf}"\n')
        self.run = Program(base / "state").with_options(
            "--connect", self.daemon.uri, "--config", str(config)
        )
        text = domain.domain_xml(
            name="plain", uuid=self.uuid, memory_bytes=192 << 20, image=built,
            acceleration=acceleration, console=self.log, witness=domain.Witness(rate_ms=50),
        )  # fmt: skip
        vnc = f"<devices><graphics type='vnc' port='-1' passwd='{SECRET[:8]}'/>"
        self.xml = text.replace("<devices>", vnc)
        assert self.xml != text

    def define(self) -> None:
        hypervisor = Hypervisor(self.daemon.uri, timeout_ns=_CALL_NS)
        hypervisor.call("define", lambda c: c.defineXML(self.xml))
        hypervisor.close()

    def switch(self, on: bool) -> None:
        hypervisor = Hypervisor(self.daemon.uri, timeout_ns=_CALL_NS)
        name = "create" if on else "destroy"
        hypervisor.call(
            name, lambda c: getattr(c.lookupByUUIDString(str(self.uuid)), name)(), _READY_NS
        )
        hypervisor.close()
        if on:
            console.wait_ready(self.log, time.monotonic_ns() + _READY_NS)

    def definition(self) -> str:
        hypervisor = Hypervisor(self.daemon.uri, timeout_ns=_CALL_NS)
        secret_and_inactive = 3
        text = hypervisor.call(
            "dump", lambda c: c.lookupByUUIDString(str(self.uuid)).XMLDesc(secret_and_inactive)
        )
        hypervisor.close()
        return str(text)

    def prepare(self, *options: str) -> Ended:
        return self.run("prepare-guest", "plain", "--json", *options)


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    need("root", "qemu", "libvirt", "lab")
    base = Path(tempfile.mkdtemp(prefix="hu-p-", dir="/var/tmp"))
    room = Path(tempfile.mkdtemp(prefix="hu-p-", dir="/dev/shm"))
    made = Host(base, room)
    made.daemon.ensure()
    try:
        made.define()
        made.switch(on=True)
        yield made
        made.switch(on=False)
    finally:
        made.daemon.end()
        shutil.rmtree(base)
        shutil.rmtree(room)


def test_a_guest_becomes_one_that_can_be_handed_over(host: Host) -> None:
    """The whole way; each step finds the host as the one before has left it."""
    before, conf = host.definition(), host.conf.read_text()
    row = host.run("guests", "--json").data["guests"][0]
    assert not row["handover"]["eligible"]
    assert "memfd" in row["handover"]["blockers"][0]["reason"]
    assert row["handover"]["blockers"][0]["remedy"]
    assert row["handover"]["warnings"], "it has a screen"

    for _ in range(2):  # what is only printed changes nothing
        said = host.prepare("--memory-backing-dir", str(host.room))
        assert said.code == 0, said.err
        assert not said.data["applied"] and said.data["eligible"] is False
        assert '+    <source type="file"' in said.data["domain_diff"]
        assert f'+memory_backing_dir = "{host.room}"' in said.data["qemu_conf_diff"]
        assert SECRET[:8] not in said.out
        assert (host.definition(), host.conf.read_text()) == (before, conf)
    text = host.run("prepare-guest", str(host.uuid), "--memory-backing-dir", str(host.room))
    assert text.code == 0
    assert text.out == said.data["domain_diff"] + said.data["qemu_conf_diff"]
    assert "restart libvirtd" in text.err and "shut the guest down" in text.err

    done = host.prepare("--memory-backing-dir", str(host.room), "--apply")
    assert done.code == 0, done.err
    assert done.data["applied"]
    kept_xml, kept_conf = map(Path, done.data["backups"])
    assert kept_xml.read_text() == before and kept_conf.read_text() == conf
    assert kept_xml.stat().st_mode & 0o077 == 0
    after = host.definition()
    assert SECRET[:8] in after and "memfd" not in after

    again = host.prepare("--apply").data  # the directory is qemu.conf's now
    assert not again["applied"] and not again["backups"]
    assert again["memory_backing_dir"] == str(host.room)
    assert again["domain_diff"] == again["qemu_conf_diff"] == "" and again["eligible"] is False
    assert any("start it" in text for text in again["next"])
    console.wait_ticks(host.log, 2, time.monotonic_ns() + _READY_NS)  # it ran through all of this

    host.switch(on=False)
    host.log.unlink()
    host.daemon.end()
    host.daemon.ensure()
    host.switch(on=True)
    assert host.run("guests", "--json").data["guests"][0]["handover"]["eligible"]
    last = host.prepare().data
    assert last["eligible"] is True and last["next"] == []


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("nobody",), 1, "there is no guest 'nobody'"),
        (("plain", "--memory-backing-dir", "/var/lib/x"), 20, "would be written to a disk"),
        (("plain", "--memory-backing-dir", "relative"), 1, "no absolute path"),
    ],
)
def test_what_cannot_be_is_one_error(
    host: Host, arguments: tuple[str, ...], code: int, words: str
) -> None:
    conf = host.conf.read_text()
    ended = host.run("prepare-guest", "--apply", *arguments)
    assert (ended.code, ended.out) == (code, "")
    assert words in ended.err and "remedy: " in ended.err
    assert host.conf.read_text() == conf
