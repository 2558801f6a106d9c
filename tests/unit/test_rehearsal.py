"""A rehearsal's edges; what it does with QEMUs is in ``tests/functional``."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostupdate.errors import DeadlineError, PrerequisiteError
from hostupdate.handover import builds, rehearsal


def program(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_qemu_that_hangs_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builds, "LOOK_NS", 100_000_000)
    with pytest.raises(DeadlineError):
        rehearsal._opens_read_only(program(tmp_path / "qemu", "exec sleep 1000"))


def test_a_qemu_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(PrerequisiteError, match="does not run"):
        rehearsal._opens_read_only(tmp_path / "qemu")


def test_a_qemu_that_maps_what_it_may_only_read(tmp_path: Path) -> None:
    assert rehearsal._opens_read_only(program(tmp_path / "new", "echo '  rom=<OnOffAuto>'"))
    assert not rehearsal._opens_read_only(program(tmp_path / "old", "echo '  readonly=<bool>'"))
