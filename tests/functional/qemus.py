"""QEMUs other than the installed one, fetched by apt into a place of their own: nothing of the
system's packages changes. Made once; a common cache keeps them where the environment names one."""

from __future__ import annotations

import fcntl
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hostupdate.errors import PrerequisiteError
from hostupdate.handover import builds
from hostupdate.handover.builds import Build
from tests.requirements import lack, need

_TIMEOUT_S = 600
_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"

_APT_CONF = """\
Dir::State "{base}/state";
Dir::State::status "{status}";
Dir::Cache "{base}/cache";
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "{base}/sources";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
APT::Sandbox::User "root";
"""
_SOURCES = """\
Types: deb
URIs: {uri}
Suites: {release} {release}-updates {release}-backports
Components: main
Signed-By: {key}
"""


@pytest.fixture(scope="session")
def qemu_cache() -> Iterator[Path]:
    """Where other QEMUs lie; locked, so that one process at a time fills it."""
    need("root", "qemu", "qemus")
    common = os.environ.get("HOSTUPDATE_TEST_CACHE")
    if common:
        path = Path(common) / "qemus"
        path.mkdir(parents=True, exist_ok=True)
        yield path
    else:
        with tempfile.TemporaryDirectory(prefix="hu-qemus-", dir="/var/tmp") as name:
            Path(name).chmod(0o755)
            yield Path(name)


@pytest.fixture(scope="session")
def newer_qemu(qemu_cache: Path) -> Build:
    """The QEMU of the backports of this release of Debian; it runs on the system's libraries."""
    return _build(qemu_cache, _this_release(), own_libraries=False)


@pytest.fixture(scope="session")
def foreign_qemu(qemu_cache: Path) -> Build:
    """The QEMU of trixie's backports with all its libraries and its own glibc."""
    return _build(qemu_cache, "trixie", own_libraries=True)


def _build(cache: Path, release: str, *, own_libraries: bool) -> Build:
    base = cache / f"{release}{'-whole' if own_libraries else ''}"
    with _locked(cache / "lock"):
        build = Build(base / "build")
        if not build.wrapper.exists():
            try:
                build = builds.unpack(_fetch(base, release, own_libraries), base / "build")
            except (PrerequisiteError, subprocess.SubprocessError) as error:
                lack("qemus", f"no QEMU of {release}-backports: {error}")
        return build


def _fetch(base: Path, release: str, own_libraries: bool) -> list[Path]:
    for name in ("state/lists/partial", "cache/archives/partial", "sources"):
        (base / name).mkdir(parents=True, exist_ok=True)
    uri, key = _mirror()
    status = "/dev/null" if own_libraries else "/var/lib/dpkg/status"
    (base / "apt.conf").write_text(_APT_CONF.format(base=base, status=status))
    text = _SOURCES.format(uri=uri, release=release, key=key)
    (base / "sources/qemu.sources").write_text(text)
    _apt(base, "update")
    options = ("-y", "--no-install-recommends", "--download-only", "-t", f"{release}-backports")
    _apt(base, "install", *options, "qemu-system-x86")
    return sorted((base / "cache/archives").glob("*.deb"))


def _mirror() -> tuple[str, str]:
    """URI and key of the repository that this system's own release comes from."""
    form = "--format=$(RELEASE) $(COMPONENT) $(REPO_URI) $(SIGNED_BY)"
    said = _run(["apt-get", "indextargets", form, "Created-By: Packages"])
    for line in said.splitlines():
        release, component, uri, key = line.split(maxsplit=3)
        if (release, component) == (_this_release(), "main"):
            return uri, key if key.startswith("/") else _KEYRING
    lack("qemus", "this system's packages do not come from a Debian mirror")


def _this_release() -> str:
    return platform.freedesktop_os_release().get("VERSION_CODENAME", "unknown")


def _apt(base: Path, *words: str) -> None:
    _run(["apt-get", "-q", *words], APT_CONFIG=str(base / "apt.conf"))


def _run(argv: list[str], **environment: str) -> str:
    return subprocess.run(
        argv,
        env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=True,
    ).stdout


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
