"""The house keeps its rows (DESIGN section 6): a module imports only from rows above it.

The rules are data, at the top. ``crossings`` finds what breaks them by reading the source; it is
itself tested on small trees that break one rule each.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "hostupdate"

#: Row -> its modules and packages, by their name directly below ``hostupdate``.
ROWS = {
    "words": {
        *("errors", "durations", "manifest", "config", "guestpolicy", "model", "rivals", "parked"),
        "xmltext",
    },
    "judgement": {
        *("plan", "prediction", "impact", "rollout", "events", "timeline", "skew", "vitals"),
        *("unwinding", "eligibility", "remedy", "handing", "packaging"),
        "pausing",
    },
    "faults": {"faults"},
    "core": {"core"},
    "hands": {"guests", "host", "journal", "qmp", "handover", "clocks", "keeper"},
    "engine": {"engine"},
    "lab": {"lab"},
    "faces": {"cli", "report", "metadata", "__main__"},
    "root": {"__init__"},  # the version, nothing else
}
#: Row -> rows that it may import from. A module always may import from its own package.
MAY_IMPORT = {
    "words": {"words"},
    "judgement": {"words", "judgement"},
    "faults": {"words"},
    "core": {"words", "judgement"},
    "hands": {"words", "judgement", "core", "faults"},  # not each other
    "engine": {"words", "judgement", "faults"},  # it is given its hands
    "lab": {"words", "judgement", "hands"},
    "faces": set(ROWS),
    "root": set(),
}
#: What these rows know of hands is what Protocols and annotations need.
FOR_TYPES_ONLY = {"engine": {"hands", "core"}}

#: Rows with no library but this one; the others may use any that is not reserved below.
PURE_LIBRARIES = {"words": {"msgspec"}, "judgement": {"msgspec"}, "engine": {"msgspec"}}
#: Library -> the only modules that may import it.
RESERVED = {
    "libvirt": {"guests"},
    "libvirt_qemu": {"guests"},
    "libvirtaio": {"guests"},
    "psutil": {"host"},
    "hostupdate._core": {"core"},
} | dict.fromkeys(
    ("click", "rich", "aiohttp", "jinja2", "prometheus_client", "plotly", "matplotlib"),
    ROWS["faces"],
)

#: Rows that touch nothing, and what of the standard library touches something (or is not the same
#: at each call: time and chance are passed in). From ``os`` and ``pathlib`` they may take a little.
NO_IO_ROWS = {"words", "judgement"}
# fmt: off
IO_MODULES = (
    "asyncio", "ctypes", "fcntl", "fileinput", "ftplib", "glob", "http", "importlib", "io", "mmap",
    "multiprocessing", "os", "pathlib", "pty", "random", "resource", "runpy", "sched", "secrets",
    "select", "selectors", "shutil", "signal", "smtplib", "socket", "socketserver", "sqlite3",
    "ssl", "subprocess", "syslog", "tempfile", "termios", "threading", "time", "urllib.request",
)
# fmt: on
HARMLESS = {"os.strerror", "os.fspath", "os.PathLike", "pathlib.PurePath", "pathlib.PurePosixPath"}

#: What only faces do.
FACES_DO = {"print", "input", "exit", "quit", "sys.exit", "logging.basicConfig"}


def crossings(package: Path) -> list[str]:
    """Every broken rule in the tree of ``package``, one ``file:line: what`` each."""
    found = []
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package.parent)
        unit = name.parts[1].removesuffix(".py")
        row = row_of(unit)
        if row is None:
            found.append(f"{name}:1: {unit} belongs to no row")
            continue
        source = Source(path, package.parent)
        for line, target, for_types in source.imports():
            if problem := judge_import(unit, row, target, for_types):
                found.append(f"{name}:{line}: {problem}")
        for line, use in source.uses():
            if row != "faces" and use in FACES_DO | {"raise SystemExit"}:
                found.append(f"{name}:{line}: {use} is for faces, not for {row}")
            if row in NO_IO_ROWS and use == "open":
                found.append(f"{name}:{line}: {row} must not touch the world: open")
    return found


def row_of(unit: str) -> str | None:
    return next((row for row, units in ROWS.items() if unit in units), None)


def within(target: str, module: str) -> bool:
    return target == module or target.startswith(module + ".")


def judge_import(unit: str, row: str, target: str, for_types: bool) -> str | None:
    """What is wrong with module ``unit`` importing ``target``; None where nothing is."""
    for library, owners in RESERVED.items():
        if within(target, library):
            return None if unit in owners else f"{library} is for {', '.join(sorted(owners))} only"
    if target == "?":
        return None if row == "faces" else "an import by a computed name"
    if within(target, "hostupdate"):
        other = [*target.split("."), "__init__"][1]
        if other == unit or other.startswith("__"):  # itself, or the root: hostupdate.__version__
            return None
        allowed = MAY_IMPORT[row] | (FOR_TYPES_ONLY.get(row, set()) if for_types else set())
        target_row = row_of(other)
        return None if target_row in allowed else f"{row} must not import {other} ({target_row})"
    library = target.split(".")[0]
    if library not in sys.stdlib_module_names:
        if library in PURE_LIBRARIES.get(row, {library}):
            return None
        return f"{row} must not import the library {library}"
    touches = any(within(target, module) for module in IO_MODULES)
    if touches and row in NO_IO_ROWS and target not in HARMLESS:
        return f"{row} must not touch the world: {target}"
    if row != "faces" and target in FACES_DO:
        return f"{target} is for faces, not for {row}"
    return None


class Source:
    """One module's imports and uses of names, resolved to full names."""

    def __init__(self, path: Path, top: Path) -> None:
        self.tree = ast.parse(path.read_text(), str(path))
        self.package = path.relative_to(top).parts[:-1]
        self.names: dict[str, str] = {}  # local name -> what was imported under it
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    self.names[alias.asname or alias.name.split(".")[0]] = (
                        alias.name if alias.asname else alias.name.split(".")[0]
                    )
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    self.names[alias.asname or alias.name] = f"{self._base(node)}.{alias.name}"

    def imports(self) -> Iterator[tuple[int, str, bool]]:
        """Line, full name of the target, and whether only type checkers follow it."""
        for_types = {
            id(child)
            for node in ast.walk(self.tree)
            if isinstance(node, ast.If) and self._name(node.test) == "typing.TYPE_CHECKING"
            for statement in node.body
            for child in ast.walk(statement)
        }
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                targets = [f"{self._base(node)}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Call) and self._name(node.func) in (
                "__import__",
                "importlib.import_module",
            ):
                first = node.args[0] if node.args else None
                constant = isinstance(first, ast.Constant) and isinstance(first.value, str)
                targets = [str(first.value) if constant else "?"]  # type: ignore[union-attr]
            else:
                continue
            for target in targets:
                yield node.lineno, target, id(node) in for_types

    def uses(self) -> Iterator[tuple[int, str]]:
        """Line and full name of each name that is called, or raised."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call):
                yield node.lineno, self._name(node.func)
            elif isinstance(node, ast.Raise) and node.exc is not None:
                raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
                yield node.lineno, f"raise {self._name(raised)}"

    def _base(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = self.package[: len(self.package) - node.level + 1]
        return ".".join([*parts, node.module] if node.module else parts)

    def _name(self, node: ast.expr) -> str:
        if isinstance(node, ast.Attribute):
            return f"{self._name(node.value)}.{node.attr}"
        return self.names.get(node.id, node.id) if isinstance(node, ast.Name) else "?"


def test_no_layer_is_crossed() -> None:
    assert crossings(PACKAGE) == []


def tree(top: Path, **files: str) -> Path:
    """A package ``hostupdate`` of ``files``; a double underscore in a name is a slash."""
    for name, text in {"__init__": "", **files}.items():
        parts = name.strip("_").split("__") if name != "__init__" else [name]
        path = top.joinpath("hostupdate", *parts).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return top / "hostupdate"


def test_a_house_in_order_passes(tmp_path: Path) -> None:
    house = tree(
        tmp_path,
        errors="from os import strerror\nfrom pathlib import PurePath\nimport msgspec, re",
        model="from hostupdate.errors import HostUpdateError",
        plan="from . import model, prediction\nfrom hostupdate import __version__",
        prediction="from .model import Guest",
        core__freezer="from hostupdate import _core\nfrom hostupdate.errors import CoreError",
        guests__uri="import os",
        guests__hypervisor="import libvirt, time\nfrom .uri import x\nfrom ..core import freezer",
        host__processes="import psutil\nopen('/proc/stat')",
        engine__run="import typing\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
        "    from hostupdate.guests import Hypervisor\nif typing.TYPE_CHECKING:\n"
        "    from hostupdate import core\ntry: pass\nexcept SystemExit: raise",
        lab__image="import subprocess\nfrom hostupdate import guests",
        cli__main="import click, sys\nfrom hostupdate import core, engine, lab\nprint(sys.exit(0))",
    )
    assert crossings(house) == []


@pytest.mark.parametrize(
    ("module", "text", "problem"),
    [
        ("stray", "", "stray belongs to no row"),
        ("stray__deep", "", "stray belongs to no row"),
        ("__init__", "from hostupdate import errors", "root must not import errors (words)"),
        ("model", "import psutil", "psutil is for host only"),
        ("model", "import requests", "words must not import the library requests"),
        ("model", "import subprocess", "words must not touch the world: subprocess"),
        ("model", "from socket import socket", "words must not touch the world: socket.socket"),
        ("model", "import os", "words must not touch the world: os"),
        ("model", "from os import open", "words must not touch the world: os.open"),
        ("model", "import os.path", "words must not touch the world: os.path"),
        ("model", "from pathlib import Path", "words must not touch the world: pathlib.Path"),
        ("model", "def f():\n    open('x')", "words must not touch the world: open"),
        ("model", "from hostupdate.plan import x", "words must not import plan (judgement)"),
        ("plan", "import time", "judgement must not touch the world: time"),
        ("plan", "from .guests import x", "judgement must not import guests (hands)"),
        ("plan", "import rich.table", "rich is for __main__, cli, metadata, report only"),
        ("guests__x", "import click", "click is for __main__, cli, metadata, report only"),
        ("guests__x", "from ..host import y", "hands must not import host (hands)"),
        ("guests__x", "from .. import journal", "hands must not import journal (hands)"),
        ("guests__x", "import psutil", "psutil is for host only"),
        ("host__x", "def f():\n    import libvirt", "libvirt is for guests only"),
        ("host__x", "from hostupdate._core import lib", "hostupdate._core is for core only"),
        ("host__x", "from hostupdate import _core", "hostupdate._core is for core only"),
        ("host__x", "print(1)", "print is for faces, not for hands"),
        ("host__x", "import sys as s\ns.exit(1)", "sys.exit is for faces, not for hands"),
        ("host__x", "from sys import exit", "sys.exit is for faces, not for hands"),
        ("host__x", "raise SystemExit(1)", "raise SystemExit is for faces, not for hands"),
        ("host__x", "import logging\nlogging.basicConfig()", "logging.basicConfig is for faces"),
        ("core__x", "from hostupdate import host", "core must not import host (hands)"),
        ("engine__x", "from hostupdate import guests", "engine must not import guests (hands)"),
        ("engine__x", "from hostupdate.core import y", "engine must not import core (core)"),
        ("engine__x", "import libvirt", "libvirt is for guests only"),
        ("engine__x", "from hostupdate.lab import y", "engine must not import lab (lab)"),
        (
            "engine__x",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    pass\n"
            "else:\n    from hostupdate import guests",
            "engine must not import guests (hands)",
        ),
        (
            "engine__x",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from hostupdate import cli",
            "engine must not import cli (faces)",
        ),
        (
            "engine__x",
            "import importlib\nimportlib.import_module('hostupdate.guests')",
            "engine must not import guests (hands)",
        ),
        ("engine__x", "__import__(name)", "an import by a computed name"),
        ("lab__x", "from hostupdate.core import y", "lab must not import core (core)"),
        ("lab__x", "from hostupdate.engine import y", "lab must not import engine (engine)"),
        ("lab__x", "import libvirt", "libvirt is for guests only"),
        ("cli__x", "import psutil", "psutil is for host only"),
    ],
)
def test_a_crossed_layer_is_found(tmp_path: Path, module: str, text: str, problem: str) -> None:
    found = crossings(tree(tmp_path, **{module: text}))
    assert found and problem in found[0]
    assert found[0].startswith("hostupdate/" + module.replace("__x", "/x").replace("__deep", "/"))


def test_every_row_has_its_rule() -> None:
    assert set(MAY_IMPORT) == set(ROWS)
    units = [unit for row in ROWS.values() for unit in row]
    assert len(units) == len(set(units)), "a module in two rows"
