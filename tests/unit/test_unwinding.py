"""What an interrupted run has left to do, by what it has written down."""

from __future__ import annotations

import pytest

from hostupdate.model import Action, Phase
from hostupdate.unwinding import Kind, Record, remaining
from tests.unit.test_journal import plan

PLAN = plan(
    Action(phase=Phase.STAGE, kind="step", title="fetch", step="fetch", undo_argv=("rm",)),
    Action(phase=Phase.STAGE, kind="record", title="record"),
    Action(phase=Phase.BLACKOUT, kind="step", title="swap", step="swap", undo_argv=("back",)),
    Action(phase=Phase.BLACKOUT, kind="step", title="look", step="look"),
    Action(phase=Phase.FINISH, kind="step", title="tidy", step="tidy"),
    Action(phase=Phase.FINISH, kind="step", title="tell", step="tell"),
)
FETCH, RECORD, SWAP, LOOK, TIDY, TELL = range(6)


def records(*entries: tuple[Kind, int | None]) -> list[Record]:
    return [
        Record(kind=kind, action=action, problem="", monotonic_ns=number)
        for number, (kind, action) in enumerate(entries)
    ]


DID = [(Kind.INTENT, FETCH), (Kind.DONE, FETCH)]
SWAPPED = [*DID, (Kind.BLACKOUT, None), (Kind.INTENT, SWAP), (Kind.DONE, SWAP)]


@pytest.mark.parametrize(
    ("entries", "undo", "running"),
    [
        ([], (), {}),
        ([(Kind.INTENT, RECORD)], (), {}),
        ([(Kind.INTENT, FETCH)], (FETCH,), {FETCH: 0}),
        (DID, (FETCH,), {}),
        ([(Kind.INTENT, FETCH), (Kind.FAILED, FETCH)], (FETCH,), {}),
        (SWAPPED, (SWAP, FETCH), {}),
        ([*SWAPPED, (Kind.INTENT, LOOK)], (SWAP, FETCH), {LOOK: 5}),
        ([*SWAPPED, (Kind.UNDOING, SWAP)], (SWAP, FETCH), {}),
        ([*SWAPPED, (Kind.UNDOING, SWAP), (Kind.UNDO_FAILED, SWAP)], (SWAP, FETCH), {}),
        ([*SWAPPED, (Kind.UNDOING, SWAP), (Kind.UNDONE, SWAP)], (FETCH,), {}),
        ([*SWAPPED, (Kind.UNDONE, SWAP), (Kind.UNDONE, FETCH)], (), {}),
    ],
)
def test_steps_that_began_are_undone_in_reverse(
    entries: list[tuple[Kind, int | None]], undo: tuple[int, ...], running: dict[int, int]
) -> None:
    left = remaining(PLAN, records(*entries), same_boot=True)
    assert (left.undo, left.running) == (undo, running)
    assert not left.committed and not left.finish and not left.unknown


def test_power_may_have_taken_the_records_of_a_blackout() -> None:
    entries = records(*DID, (Kind.BLACKOUT, None))
    assert remaining(PLAN, entries, same_boot=True).undo == (FETCH,)
    after = remaining(PLAN, entries, same_boot=False)
    assert after.undo == (SWAP, FETCH)
    assert after.running == {}, "no process outlives a boot"


@pytest.mark.parametrize(
    ("entries", "finish", "unknown"),
    [
        ([], (TIDY, TELL), ()),
        ([(Kind.INTENT, TIDY)], (TELL,), (TIDY,)),
        ([(Kind.INTENT, TIDY), (Kind.DONE, TIDY)], (TELL,), ()),
        ([(Kind.INTENT, TIDY), (Kind.DONE, TIDY), (Kind.INTENT, TELL)], (), (TELL,)),
        ([(Kind.INTENT, TIDY), (Kind.FAILED, TIDY)], (), ()),
    ],
)
def test_an_update_that_is_in_place_stays_and_is_finished(
    entries: list[tuple[Kind, int | None]], finish: tuple[int, ...], unknown: tuple[int, ...]
) -> None:
    all_of_it = records(*SWAPPED, (Kind.COMMITTED, None), *entries)
    left = remaining(PLAN, all_of_it, same_boot=True)
    assert left.committed and left.undo == ()
    assert (left.finish, left.unknown) == (finish, unknown)


def test_records_of_actions_that_the_plan_does_not_have_are_passed_over() -> None:
    assert remaining(PLAN, records((Kind.INTENT, 99)), same_boot=True).undo == ()
