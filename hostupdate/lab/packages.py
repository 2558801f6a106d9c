"""Distribution packages as a source of files: resolved and downloaded by apt, never installed."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hostupdate.errors import LabError, PrerequisiteError

#: Seconds. Resolving reads local lists, unpacking reads local files, fetching is the mirror's pace.
LOCAL_TIMEOUT = 60.0
FETCH_TIMEOUT = 600.0

_URI_LINE = re.compile(r"^'(?P<uri>[^']+)' (?P<file>\S+) (?P<size>\d+)(?: (?P<digest>\S+))?$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """One version of a package, as the mirror offers it. ``size`` is in bytes.

    ``file`` is the name of the .deb and holds name, version and architecture; ``digest`` is
    ``SHA256:hex``, or empty where the mirror's lists hold none.
    """

    name: str
    file: str
    size: int
    digest: str


def run(argv: Sequence[str], *, timeout: float, remedy: str, cwd: Path | None = None) -> str:
    """Run ``argv`` and return its standard output.

    Raises ``PrerequisiteError`` when the program is missing and ``LabError`` when it fails or
    takes longer than ``timeout`` seconds; it is dead then, what it wrote is still there.
    """
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            argv,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            check=True,
            encoding="utf-8",
            errors="replace",
        )
    except FileNotFoundError as error:
        raise PrerequisiteError(f"program {argv[0]} not found", remedy=remedy) from error
    except subprocess.TimeoutExpired as error:
        raise LabError(f"{argv[0]} took longer than {timeout:g} s", remedy=remedy) from error
    except subprocess.CalledProcessError as error:
        lines = str(error.stderr).strip().splitlines() or ["no message"]
        problem = f"{' '.join(argv[:2])} failed ({error.returncode}): {' / '.join(lines[-3:])}"
        raise LabError(problem, remedy=remedy) from error
    return done.stdout


def dependencies(names: Sequence[str]) -> list[str]:
    """Names of the packages that ``names`` depend on, directly, alternatives included.

    Raises like ``run``.
    """
    output = run(["apt-cache", "depends", *names], timeout=LOCAL_TIMEOUT, remedy=_APT_REMEDY)
    found = re.findall(r"^[ |]*(?:Pre)?Depends: ([^<\s]+)$", output, re.MULTILINE)
    return list(dict.fromkeys(found))


def resolve(names: Sequence[str]) -> list[Package]:
    """The versions of ``names`` that apt would install, without downloading.

    Raises like ``run``, and ``LabError`` when apt names no file for one of them.
    """
    argv = ["apt-get", "download", "--print-uris", *names]
    output = run(argv, timeout=LOCAL_TIMEOUT, remedy=_APT_REMEDY)
    found = {}
    for match in filter(None, map(_URI_LINE.match, output.splitlines())):
        name = match["file"].partition("_")[0]
        found[name] = Package(
            name=name, file=match["file"], size=int(match["size"]), digest=match["digest"] or ""
        )
    missing = [name for name in names if name not in found]
    if missing:
        raise LabError(f"apt offers no package {', '.join(missing)}", remedy=_APT_REMEDY)
    return [found[name] for name in names]


def fetch(packages: Sequence[Package], directory: Path) -> list[Path]:
    """Paths of the .deb files in ``directory``; what is not there yet is downloaded.

    Raises like ``run``, and ``LabError`` when a download is not what the lists promise. Only
    complete and verified files bear their final name, whenever this is interrupted.
    """
    directory.mkdir(parents=True, exist_ok=True)
    wanted = [package for package in packages if not _is_there(package, directory)]
    if wanted:
        with tempfile.TemporaryDirectory(dir=directory, prefix=".download-") as scratch:
            argv = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download"]
            argv += [package.name for package in wanted]
            run(argv, timeout=FETCH_TIMEOUT, remedy=_MIRROR_REMEDY, cwd=Path(scratch))
            for package in wanted:
                _accept(package, Path(scratch) / package.file, directory)
    return [directory / package.file for package in packages]


def unpack(archives: Sequence[Path], tree: Path) -> None:
    """Unpack the .deb files into ``tree``; their scripts do not run. Raises like ``run``."""
    for archive in archives:
        argv = ["dpkg-deb", "-x", str(archive), str(tree)]
        run(argv, timeout=LOCAL_TIMEOUT, remedy=f"delete {archive} and try again")


def _is_there(package: Package, directory: Path) -> bool:
    try:
        return (directory / package.file).stat().st_size == package.size
    except FileNotFoundError:
        return False


def _accept(package: Package, download: Path, directory: Path) -> None:
    kind, _, expected = package.digest.partition(":")
    try:
        content = download.read_bytes()
    except FileNotFoundError:
        raise LabError(f"apt-get did not leave {package.file}", remedy=_APT_REMEDY) from None
    broken = len(content) != package.size
    if kind == "SHA256":
        broken = broken or hashlib.sha256(content).hexdigest() != expected
    if broken:
        raise LabError(f"{package.file} is not what apt's lists say", remedy=_APT_REMEDY)
    os.replace(download, directory / package.file)


_APT_REMEDY = "lab guests are made from Debian packages: run `apt-get update` on a Debian host"
_MIRROR_REMEDY = "a first `lab up` needs the Debian mirror: check the network, `apt-get update`"
