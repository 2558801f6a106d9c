"""Another program's settings are replaced as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostupdate.host import settings_file


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_it_is_replaced_with_its_mode_and_kept_beside(tmp_path: Path) -> None:
    path = tmp_path / "qemu.conf"
    path.write_bytes(b"old \xff\n")
    path.chmod(0o640)
    link = tmp_path / "link.conf"
    link.symlink_to(path)
    text = settings_file.read(link)
    kept = settings_file.replace(link, text + "new\n", "S")
    assert path.read_bytes() == b"old \xff\nnew\n" and path.stat().st_mode & 0o777 == 0o640
    assert kept == tmp_path / "qemu.conf.before-hostupdate-S"
    assert kept.read_bytes() == b"old \xff\n" and link.is_symlink()
    settings_file.put_back(link, kept)
    assert path.read_bytes() == b"old \xff\n" and names(tmp_path) == ["link.conf", "qemu.conf"]


def test_one_that_was_not_there(tmp_path: Path) -> None:
    path = tmp_path / "qemu.conf"
    assert settings_file.read(path) == ""
    assert settings_file.replace(path, "new\n", "S") is None
    assert path.read_text() == "new\n" and path.stat().st_mode & 0o777 == 0o600
    settings_file.put_back(path, None)
    assert names(tmp_path) == []


def test_it_is_as_it_was_where_it_cannot_be_kept(tmp_path: Path) -> None:
    path = tmp_path / "qemu.conf"
    path.write_text("old\n")
    (tmp_path / "qemu.conf.before-hostupdate-S").write_text("older\n")
    with pytest.raises(FileExistsError):
        settings_file.replace(path, "new\n", "S")
    assert path.read_text() == "old\n"
    assert names(tmp_path) == ["qemu.conf", "qemu.conf.before-hostupdate-S"]
