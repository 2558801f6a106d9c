"""An apt and dpkg of the test's own: a root of their own, fed by a local archive of tiny packages
that are built here. Nothing of the system's packages is touched."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

_TIMEOUT_S = 120
_CONF = """\
Dir "{root}";
Dir::State::status "{root}/var/lib/dpkg/status";
Dpkg::Options {{ "--root={root}"; }};
APT::Sandbox::User "root";
"""


class AptRoot:
    """``environment`` makes every apt and dpkg use it. ``uri`` is ``file`` or ``copy``: apt leaves
    a file where it is, and copies as it would download."""

    def __init__(self, base: Path, uri: str = "copy") -> None:
        self.root, self.archive = base / "root", base / "archive"
        self.archive.mkdir()
        for name in ("dpkg/info", "dpkg/updates", "apt/lists/partial"):
            (self.root / "var/lib" / name).mkdir(parents=True)
        for name in ("preferences.d", "sources.list.d", "apt.conf.d", "trusted.gpg.d"):
            (self.root / "etc/apt" / name).mkdir(parents=True)
        for name in ("cache/apt/archives/partial", "log/apt"):
            (self.root / "var" / name).mkdir(parents=True)
        (self.root / "var/lib/dpkg/status").touch()
        sources = f"deb [trusted=yes] {uri}:{self.archive} ./\n"
        (self.root / "etc/apt/sources.list").write_text(sources)
        conf = base / "apt.conf"
        conf.write_text(_CONF.format(root=self.root))
        self.environment = {"APT_CONFIG": str(conf), "DPKG_ROOT": str(self.root)}
        self._stanzas: dict[str, str] = {}

    def build(
        self,
        name: str,
        version: str,
        files: Mapping[str, str | Path],
        depends: str = "",
        section: str = "misc",
    ) -> None:
        """Builds a package and lists it in the archive. A file is its text, or one to copy."""
        tree = self.archive.parent / "tree"
        control = f"Package: {name}\nVersion: {version}\nArchitecture: all\nSection: {section}\n"
        control += "Maintainer: nobody <nobody@example.org>\nDescription: of a test\n"
        control += f"Depends: {depends}\n" if depends else ""
        for path, content in {"DEBIAN/control": control, **files}.items():
            file = tree / path
            file.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copy2(content, file)
            else:
                file.write_text(content)
        file = self.archive / f"{name}_{version.replace(':', '+')}_all.deb"
        run("dpkg-deb", "-Zgzip", "-z1", "--build", "--root-owner-group", str(tree), str(file))
        shutil.rmtree(tree)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        self._stanzas[file.name] = (
            f"{control}Filename: ./{file.name}\nSize: {file.stat().st_size}\nSHA256: {digest}\n"
        )
        self._list()

    def withdraw(self, name: str, version: str) -> None:
        """As archives do with what is superseded."""
        file = f"{name}_{version.replace(':', '+')}_all.deb"
        del self._stanzas[file]
        (self.archive / file).unlink()
        self._list()

    def install(self, *versions: str) -> None:
        self.run("apt-get", "-q", "-y", "install", *versions)

    def installed(self) -> dict[str, str]:
        text = self.run(
            "dpkg-query", "-W", "-f", "${Package} ${Version} ${db:Status-Status}\n", check=False
        )
        rows = (line.split() for line in text.splitlines())
        return {name: version for name, version, status in rows if status == "installed"}

    def run(self, *argv: str, check: bool = True) -> str:
        return run(*argv, environment=self.environment, check=check)

    def _list(self) -> None:
        (self.archive / "Packages").write_text("\n".join(self._stanzas.values()))
        self.run("apt-get", "-q", "update")


def run(*argv: str, environment: Mapping[str, str] | None = None, check: bool = True) -> str:
    ended = subprocess.run(
        argv,
        capture_output=True,
        text=True,
        env={**os.environ, "LC_ALL": "C", **(environment or {})},
        timeout=_TIMEOUT_S,
        check=False,
    )
    assert ended.returncode == 0 or not check, ended.stdout + ended.stderr
    return ended.stdout
