"""What an interrupted run has left to do, by its plan and its records. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import msgspec

from hostupdate.model import Phase, Plan


class Kind(StrEnum):
    """What a record says. Those of an action come in pairs: before it and after it."""

    INTENT = "intent"  #: an action begins
    DONE = "done"
    FAILED = "failed"
    UNDOING = "undoing"  #: its undo begins
    UNDONE = "undone"
    UNDO_FAILED = "undo-failed"
    BLACKOUT = "blackout"  #: guests are paused from here on
    COMMITTED = "committed"  #: the update stays: nothing is undone any more
    RECOVERING = "recovering"  #: `hostupdate resume` has taken over


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One record. ``action``: index in the plan's actions; None: it is of the whole run.
    ``monotonic_ns``: of the boot of its run."""

    kind: Kind
    action: int | None
    problem: str
    monotonic_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Remaining:
    """Indices in the plan's actions.

    ``running`` maps steps that began and whose end nobody has seen to when they began: they may
    run still. ``undo``: in this order. ``finish``: steps of the finish that have not begun, of a
    run that is committed. ``unknown``: such steps that began and whose end nobody has seen.
    """

    committed: bool
    running: dict[int, int]
    undo: tuple[int, ...]
    finish: tuple[int, ...]
    unknown: tuple[int, ...]


def remaining(plan: Plan, records: Sequence[Record], *, same_boot: bool) -> Remaining:
    """What is left to do.

    In another boot than the run's, records of its blackout may be missing that power took away
    with it: all steps of a blackout that began count as begun then, so that an undo may meet a
    step that never ran.
    """
    steps = {number: action for number, action in enumerate(plan.actions) if action.kind == "step"}
    seen: dict[int, set[Kind]] = {number: set() for number in steps}
    began_ns: dict[int, int] = {}
    for record in records:
        if record.action in seen:
            seen[record.action].add(record.kind)
            if record.kind is Kind.INTENT:
                began_ns[record.action] = record.monotonic_ns
    kinds = {record.kind for record in records}
    ended = {Kind.DONE, Kind.FAILED}
    committed = Kind.COMMITTED in kinds
    open_ended = [n for n in began_ns if not seen[n] & ended]
    running = {number: began_ns[number] for number in open_ended} if same_boot else {}
    if committed:
        finish = [n for n, action in steps.items() if action.phase is Phase.FINISH]
        over = any(Kind.FAILED in seen[number] for number in finish)  # the run had ended there
        return Remaining(
            committed=True,
            running=running,
            undo=(),
            finish=() if over else tuple(n for n in finish if n not in began_ns),
            unknown=tuple(number for number in finish if number in open_ended),
        )
    begun = set(began_ns)
    if not same_boot and Kind.BLACKOUT in kinds:
        begun |= {n for n, action in steps.items() if action.phase is Phase.BLACKOUT}
    return Remaining(
        committed=False,
        running=running,
        undo=tuple(
            number
            for number in sorted(begun, reverse=True)
            if steps[number].undo_argv and Kind.UNDONE not in seen[number]
        ),
        finish=(),
        unknown=(),
    )
