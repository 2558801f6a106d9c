"""QEMU builds beside each other.

A QEMU loads modules of its own build only: an old binary that meets the modules of a newer
package fails or aborts (util/module.c). A build therefore is a directory that holds a QEMU with
its modules, its firmware and the libraries that are not the host's, and a wrapper that leads QEMU
to them. The wrapper serves as libvirt's ``<emulator>``: libvirt probes capabilities through it,
and takes the environment away from what it starts, so that everything is in its text.

Where a QEMU does not find a module or a firmware file it falls back to the host's directories.
The directory ``qemu-bundle`` beside its binary takes their place (util/cutils.c; QEMU 7.2).

A build is whole when its wrapper exists; the wrapper is written last. Guests run under a user of
their own: every directory above the build must let others pass (``closed_to_others``).
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sysconfig
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from hostupdate.errors import DeadlineError, PrerequisiteError

#: Nanoseconds for one look at a QEMU (``--version``, ``ldd``), and for unpacking one package.
LOOK_NS = 30_000_000_000
UNPACK_NS = 300_000_000_000

_WRAPPER = "qemu"
_ORIGIN = "origin"
#: Left to the host: programs of an older glibc run on a newer one, a mixture of two does not.
_GLIBC = re.compile(r"(ld-linux|ld64|libc|libm|libdl|librt|libpthread|libresolv|libutil)[.-]")
_LOADED = re.compile(r"^\s+(?P<name>\S+) => (?P<path>/\S+) \(0x", re.MULTILINE)
_MISSING = re.compile(r"^\s*(\S+) => not found|(version `[^']+' not found)", re.MULTILINE)
_LOADERS = ("ld-linux*.so.*", "ld64.so.*")


@dataclass(frozen=True, slots=True)
class Build:
    """A QEMU that is kept in ``directory``, whatever happens to the host's packages."""

    directory: Path

    @property
    def wrapper(self) -> Path:
        """The program to start; what libvirt is given as ``<emulator>``."""
        return self.directory / _WRAPPER


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """``libraries`` are directories; ``loader`` is the dynamic linker of the build's own glibc."""

    binary: Path
    modules: Path | None
    libraries: tuple[Path, ...]
    loader: Path | None = None
    data: tuple[Path, ...] = ()

    @property
    def library_path(self) -> str:
        return ":".join(map(str, self.libraries))

    @property
    def start(self) -> list[str]:
        """The build's glibc comes with its loader, which must be the one that starts QEMU."""
        if self.loader is None:
            return [str(self.binary)]
        return [str(self.loader), "--library-path", self.library_path, str(self.binary)]

    @property
    def environment(self) -> dict[str, str]:
        own = {"QEMU_MODULE_DIR": str(self.modules)} if self.modules else {}
        if self.libraries and self.loader is None:
            own["LD_LIBRARY_PATH"] = self.library_path
        return own


def keep(system_binary: Path, into: Path) -> Build:
    """Keeps the installed QEMU, with its modules, firmware and libraries, in ``into``.

    Files but the binary are linked where ``into`` is on their file system, else copied: a package
    manager replaces files and never writes into them. A build that is there already is given back
    as it is. Raises PrerequisiteError where the binary is missing or does not run, DeadlineError,
    and OSError; nothing of ``into`` is left then.
    """
    binary = system_binary.resolve()
    if not binary.is_file():
        raise PrerequisiteError(f"{system_binary}: no such QEMU", remedy="install it")

    def fill(directory: Path) -> _Parts:
        (directory / _ORIGIN).write_text(str(system_binary))
        kept = directory / "bin" / binary.name
        kept.parent.mkdir()
        shutil.copy2(binary, kept)  # a link would change its ctime: libvirt would probe it anew
        modules = _system_modules(binary)
        own = directory / "modules" if modules else None
        if modules and own:
            _take(modules, own)
        data = []
        for number, found in enumerate(_data_directories([str(binary)])):
            _take(found, directory / f"data{number}")
            data.append(directory / f"data{number}")
        libraries = directory / "lib"
        libraries.mkdir()
        for name, path in _libraries([binary, *sorted(modules.glob("*.so") if modules else ())]):
            _take(path, libraries / name)
        return _Parts(binary=kept, modules=own, data=tuple(data), libraries=(libraries,))

    return _make(into, fill)


def unpack(debs: Sequence[Path], into: Path, program: str = "qemu-system-x86_64") -> Build:
    """Makes a build of Debian packages, of which one holds ``program``; others may hold modules,
    firmware and libraries that the host lacks. Their scripts do not run.

    A build that is there already is given back as it is. Raises PrerequisiteError, naming every
    library and symbol version that is missing, where the QEMU cannot run; DeadlineError; OSError.
    Nothing of ``into`` is left then.
    """

    def fill(directory: Path) -> _Parts:
        for deb in debs:
            if deb.suffix != ".deb":
                raise PrerequisiteError(
                    f"{deb.name}: only Debian packages can be unpacked beside the installed ones",
                    remedy="install the package; the old QEMU is kept while guests need it",
                )
            _run(["dpkg-deb", "-x", str(deb), str(directory)], UNPACK_NS)
        return _unpacked(directory, program)

    return _make(into, fill)


def command(words: Sequence[str]) -> list[str]:
    """A QEMU's command line, without the loader that a build with its own glibc is started by."""
    return list(words[3:] if words[1:2] == ["--library-path"] else words)


def origin(program: str) -> str:
    """Where the QEMU of a kept build, its wrapper or its binary, was installed; any other program
    as it is."""
    for place in Path(program).parents[:2]:
        with suppress(OSError):
            return (place / _ORIGIN).read_text()
    return program


def remove(build: Build) -> None:
    """Removes the build. A QEMU that runs from it must be gone: it may still load modules."""
    build.wrapper.unlink(missing_ok=True)
    with suppress(FileNotFoundError):
        shutil.rmtree(build.directory)


def version(program: Path) -> str:
    """What a QEMU (a build's wrapper, or a binary) says of itself: ``10.0.2 (Debian 1:10...)``.

    Raises PrerequisiteError where it does not run or is no QEMU, DeadlineError.
    """
    said = _run([str(program), "--version"], LOOK_NS)
    match = re.match(r"QEMU emulator version (.+)", said)
    if match is None:
        raise PrerequisiteError(f"{program} is not a QEMU", remedy="name a QEMU system emulator")
    return match[1].strip()


def load_directories(program: Path) -> tuple[str, ...]:
    """From where a QEMU takes modules and firmware, links resolved. PrerequisiteError where it
    does not run, DeadlineError."""
    modules = _system_modules(program)
    found = [*([modules] if modules else []), *_data_directories([str(program)])]
    return tuple(dict.fromkeys(os.path.realpath(path) for path in found))


def closed_to_others(path: Path) -> Path | None:
    """The outermost directory above ``path`` that other users may not pass; None: all let them."""
    above = reversed(path.resolve().parents)
    return next((each for each in above if not each.stat().st_mode & 0o001), None)


def _make(into: Path, fill: Callable[[Path], _Parts]) -> Build:
    build = Build(into.absolute())
    if build.wrapper.exists():
        return build
    remove(build)
    build.directory.mkdir(parents=True, mode=0o755)
    try:
        parts = fill(build.directory)
        if missing := _missing(parts):
            raise PrerequisiteError(
                f"{parts.binary.name} cannot run here, missing: {', '.join(missing)}",
                remedy="add the packages that hold them",
            )
        if not parts.data:
            parts = replace(parts, data=_unpacked_data(parts, build.directory))
        (parts.binary.parent / "qemu-bundle").mkdir()
        _open_to_others(build.directory)
        draft = build.directory / f".{_WRAPPER}"
        draft.write_text(_wrapper(parts))
        draft.chmod(0o755)
        version(draft)
        draft.rename(build.wrapper)
    except BaseException:
        remove(build)
        raise
    return build


def _wrapper(parts: _Parts) -> str:
    """POSIX sh."""
    words = [*parts.start, *(word for path in parts.data for word in ("-L", str(path)))]
    exports = [f"export {name}={shlex.quote(text)}" for name, text in parts.environment.items()]
    return "\n".join(["#!/bin/sh", *exports, f'exec {shlex.join(words)} "$@"', ""])


def _unpacked(tree: Path, program: str) -> _Parts:
    binaries = [tree / place / program for place in ("usr/bin", "usr/libexec")]
    binary = next((path for path in binaries if path.is_file()), None)
    if binary is None:
        raise PrerequisiteError(
            f"the packages hold no {program}", remedy="give the package of the system emulator"
        )
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    libraries = [tree / place / multiarch for place in ("lib", "usr/lib")]
    loader = None
    for found in (path for pattern in _LOADERS for path in tree.glob(f"**/lib*/{pattern}")):
        if found.is_file():
            # QEMU takes the place of what was started for its own.
            loader = binary.parent / found.name
            shutil.copy2(found, loader)
            break
    return _Parts(
        binary=binary,
        modules=_system_modules(binary),
        libraries=tuple(path for path in libraries if any(path.glob("*.so.*"))),
        loader=loader,
    )


def _unpacked_data(parts: _Parts, tree: Path) -> tuple[Path, ...]:
    """Firmware of the packages; where they hold none, the host's, on which they depend."""
    found = []
    for path in _data_directories(parts.start, existing=False):
        inside = path.relative_to(tree if path.is_relative_to(tree) else "/")
        found += [each for each in (tree / inside, "/" / inside) if each.is_dir()][:1]
    return tuple(found)


def _system_modules(binary: Path) -> Path | None:
    """The module directory of a QEMU in its package's layout; None: it was built without."""
    usr = binary.parent.parent
    multiarch = sysconfig.get_config_var("MULTIARCH") or "."
    for place in (f"lib/{multiarch}/qemu", "lib64/qemu-kvm", "lib64/qemu", "lib/qemu"):
        if any((usr / place).glob("*.so")):
            return usr / place
    return None


def _data_directories(start: Sequence[str], *, existing: bool = True) -> list[Path]:
    """Where a QEMU looks for firmware, in its order."""
    said = _run([*start, "-L", "help"], LOOK_NS)
    paths = [Path(os.path.normpath(line)) for line in said.splitlines()]
    return [path for path in paths if path.is_dir() or not existing]


def _libraries(files: Sequence[Path]) -> list[tuple[str, Path]]:
    """Name and file of every library that ``files`` need, except glibc's."""
    said = _run(["ldd", *map(str, files)], LOOK_NS)
    found = {match["name"]: Path(match["path"]) for match in _LOADED.finditer(said)}
    return [(name, path) for name, path in found.items() if not _GLIBC.match(name)]


def _missing(parts: _Parts) -> list[str]:
    """A module that lacks something is left to the rehearsal: few guests need many of them."""
    argv = ["ldd", str(parts.binary)]
    if parts.loader:
        argv = [*parts.start[:-1], "--list", str(parts.binary)]
    said = _run(argv, LOOK_NS, environment=parts.environment, check=False)
    return list(dict.fromkeys(a or b for a, b in _MISSING.findall(said)))


def _open_to_others(directory: Path) -> None:
    """Whatever our umask is, guests' users pass."""
    for place, _, _ in os.walk(directory):
        os.chmod(place, 0o755)


def _take(source: Path, target: Path) -> None:
    """Links or copies a file, or a directory with what it holds; links in it are followed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, copy_function=_link_or_copy, ignore=_dangling)
    else:
        _link_or_copy(str(source), str(target))


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)


def _dangling(directory: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if not os.path.exists(os.path.join(directory, name))]


def _run(
    argv: Sequence[str],
    timeout_ns: int,
    *,
    environment: Mapping[str, str] | None = None,
    check: bool = True,
) -> str:
    """Standard output (and error, where failure is not an error) of a program; its process group
    is gone at the deadline."""
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if check else subprocess.STDOUT,
            env={**os.environ, "LC_ALL": "C", **(environment or {})},
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise PrerequisiteError(f"{argv[0]}: {error.strerror}", remedy=_REMEDY) from error
    with process:
        try:
            said, complaint = process.communicate(timeout=timeout_ns / 1e9)
        except subprocess.TimeoutExpired as error:
            os.killpg(process.pid, signal.SIGKILL)
            raise DeadlineError(f"{argv[0]} {argv[1]}", timeout_ns) from error
    if check and process.returncode:
        last = (complaint or "").strip().splitlines()[-1:] or [f"exit {process.returncode}"]
        raise PrerequisiteError(f"{Path(argv[0]).name} {argv[1]}: {last[0]}", remedy=_REMEDY)
    return said


_REMEDY = "a QEMU with all that it needs, and dpkg-deb and ldd, must be there"
