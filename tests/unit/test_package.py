"""What is shipped is complete: a source archive that builds, a wheel with all that runs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist of what git tracks, built as a packager would."""
    source = tmp_path_factory.mktemp("source")
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not in a git checkout")
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).exists():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    out = tmp_path_factory.mktemp("sdist")
    build(source, "sdist", out)
    (made,) = out.glob("*.tar.gz")
    return made


def build(source: Path, kind: str, out: Path) -> None:
    code = (
        "import sys; from setuptools import build_meta as b; "
        "getattr(b, 'build_' + sys.argv[1])(sys.argv[2])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, kind, str(out)], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_the_source_archive_has_all_that_the_build_and_the_tests_need(archive: Path) -> None:
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    needed = {
        "csrc/hostupdate.h", "csrc/core.cdef", "csrc/ffi_build.py", "csrc/keeper.c",
        "hostupdate/lab/guest.c", "hostupdate/py.typed", "tests/unit/test_package.py",
        "benchmarks/test_pause.py", "tools/demo", "tools/test", "docs/manifest.md", "README.md",
        "CHANGELOG.md", "LICENSE", "Makefile", "systemd/hostupdate-resume.service",
        "systemd/hostupdate-resume.timer",
    }  # fmt: skip
    assert needed <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]


def test_the_wheel_from_it_serves_every_python_from_3_11_on(archive: Path, tmp_path: Path) -> None:
    shutil.unpack_archive(archive, tmp_path)
    (source,) = tmp_path.iterdir()
    out = tmp_path / "out"
    out.mkdir()
    build(source, "wheel", out)
    (wheel,) = out.glob("*.whl")
    assert "-cp311-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
    assert {"hostupdate/_core.abi3.so", "hostupdate/_core.pyi", "hostupdate/py.typed"} <= names
    assert {"hostupdate/lab/guest.c", "hostupdate/cli/apply.py"} <= names
    place = "/data/lib/systemd/system/hostupdate-resume"
    units = {name.rpartition(".")[2] for name in names if place in name}
    assert units == {"service", "timer"}
    assert not [name for name in names if name.startswith(("tests/", "csrc/", "benchmarks/"))]
