"""The image cache: built once, never trusted when half made. apt, dpkg and cc are played here."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from hostupdate.errors import LabError, PrerequisiteError
from hostupdate.lab import image, packages

KERNEL = "linux-image-6.1.0-9-cloud-amd64"
DEPENDS = {
    "linux-image-cloud-amd64": f"  Depends: {KERNEL}\n",
    "qemu-guest-agent": " PreDepends: init-system-helpers\n  Depends: libc6\n |Depends: libx\n",
    "libc6": "  Depends: libx\n  Depends: <virtual>\n  Breaks: liby\n",
    "libx": "",
}
LOADER = "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"
FILES = {
    "boot/vmlinuz-6.1.0-9-cloud-amd64": "kernel",
    "bin/busybox": "busybox",
    "usr/sbin/qemu-ga": "agent",
    LOADER: "loader",
    "lib/x86_64-linux-gnu/libc.so.6": "libc",
    "lib/modules/6/modules.builtin": "kernel/drivers/virtio/virtio_pci.ko\n",
    "lib/modules/6/kernel/drivers/char/virtio_console.ko": "module",
}


class Tools:
    """Stands for ``packages.run``; ``broken`` maps a program to what happens instead."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.version = "1"
        self.broken: dict[str, Callable[[], None]] = {}

    def __call__(
        self, argv: Sequence[str], *, timeout: float, remedy: str, cwd: Path | None = None
    ) -> str:
        program = Path(argv[0]).name
        self.calls.append(program)
        if program in self.broken:
            self.broken[program]()
        if program == "apt-cache":
            return "".join(f"{name}\n{DEPENDS[name]}" for name in argv[2:])
        if program == "apt-get" and "--print-uris" in argv:
            return "".join(self.offer(name) for name in argv[3:])
        if program == "apt-get":
            assert cwd is not None
            for name in argv[argv.index("download") + 1 :]:
                (cwd / self.file(name)).write_text(self.content(name))
        elif program == "dpkg-deb":
            for name, text in FILES.items():
                path = Path(argv[3]) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
        elif program == "cc":
            Path(argv[argv.index("-o") + 1]).write_text("program")
        else:
            tree = argv[0].removesuffix(LOADER)
            return f"\tlibc.so.6 => {tree}lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n"
        return ""

    def file(self, name: str) -> str:
        return f"{name}_{self.version}_amd64.deb"

    def content(self, name: str) -> str:
        return f"{name} {self.version}"

    def offer(self, name: str) -> str:
        content = self.content(name).encode()
        digest = hashlib.sha256(content).hexdigest()
        return f"'http://mirror/x.deb' {self.file(name)} {len(content)} SHA256:{digest}\n"


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Tools:
    played = Tools()
    monkeypatch.setattr(packages, "run", played)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    return played


def raising(error: BaseException) -> Callable[[], None]:
    def now() -> None:
        raise error

    return now


def test_what_is_built(tmp_path: Path, tools: Tools) -> None:
    built = image.build(tmp_path)
    assert built.kernel.read_text() == "kernel"
    assert built.kernel_version == "6.1.0-9-cloud-amd64"
    ramdisk = built.initramfs.read_bytes()
    for name in ("init", "sbin/hwclock", "lib/libc.so.6", "lib/modules/virtio_console.ko"):
        assert name.encode() + b"\0" in ramdisk
    assert built.digest == hashlib.sha256(b"kernel" + ramdisk).hexdigest()
    fetched = {path.name.partition("_")[0] for path in (tmp_path / "packages").iterdir()}
    assert fetched == {KERNEL, "busybox-static", "qemu-guest-agent", "libc6", "libx"}


def test_the_second_build_calls_nothing(tmp_path: Path, tools: Tools) -> None:
    first = image.build(tmp_path)
    tools.calls.clear()
    tools.version = "2"
    assert image.build(tmp_path) == first
    assert tools.calls == []


def test_refresh_takes_newer_packages_and_is_then_the_one(tmp_path: Path, tools: Tools) -> None:
    first = image.build(tmp_path)
    os.utime(first.kernel.parent, (1, 1))
    tools.version = "2"
    second = image.build(tmp_path, refresh=True)
    assert second.kernel.parent != first.kernel.parent
    assert image.build(tmp_path) == second
    assert first.kernel.exists(), "guests that run may have been made from it"


def test_the_same_packages_give_the_same_bytes(tmp_path: Path, tools: Tools) -> None:
    assert image.build(tmp_path / "a").digest == image.build(tmp_path / "b").digest


@pytest.mark.parametrize("program", ["apt-get", "dpkg-deb", "cc"])
def test_a_build_that_dies_leaves_nothing_that_is_trusted(
    tmp_path: Path, tools: Tools, program: str
) -> None:
    tools.broken[program] = raising(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        image.build(tmp_path)
    assert list((tmp_path / "images").iterdir()) == []
    assert list(tmp_path.glob("build-*")) == []
    tools.broken.clear()
    assert image.build(tmp_path).kernel.exists()


def test_what_a_killed_build_left_is_removed(tmp_path: Path, tools: Tools) -> None:
    leftover = tmp_path / "build-killed/image"
    leftover.mkdir(parents=True)
    (leftover / "vmlinuz").write_text("half")
    image.build(tmp_path)
    assert not leftover.exists()


@pytest.mark.parametrize("name", ["vmlinuz", "initramfs", "image.json"])
def test_a_damaged_image_is_made_again(tmp_path: Path, tools: Tools, name: str) -> None:
    built = image.build(tmp_path)
    (built.kernel.parent / name).write_text("{}")
    assert image.build(tmp_path) == built
    assert built.kernel.read_text() == "kernel"


def test_a_download_that_is_not_what_was_promised_is_refused(tmp_path: Path, tools: Tools) -> None:
    offer = tools.offer
    tools.offer = lambda name: offer(name).replace("SHA256:", "SHA256:0")  # type: ignore[method-assign]
    with pytest.raises(LabError, match="not what apt's lists say") as caught:
        image.build(tmp_path)
    assert "apt-get update" in caught.value.remedy
    assert list((tmp_path / "packages").iterdir()) == []


def test_a_package_that_apt_does_not_know(tmp_path: Path, tools: Tools) -> None:
    tools.offer = lambda name: ""  # type: ignore[method-assign]
    with pytest.raises(LabError, match="apt offers no package"):
        image.build(tmp_path)


def test_another_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(PrerequisiteError):
        image.build(tmp_path)


def test_run_names_program_and_remedy() -> None:
    with pytest.raises(PrerequisiteError, match="no-such-program not found") as missing:
        packages.run(["no-such-program"], timeout=1, remedy="install it")
    assert missing.value.remedy == "install it"
    with pytest.raises(LabError, match=r"failed \(3\): one / two"):
        packages.run(["sh", "-c", "echo one >&2; echo two >&2; exit 3"], timeout=5, remedy="r")
    with pytest.raises(LabError, match=r"longer than 0\.1 s"):
        packages.run(["sleep", "5"], timeout=0.1, remedy="r")
