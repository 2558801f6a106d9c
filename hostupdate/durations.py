"""Durations as people write and read them. Inside, a duration is an int of nanoseconds.

In a document a duration is a text (``timeout = "5s"``); the Struct field that it becomes has a
name that ends in ``_ns``, is an int and has its bounds from :func:`span`.
"""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec
from msgspec import inspect

MILLISECOND = 1_000_000
SECOND = 1_000_000_000
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE

_SCALES = {
    "ns": 1,
    "us": 1_000,
    "ms": MILLISECOND,
    "s": SECOND,
    "m": MINUTE,
    "min": MINUTE,
    "h": HOUR,
}
_PATTERN = re.compile(
    r"(?P<sign>[+-]?)(?P<whole>[0-9]{1,20})(?:\.(?P<part>[0-9]{1,20}))? ?(?P<unit>[a-zA-Z]*)"
)
_LONGEST_NS = 2**63 - 1  # what an int64_t of the C core holds

#: From this size on, the unit that people read it in. 0.1 ms and more are told in ms, so that the
#: figures of a pause compare at a glance.
_READ_IN = (
    (HOUR, "h"),
    (2 * MINUTE, "min"),
    (SECOND, "s"),
    (MILLISECOND // 10, "ms"),
    (1_000, "us"),
    (0, "ns"),
)


class DurationError(ValueError):
    """A text is no duration. ``problem`` follows the text in a message; ``remedy`` is what to do.

    Whoever knows the file makes an InputError of it; ``keys`` lead to the text in a document.
    """

    def __init__(self, text: str, problem: str, remedy: str) -> None:
        super().__init__(f"{quoted(text)} {problem}; {remedy}")
        self.problem = problem
        self.remedy = remedy
        self.keys: tuple[str | int, ...] = ()


def parse_duration(text: str) -> int:
    """The nanoseconds that a text such as ``5s``, ``1.5 s``, ``500ms``, ``250us`` or ``2m`` says.

    Exact: no rounding. Zero is a duration; whether it makes sense is the caller's to say. Raises
    DurationError for anything else: no unit, negative, finer than 1 ns, beyond 292 years.
    """
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise DurationError(text, "is not a duration", 'write a number and a unit, e.g. "5s"')
    sign, whole, part, unit = match.group("sign", "whole", "part", "unit")
    if sign == "-":
        raise DurationError(text, "is negative", 'write a duration without a sign, e.g. "5s"')
    if not unit:
        raise DurationError(text, "has no unit", 'write a unit, e.g. "5s"')
    if unit not in _SCALES:
        raise DurationError(
            text, f"has the unknown unit {unit}", "write one of the units " + ", ".join(_SCALES)
        )
    part = part or ""
    below_one = int("1" + "0" * len(part))
    nanoseconds, rest = divmod(int(whole + part) * _SCALES[unit], below_one)
    if rest:
        raise DurationError(text, "is finer than a nanosecond", "write fewer digits")
    if nanoseconds > _LONGEST_NS:
        raise DurationError(text, "is longer than 292 years", "write a shorter duration")
    return nanoseconds


def format_duration(ns: int) -> str:
    """``ns`` for people, to four digits at most: ``0.48 ms``, ``1.204 s``, ``30 s``, ``-2 ms``.

    parse_duration reads what this writes, unless it is negative.
    """
    size = abs(ns)
    size = round(size, 4 - len(str(size)))  # before choosing the unit: 999 999 us is 1 s
    unit = next(unit for least, unit in _READ_IN if size >= least)
    figure = size / _SCALES[unit]
    shown = f"{figure:.4g}" if figure < 1000 else f"{figure:.0f}"
    return f"{'-' if ns < 0 else ''}{shown} {unit}"


def span(limit_ns: int) -> msgspec.Meta:
    """Bounds of an ``_ns`` field: more than 0 and at most ``limit_ns``."""
    words = f"a duration of more than 0 and at most {format_duration(limit_ns)}"
    return msgspec.Meta(gt=0, le=limit_ns, description=words, examples=["5s"])


def durations_to_ns(value: Any, kind: inspect.Type, keys: tuple[str | int, ...] = ()) -> Any:
    """A copy of a raw document with its durations replaced by ints of nanoseconds.

    ``kind`` describes the Struct that the document is to become, ``keys`` lead to ``value``. What
    has the wrong shape is left for msgspec to refuse. Raises DurationError.
    """
    if isinstance(kind, inspect.StructType) and isinstance(value, dict):
        fields = {field.encode_name: field for field in kind.fields}
        ready = dict(value)
        for key in value.keys() & fields.keys():
            field, place = fields[key], (*keys, key)
            if field.name.endswith("_ns"):
                ready[key] = _written_duration(value[key], place)
            else:
                ready[key] = durations_to_ns(value[key], bare(field.type), place)
        return ready
    if isinstance(kind, inspect.VarTupleType) and isinstance(value, list):
        item = bare(kind.item_type)
        return [durations_to_ns(each, item, (*keys, at)) for at, each in enumerate(value)]
    return value


def _written_duration(value: object, keys: tuple[str | int, ...]) -> object:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number or isinstance(value, str)):
        return value
    try:
        return parse_duration(str(value))
    except DurationError as error:
        error.keys = keys
        raise


def bare(kind: inspect.Type) -> inspect.Type:
    """A field's type without its description and without ``| None``."""
    if isinstance(kind, inspect.Metadata):
        return bare(kind.type)
    if isinstance(kind, inspect.UnionType):
        return bare(next(each for each in kind.types if not isinstance(each, inspect.NoneType)))
    return kind


def quoted(text: str) -> str:
    """A text from outside as messages show it: in quotes, on one line, not too long, and with
    nothing in it that could drive a terminal."""
    short = text if len(text) <= 60 else text[:57] + "..."
    return json.dumps(short, ensure_ascii=not short.isprintable())
