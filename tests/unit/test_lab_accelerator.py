"""The probe: a QEMU that is a shell script here, so that each ending can be had."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostupdate.errors import PrerequisiteError
from hostupdate.lab import accelerator
from hostupdate.lab.image import GuestImage

BOOTS = 'echo "READY pages=1 seed=0123456789abcdef rate_ms=200" > "$log"; exec sleep 60'
DIES = "echo KVM is broken >&2; exit 3"
HANGS = 'echo "[ 0.0] nothing" > "$log"; exec sleep 60'


class Bench:
    def __init__(self, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kvm = top / "kvm"
        self.kvm.touch()
        self.emulator = top / "qemu-system-x86_64"
        self.count = top / "count"
        self.cache = top / "cache"
        self.digest = "one"
        monkeypatch.setattr(accelerator, "_KVM", self.kvm)
        monkeypatch.setattr(accelerator, "find_emulator", lambda: self.emulator)
        monkeypatch.setattr(accelerator, "PROBE_NS", 1_500_000_000)

    def script(self, body: str) -> None:
        log = "for a; do case $a in file:*) log=${a#file:};; esac; done"
        self.emulator.write_text(f"#!/bin/sh\necho x >> {self.count}\n{log}\n{body}\n")
        self.emulator.chmod(0o755)

    def probe(self) -> accelerator.Acceleration:
        paths = {"kernel": Path("/k"), "initramfs": Path("/i")}
        image = GuestImage(**paths, kernel_version="6", digest=self.digest)
        return accelerator.probe(image, self.cache)

    def boots(self) -> int:
        return len(self.count.read_text().split())


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def test_a_guest_that_boots_means_kvm(bench: Bench) -> None:
    bench.script(BOOTS)
    found = bench.probe()
    assert (found.kind, found.domain_type, found.emulator) == ("kvm", "kvm", bench.emulator)


def test_a_qemu_that_ends_means_tcg_with_its_last_words(bench: Bench) -> None:
    bench.script(DIES)
    found = bench.probe()
    assert (found.kind, found.domain_type) == ("tcg", "qemu")
    assert "ended with 3: KVM is broken" in found.reason


def test_a_guest_that_does_not_get_ready_means_tcg(bench: Bench) -> None:
    bench.script(HANGS)
    assert bench.probe().reason == "no guest booted under KVM within 1.5 s"


def test_no_device_means_tcg_without_a_boot(bench: Bench) -> None:
    bench.script(BOOTS)
    bench.kvm.unlink()
    assert "there is no" in bench.probe().reason
    assert not bench.count.exists()


def test_the_answer_is_kept_until_something_changes(bench: Bench) -> None:
    bench.script(DIES)
    first = bench.probe()
    assert bench.probe() == first
    assert bench.boots() == 1
    bench.digest = "two"
    bench.probe()
    assert bench.boots() == 2
    bench.script(BOOTS)
    assert bench.probe().kind == "kvm"
    (bench.cache / "acceleration.json").write_text("{")
    assert bench.probe().kind == "kvm"
    assert bench.boots() == 4


def test_no_qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "_EMULATORS", ("no-such-qemu",))
    with pytest.raises(PrerequisiteError) as caught:
        accelerator.find_emulator()
    assert caught.value.remedy
