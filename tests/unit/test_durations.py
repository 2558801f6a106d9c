"""Durations: exact when read, short when shown."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostupdate.durations import DurationError, format_duration, parse_duration, quoted

SCALES = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        ("5s", 5_000_000_000),
        ("5 s", 5_000_000_000),
        ("+5s", 5_000_000_000),
        ("500ms", 500_000_000),
        ("1.5s", 1_500_000_000),
        ("250us", 250_000),
        ("0.25ms", 250_000),
        ("2m", 120_000_000_000),
        ("2 min", 120_000_000_000),
        ("1h", 3_600_000_000_000),
        ("7ns", 7),
        ("0s", 0),
        ("0.000000001s", 1),
        ("0.1s", 100_000_000),  # no float comes near it
        ("9223372036854775807ns", 2**63 - 1),
    ],
)
def test_reads(text: str, ns: int) -> None:
    assert parse_duration(text) == ns


@pytest.mark.parametrize(
    ("text", "problem", "remedy"),
    [
        ("5", "has no unit", 'write a unit, e.g. "5s"'),
        ("1.5", "has no unit", "write a unit"),
        ("-5s", "is negative", "without a sign"),
        ("-5", "is negative", "without a sign"),
        ("-0s", "is negative", "without a sign"),
        ("", "is not a duration", 'e.g. "5s"'),
        ("s", "is not a duration", 'e.g. "5s"'),
        ("nan", "is not a duration", 'e.g. "5s"'),
        ("inf", "is not a duration", 'e.g. "5s"'),
        ("1e3s", "is not a duration", 'e.g. "5s"'),
        (".5s", "is not a duration", 'e.g. "5s"'),
        ("5.s", "is not a duration", 'e.g. "5s"'),
        ("1m30s", "is not a duration", 'e.g. "5s"'),
        ("5s\n", "is not a duration", 'e.g. "5s"'),
        ("\u0665s", "is not a duration", 'e.g. "5s"'),
        ("9" * 5000 + "s", "is not a duration", 'e.g. "5s"'),
        ("5S", "has the unknown unit S", "ns, us, ms, s, m, min, h"),
        ("5 days", "has the unknown unit days", "ns, us, ms, s, m, min, h"),
        ("0.5ns", "is finer than a nanosecond", "fewer digits"),
        ("9223372036854775808ns", "is longer than 292 years", "shorter"),
    ],
)
def test_refuses(text: str, problem: str, remedy: str) -> None:
    with pytest.raises(DurationError) as caught:
        parse_duration(text)
    assert caught.value.problem == problem
    assert remedy in caught.value.remedy
    assert str(caught.value).startswith(quoted(text))


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (0, "0 ns"),
        (999, "999 ns"),
        (1_000, "1 us"),
        (52_340, "52.34 us"),
        (99_999, "0.1 ms"),
        (123_400, "0.1234 ms"),
        (480_000, "0.48 ms"),
        (523_123_456, "523.1 ms"),
        (999_999_999, "1 s"),
        (1_204_000_000, "1.204 s"),
        (30_000_000_000, "30 s"),
        (119_000_000_000, "119 s"),
        (120_000_000_000, "2 min"),
        (3_600_000_000_000, "1 h"),
        (20_000 * 3_600_000_000_000, "20000 h"),
        (-2_000_000, "-2 ms"),
    ],
)
def test_shows(ns: int, text: str) -> None:
    assert format_duration(ns) == text


@given(st.integers(0, 10**6), st.sampled_from(sorted(SCALES)), st.sampled_from(["", " "]))
def test_whole_numbers_are_exact(number: int, unit: str, space: str) -> None:
    assert parse_duration(f"{number}{space}{unit}") == number * SCALES[unit]


@given(st.integers(0, 2**63 - 1))
def test_nanoseconds_written_as_decimal_seconds_are_exact(ns: int) -> None:
    assert parse_duration(f"{ns // 10**9}.{ns % 10**9:09}s") == ns


@given(st.integers(0, 9999), st.integers(0, 6))
def test_four_digits_read_back_exactly(digits: int, zeros: int) -> None:
    ns = digits * 10**zeros  # below 10 s
    assert parse_duration(format_duration(ns)) == ns


@given(st.integers(0, 2**62))
def test_what_is_shown_reads_back_within_a_thousandth(ns: int) -> None:
    assert abs(parse_duration(format_duration(ns)) - ns) <= ns * 0.001


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    with suppress(DurationError):
        assert 0 <= parse_duration(text) < 2**63


@given(st.text())
def test_a_quoted_text_cannot_drive_a_terminal(text: str) -> None:
    shown = quoted(text)
    assert shown.isprintable() and shown[0] == shown[-1] == '"'
