"""Whether KVM's modules can be replaced, by a tree as the kernel's."""

from __future__ import annotations

import threading
from pathlib import Path

from hostupdate.host.kvm_modules import in_use


def loaded(top: Path, name: str, count: int) -> Path:
    (top / name).mkdir()
    path = top / name / "refcnt"
    path.write_text(f"{count}\n")
    return path


def test_none_is_loaded_or_used(tmp_path: Path) -> None:
    assert in_use(0, tmp_path) == ""
    (tmp_path / "kvm_intel").mkdir()  # built in
    loaded(tmp_path, "kvm", 1)  # by kvm_amd
    loaded(tmp_path, "kvm_amd", 0)
    assert in_use(0, tmp_path) == ""


def test_who_uses_it_may_be_about_to_let_go(tmp_path: Path) -> None:
    path = loaded(tmp_path, "kvm_amd", 2)
    assert in_use(0, tmp_path) == "kvm_amd was in use by 2"
    timer = threading.Timer(0.05, lambda: path.write_text("0\n"))
    timer.start()
    assert in_use(20_000_000_000, tmp_path) == ""
    timer.join()
