"""Calls that may hang: deadlines, and what becomes of an outcome that comes too late."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from hostupdate.errors import DeadlineError
from hostupdate.guests.workers import Worker, call_within

SHORT_NS = 50_000_000
LONG_NS = 20_000_000_000


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Holds up calls until it is set; it is at the end of each test."""
    event = threading.Event()
    yield event
    event.set()


def deadline(timeout_ns: int = LONG_NS) -> int:
    return time.monotonic_ns() + timeout_ns


def test_a_call_gives_its_value() -> None:
    assert call_within("answer", LONG_NS, lambda: 42) == 42


def test_a_calls_own_error_is_raised_as_it_is() -> None:
    def fail() -> None:
        raise LookupError("none")

    with pytest.raises(LookupError, match="none"):
        call_within("fail", LONG_NS, fail)


def test_a_call_that_hangs_is_given_up_at_its_deadline(gate: threading.Event) -> None:
    start_ns = time.monotonic_ns()
    with pytest.raises(DeadlineError, match=r"^open x: no answer within 0\.05 s$") as late:
        call_within("open x", SHORT_NS, gate.wait)
    took_ns = time.monotonic_ns() - start_ns
    assert SHORT_NS <= took_ns < LONG_NS
    assert (late.value.what, late.value.timeout_ns) == ("open x", SHORT_NS)


def test_a_deadline_that_has_passed_still_takes_an_outcome_that_is_there() -> None:
    worker = Worker("w")
    call = worker.submit("quick", lambda: 1)
    assert call.done.wait(20)
    assert call.result(0, 0) == 1
    worker.close()


def test_a_late_success_is_taken_back(gate: threading.Event) -> None:
    taken_back = threading.Event()
    values: list[str] = []

    def undo(value: str) -> None:
        values.append(value)
        taken_back.set()

    def suspend() -> str:
        gate.wait()
        return "suspended"

    worker = Worker("w")
    call = worker.submit("suspend", suspend, undo)
    with pytest.raises(DeadlineError):
        call.result(deadline(SHORT_NS), SHORT_NS)
    assert not values
    gate.set()
    assert taken_back.wait(20)
    assert values == ["suspended"]
    worker.close()


def test_a_success_in_time_is_not_taken_back() -> None:
    values: list[int] = []
    worker = Worker("w")
    assert worker.submit("quick", lambda: 7, values.append).result(deadline(), LONG_NS) == 7
    worker.submit("after", lambda: None).result(deadline(), LONG_NS)
    assert not values
    worker.close()


def test_a_late_failure_needs_no_taking_back(gate: threading.Event) -> None:
    values: list[object] = []

    def fail() -> None:
        gate.wait()
        raise OSError("too late to matter")

    worker = Worker("w")
    with pytest.raises(DeadlineError):
        worker.submit("fail", fail, values.append).result(deadline(SHORT_NS), SHORT_NS)
    gate.set()
    worker.submit("after", lambda: None).result(deadline(), LONG_NS)
    assert not values
    worker.close()


def test_calls_of_one_worker_run_one_after_another() -> None:
    order: list[int] = []
    worker = Worker("w")
    calls = [worker.submit(f"{n}", lambda n=n: order.append(n)) for n in range(50)]  # type: ignore[misc]
    for call in calls:
        call.result(deadline(), LONG_NS)
    assert order == list(range(50))
    worker.close()


def test_a_worker_that_hangs_holds_up_no_other(gate: threading.Event) -> None:
    stuck, free = Worker("stuck"), Worker("free")
    hung = stuck.submit("hang", gate.wait)
    assert free.submit("quick", lambda: "ran").result(deadline(), LONG_NS) == "ran"
    assert not hung.done.is_set()
    stuck.close()
    free.close()


def test_a_call_knows_when_it_ran() -> None:
    before_ns = time.monotonic_ns()
    worker = Worker("w")
    call = worker.submit("quick", lambda: None)
    call.result(deadline(), LONG_NS)
    assert before_ns <= call.started_ns <= call.ended_ns <= time.monotonic_ns()
    worker.close()


def test_a_closed_worker_ends_after_what_is_queued() -> None:
    worker = Worker("w")
    call = worker.submit("last", lambda: "done")
    worker.close()
    assert call.result(deadline(), LONG_NS) == "done"
    worker._thread.join(20)
    assert not worker._thread.is_alive()
