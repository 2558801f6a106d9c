"""The part of a plan that pauses running guests. Pure, like all of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hostupdate.config import Clock
from hostupdate.durations import format_duration
from hostupdate.manifest import Manifest
from hostupdate.model import Action, FreezeBy, PauseMethod, Phase, PlannedGuest, Protection


def pause_actions(
    manifest: Manifest,
    paused: Sequence[PlannedGuest],
    method: PauseMethod,
    budget_ns: int,
    clock: Clock,
    clock_title: str,
    step_action: Mapping[str, Action],
) -> list[Action]:
    """From the first measurement to the last look; the steps of the blackout are among them.

    ``step_action`` holds the actions of the manifest's steps, by name.
    """
    names = ", ".join(guest.name for guest in paused)
    isolated = ", ".join(guest.name for guest in paused if guest.isolate)
    protected = ", ".join(g.name for g in paused if g.protection is Protection.MEMORY_MIN)
    locked = ", ".join(g.name for g in paused if g.protection is Protection.LOCKED)
    digested = ", ".join(guest.name for guest in paused if not guest.digest_reason)
    by_signal = any(guest.freeze_by is FreezeBy.SIGNAL for guest in paused)

    def action(phase: Phase, kind: str, title: str, undo: str = "") -> Action:
        return Action(phase=phase, kind=kind, title=title, undo=undo)

    stage, blackout, finish = Phase.STAGE, Phase.BLACKOUT, Phase.FINISH
    actions = [
        action(stage, "clocks-before", f"measure the clocks of {names}"),
        action(stage, "record", "write what recovery must know", "remove it"),
        action(stage, "measure", f"measure the RAM of {names}"),
    ]
    if isolated:
        actions.append(
            action(stage, "isolate", f"move {isolated} to a cgroup of its own", "move back")
        )
    if protected:
        actions.append(
            action(stage, "protect", f"raise memory.min for {protected}", "restore memory.min")
        )
    keeper = "start the keeper" + (f", which locks the RAM of {locked}" if locked else "")
    actions.append(action(stage, "keeper", keeper, "end the keeper"))
    actions.append(action(stage, "recheck", f"see that {names} still run, and no others"))
    if clock.hold_network:
        down = f"take the network links of {names} down"
        actions.append(action(stage, "links-down", down, "bring them up"))
    arm = f"arm the keeper: guests run again within {format_duration(budget_ns)}"
    actions.append(action(blackout, "arm", arm, "disarm the keeper"))
    if method is PauseMethod.STOP:
        actions.append(action(blackout, "stop", f"stop {names} through libvirt", "resume"))
    how = "SIGSTOP" if by_signal else "freeze"
    actions.append(action(blackout, "freeze", f"{how} {names}", "thaw"))
    if digested:
        actions.append(action(blackout, "digest", f"digest the RAM of {digested}"))
    actions += [step_action[step.name] for step in manifest.steps_in(blackout)]
    if digested:
        actions.append(action(blackout, "compare", f"digest the RAM of {digested} again"))
    actions.append(action(blackout, "thaw", f"thaw {names}"))
    if method is PauseMethod.STOP:
        actions.append(action(blackout, "resume", f"resume {names} through libvirt"))
    after = blackout if clock.hold_network else finish
    clocks = [action(after, "clocks", clock_title.format(names))]
    if clock.hold_network:
        # Before the keeper is disarmed: should we die, it sees to it that links come up.
        actions += [*clocks, action(blackout, "links-up", f"bring up the links of {names}")]
        clocks = []
    actions.append(action(blackout, "disarm", "disarm the keeper"))
    actions += clocks
    actions.append(action(finish, "release", "end the keeper and put guests' cgroups back"))
    actions.append(action(finish, "verify", f"verify the state and the RAM of {names}"))
    return actions
