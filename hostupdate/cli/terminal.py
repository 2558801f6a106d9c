"""Where text goes: results to stdout, all else to stderr, colours only on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hostupdate.durations import format_duration
from hostupdate.errors import HostUpdateError, RefusedError

MISSING = "-"


def out() -> Console:
    """For results."""
    return Console(file=sys.stdout, highlight=False, soft_wrap=not sys.stdout.isatty())


def err() -> Console:
    """For everything human beside the result."""
    return Console(file=sys.stderr, highlight=False, soft_wrap=not sys.stderr.isatty())


def print_error(error: HostUpdateError) -> None:
    """One error: what is wrong and what to do."""
    console = err()
    lines = error.reasons if isinstance(error, RefusedError) else (str(error),)
    word = "refused" if isinstance(error, RefusedError) else "error"
    for line in lines:
        console.print(f"[bold red]{word}:[/] {escape(line)}")
    if error.remedy:
        console.print(f"[bold]remedy:[/] {escape(error.remedy)}")


def print_json(value: object) -> None:
    """One JSON document on stdout."""
    data = msgspec.json.format(msgspec.json.encode(value, enc_hook=str), indent=2)
    sys.stdout.write(data.decode() + "\n")
    sys.stdout.flush()


def table(*columns: str) -> Table:
    """A plain table with these headings; numbers are aligned by whoever fills it."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        right = column.startswith(">")
        made.add_column(column.lstrip(">"), justify="right" if right else "left")
    return made


def duration(ns: int | None) -> str:
    """A duration for people; what was not measured is a dash."""
    return MISSING if ns is None else format_duration(ns)


def size(size_bytes: int | None) -> str:
    """A size for people, in binary units."""
    if size_bytes is None:
        return MISSING
    amount = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024 or unit == "GiB":
            break
        amount /= 1024
    return f"{amount:.0f} {unit}" if amount >= 100 or unit == "B" else f"{amount:.3g} {unit}"


def words(values: Iterable[str]) -> str:
    """Values on one line, or a dash."""
    return ", ".join(values) or MISSING
