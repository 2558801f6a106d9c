"""Reading a console log that QEMU is writing: cut lines, noise, great length, waiting."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hostupdate.errors import LabError
from hostupdate.lab import console
from hostupdate.lab.console import Tick

READY = b"READY pages=24000 seed=0123456789abcdef rate_ms=200\n"


def line(seq: int, *, bad: int = 0) -> bytes:
    return b"TICK seq=%d mono=%d real=%d passes=%d bad=%d gap=201\n" % (
        seq,
        seq * 200,
        10**18 + seq,
        seq // 50,
        bad,
    )


def tick(seq: int, *, bad: int = 0) -> Tick:
    return Tick(
        seq=seq,
        monotonic_ns=seq * 200,
        real_ns=10**18 + seq,
        passes=seq // 50,
        bad=bad,
        gap_ns=201,
    )


class FakeClock:
    """Time passes only while somebody sleeps; then ``meanwhile`` happens."""

    def __init__(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        self.now_ns = 0
        self.meanwhile = meanwhile

    def monotonic_ns(self) -> int:
        return self.now_ns

    def real_ns(self) -> int:
        return 10**18 + self.now_ns

    def sleep_ns(self, duration_ns: int) -> None:
        self.now_ns += duration_ns
        self.meanwhile()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "hu-lab-1.log"


def append(log: Path, data: bytes) -> None:
    with log.open("ab") as file:
        file.write(data)


def test_no_log_yet(log: Path) -> None:
    assert console.last_tick(log) is None
    assert console.ticks(log) == []
    assert console.ready(log) is None
    assert console.tail(log) == ""


def test_all_ticks_in_order(log: Path) -> None:
    log.write_bytes(b"[    0.1] booting\n" + READY + line(0) + line(1) + line(2, bad=3))
    assert console.ticks(log) == [tick(0), tick(1), tick(2, bad=3)]
    assert console.ticks(log, after_seq=1) == [tick(2, bad=3)]
    assert console.ticks(log, after_seq=2) == []
    ready = console.ready(log)
    assert ready is not None
    assert (ready.pages, ready.seed, ready.rate_ms) == (24000, "0123456789abcdef", 200)


@pytest.mark.parametrize("length", range(1, len(line(1234))))
def test_a_last_line_that_is_cut_anywhere_is_not_a_tick(log: Path, length: int) -> None:
    log.write_bytes(line(1) + line(1234)[:length])
    assert console.ticks(log) == [tick(1)]
    assert console.last_tick(log) == tick(1)


def test_noise_hides_only_the_lines_that_it_hits(log: Path) -> None:
    torn = line(2)[:20] + b"[   12.3] watchdog: soft lockup\n" + line(2)[20:]
    log.write_bytes(line(1) + b"\xff\x00\x80\n" + torn + b"\x1b[0m" + line(3) + bytes(range(256)))
    assert console.ticks(log) == [tick(1), tick(3)]


def test_carriage_returns_are_no_matter(log: Path) -> None:
    log.write_bytes(READY.replace(b"\n", b"\r\n") + line(5).replace(b"\n", b"\r\n"))
    assert console.last_tick(log) == tick(5)
    assert console.ready(log) is not None


@pytest.mark.parametrize("block", [100, 101, 128, 177, 300, 65536])
def test_blocks_cut_lines_and_none_is_lost_or_doubled(
    log: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(console, "_BLOCK", block)
    log.write_bytes(b"".join(line(seq) + b"noise\n" * (seq % 3) for seq in range(40)))
    assert console.ticks(log) == [tick(seq) for seq in range(40)]


def test_a_tick_after_a_long_silence_of_other_text_is_found(log: Path) -> None:
    log.write_bytes(line(1) + b"x" * 300_000 + line(2) + b"y" * 300_000)
    assert console.ticks(log) == [tick(1), tick(2)]


def test_a_huge_log_is_read_from_its_end(log: Path) -> None:
    with log.open("wb") as file:
        file.write(READY)
        file.truncate(20 << 30)  # sparse: reading it would take minutes
        file.seek(0, 2)
        file.write(b"\n" + line(7) + line(8) + line(9))
    assert console.last_tick(log) == tick(9)
    assert console.ticks(log, after_seq=7) == [tick(8), tick(9)]


def test_tail_is_printable(log: Path) -> None:
    log.write_bytes(b"one\ntwo\nth\x00ree\xff\x1b[31m\n")
    assert console.tail(log, lines=2) == "two\nth?ree??[31m"


def test_wait_ready_returns_when_it_comes(log: Path) -> None:
    steps = iter([b"[    0.1] boot\n", READY[:10], READY[10:]])
    clock = FakeClock(lambda: append(log, next(steps)))
    assert console.wait_ready(log, 10**9, clock=clock).pages == 24000
    assert clock.now_ns == 3 * console.POLL_NS


def test_wait_ready_gives_up_and_quotes_the_console(log: Path) -> None:
    log.write_bytes(b"Kernel panic - not syncing\n")
    clock = FakeClock()
    with pytest.raises(LabError, match=r"hu-lab-1 is not ready(?s:.*)Kernel panic") as caught:
        console.wait_ready(log, 10**9, clock=clock)
    assert caught.value.remedy
    assert clock.now_ns == 10**9


def test_wait_ticks_counts_only_new_ones(log: Path) -> None:
    log.write_bytes(line(1) + line(2))
    numbers = iter(range(3, 100))
    clock = FakeClock(lambda: append(log, line(next(numbers))))
    assert console.wait_ticks(log, 2, 10**9, clock=clock) == [tick(3), tick(4)]


def test_wait_ticks_gives_up(log: Path) -> None:
    log.write_bytes(line(1))
    with pytest.raises(LabError, match="0 of 1 ticks"):
        console.wait_ticks(log, 1, 10**8, clock=FakeClock())


def test_the_system_clock_runs() -> None:
    clock = console.SystemClock()
    before = clock.monotonic_ns()
    clock.sleep_ns(1_000_000)
    assert clock.monotonic_ns() - before >= 1_000_000
    assert clock.real_ns() > 10**18
