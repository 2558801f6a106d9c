"""The part of a plan that puts another QEMU under running guests. Pure, like all of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hostupdate.config import Clock
from hostupdate.durations import format_duration
from hostupdate.eligibility import Eligibility
from hostupdate.manifest import Manifest
from hostupdate.model import Action, Phase, PlannedGuest
from hostupdate.prediction import full_digests_ns

#: What one guest may take from its stop to its run. Measured were 0.75 to 0.95 s on a quiet host
#: and up to 3.9 s on an overloaded one (docs/handover.md).
HANDOVER_NS = 4_000_000_000


def handover_reasons(
    guests: Sequence[PlannedGuest], eligible: Mapping[str, Eligibility]
) -> list[str]:
    """Why guests cannot be handed over, each with what to do about it."""
    reasons = []
    for guest in guests:
        found = eligible.get(guest.uuid)
        if found is None:
            reasons.append(f"guest {guest.name}: whether it can be handed over is not known")
            continue
        for blocker in found.blockers:
            remedy = f" ({blocker.remedy})" if blocker.remedy else ""
            reasons.append(f"guest {guest.name}: {blocker.reason}{remedy}")
    return reasons


def handover_ns(guests: int, workers: int) -> int:
    """What so many guests may take together, ``workers`` of them at a time."""
    return HANDOVER_NS * -(-guests // workers)


def predicted_ns(manifest: Manifest, ram_bytes: Sequence[int], workers: int) -> int:
    """Longest blackout of one guest: alone where nothing else happens meanwhile; else with all
    others, and with the steps that need every QEMU gone.

    ``ram_bytes``: of each guest, as far as all of it is digested.
    """
    steps = manifest.steps_in(Phase.BLACKOUT)
    if not steps:
        return HANDOVER_NS + max(map(full_digests_ns, ram_bytes), default=0)
    return (
        handover_ns(len(ram_bytes), workers)
        + full_digests_ns(sum(ram_bytes))
        + sum(step.timeout_ns or HANDOVER_NS for step in steps)
    )


def handover_actions(
    manifest: Manifest,
    guests: Sequence[PlannedGuest],
    budget_ns: int,
    clock_title: str,
    step_action: Mapping[str, Action],
) -> list[Action]:
    """One guest after the other, or where steps of the manifest need every QEMU gone, all at once:
    such a park and unpark name no guest.

    ``step_action`` holds the actions of the manifest's steps, by name.
    """
    names = ", ".join(guest.name for guest in guests)
    program = manifest.qemu.program if manifest.qemu is not None else ""
    under = program or "the QEMU that is installed then"
    limit = format_duration(budget_ns)

    def action(phase: Phase, kind: str, title: str, undo: str = "", guest: str = "") -> Action:
        return Action(phase=phase, kind=kind, title=title, undo=undo, guest=guest)

    def steps(phase: Phase) -> list[Action]:
        return [step_action[step.name] for step in manifest.steps_in(phase)]

    stage, blackout, finish = Phase.STAGE, Phase.BLACKOUT, Phase.FINISH
    actions = [
        action(
            stage, "keep-qemu", "keep the QEMU that guests run under now", "remove what is kept"
        ),
        *steps(stage),
        action(stage, "warm", f"have libvirt look at {under}"),
        action(stage, "watch", f"start the keeper: a guest runs within {limit}", "end the keeper"),
    ]
    for guest in guests:
        title = f"rehearse {guest.name} under {under}: it stops for some milliseconds"
        actions.append(action(stage, "rehearse", title, guest=guest.uuid))
    actions += [
        action(stage, "clocks-before", f"measure the clocks of {names}"),
        action(stage, "prepare", f"give the RAM of {names} a second name", "take it away"),
        action(stage, "recheck", f"see that {names} still run, and no others"),
    ]
    run = [action(blackout, "commit", f"let {g.name} run", "", g.uuid) for g in guests]
    middle = steps(blackout)
    if middle:
        actions += [
            action(blackout, "park", f"park {names}", "unpark them"),
            *middle,
            action(blackout, "unpark", f"unpark {names} under {under}"),
            *run,
        ]
    else:
        for guest, last in zip(guests, run, strict=True):
            title = f"unpark {guest.name} under {under}"
            actions += [
                action(blackout, "park", f"park {guest.name}", "unpark it", guest.uuid),
                action(blackout, "unpark", title, "", guest.uuid),
                last,
            ]
    return [
        *actions,
        action(finish, "clocks", clock_title.format(names)),
        action(finish, "clear", "end the keeper and clear up after the handover"),
        action(finish, "verify", f"verify the state of {names}"),
        *steps(finish),
    ]


def clock_warnings(clock: Clock) -> list[str]:
    """What of the configuration a handover cannot do."""
    if clock.hold_network:
        return ["network links are not held during a handover: libvirt makes them anew"]
    return []
