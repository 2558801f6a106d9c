"""From a manifest, the configuration and the guests of a host to a plan, or to a refusal.

Pure: facts come in, a :class:`~hostupdate.model.Plan` goes out, and nothing is touched. What the
plan lists is what the engine executes; there is no second description of a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hostupdate import handing, pausing
from hostupdate.config import Clock, Config
from hostupdate.durations import format_duration
from hostupdate.eligibility import Eligibility
from hostupdate.errors import RefusedError
from hostupdate.manifest import Manifest, Step
from hostupdate.model import (
    HARD_CAP_NS,
    Action,
    FreezeBy,
    GuestPlace,
    GuestState,
    Impact,
    LocatedGuest,
    PackageVerdict,
    PauseMethod,
    Phase,
    Plan,
    PlannedGuest,
    Protection,
)
from hostupdate.prediction import RESERVE_NS, blackout_ceiling_ns, full_digests_ns
from hostupdate.rivals import Rivals
from hostupdate.skew import Watchdog
from hostupdate.vitals import Vitals, blockers, warnings

#: A guest's soft-lockup watchdog barks after this long without a pause that it knows of
#: (kernel.watchdog_thresh 10 s, doubled; Documentation/admin-guide/lockup-watchdogs.rst).
GUEST_WATCHDOG_NS = 20_000_000_000

_UNSYNCHRONISED = (
    "nothing synchronises the host's clock: guests are not set by it, they get back what the pause "
    "takes; start chrony, or say [clock] trust-host = true"
)
_HOST, _OURS, _LOOK = (
    "set the clocks of {} to the host's time",
    "give the clocks of {} back what the pause took",
    "measure the clocks of {} again",
)
_CLOCK_TITLES = {
    ("all", True): _HOST,
    ("all", False): _OURS,
    ("ours", True): _OURS,
    ("ours", False): _OURS,
    ("off", True): _LOOK,
    ("off", False): _LOOK,
}


def make_plan(
    manifest: Manifest,
    config: Config,
    guests: Sequence[LocatedGuest],
    *,
    cgroup2: bool,
    verify_ram: str,
    method: str,
    max_impact: Impact | None = None,
    budget_ns: int | None = None,
    synchronised: bool = True,
    watchdogs: Mapping[str, Watchdog] | None = None,
    rivals: Rivals | None = None,
    vitals: Mapping[str, Vitals] | None = None,
    eligible: Mapping[str, Eligibility] | None = None,
    packages: Sequence[PackageVerdict] | None = None,
    notes: Sequence[str] = (),
) -> Plan:
    """Decides everything about a run.

    ``verify_ram`` is sample, full or off; ``method`` auto, freeze or stop; ``synchronised`` what
    is known of the host's clock, ``watchdogs`` of guests', by uuid; ``rivals`` who else may act on
    guests and packages; ``vitals`` of running guests, by uuid;
    ``eligible`` says of each whether it can be handed over; ``packages`` are judged, and their
    steps in the manifest already; ``notes`` are warnings of who made them. Raises RefusedError
    with every reason found, not only the first; nothing was touched then.
    """
    judged = _judge(manifest, packages or ())
    requested = manifest.update.impact
    actual = judged if requested == "auto" else _higher(judged, Impact(requested))
    reasons = _blockers(manifest, actual, max_impact, packages)
    reasons += rivals.busy if rivals is not None else ()

    planned = tuple(_plan_guest(located, actual, cgroup2, config, verify_ram) for located in guests)
    reasons += [
        f"guest {located.guest.name}: {located.problem}"
        for located in guests
        if located.problem and actual is not Impact.NONE
    ]
    reasons += [
        f"guest {located.guest.name}: libvirt does not tell its state"
        for located in guests
        if located.guest.state is GuestState.UNKNOWN and actual is not Impact.NONE
    ]
    paused = [guest for guest in planned if guest.pause]
    signs = [(g.name, (vitals or {}).get(g.uuid, Vitals())) for g in paused]
    reasons += [f"guest {name}: {text}" for name, found in signs for text in blockers(found)]
    budget_ns = _budget_ns(manifest, config, guests, budget_ns)

    chosen: PauseMethod | None = None
    method_reason = "no guest needs to be paused"
    predicted_ns: int | None = None
    pauses = actual is not Impact.NONE and bool(paused)
    handed = pauses and actual is Impact.HANDOVER
    if handed:
        method_reason = "guests come under another QEMU, one after the other"
        digested = {
            located.guest.uuid: located.guest.memory_bytes if verify_ram == "full" else 0
            for located in guests
        }
        predicted_ns = handing.predicted_ns(
            manifest, [digested[guest.uuid] for guest in paused], config.handover.workers or 1
        )
        reasons += handing.handover_reasons(paused, eligible or {})
        if predicted_ns > budget_ns:
            reasons.append(
                f"the blackout may last {format_duration(predicted_ns)}, the budget is "
                f"{format_duration(budget_ns)}: raise the budget, lower the steps' time-outs, or "
                "do without digests of all RAM"
            )
    elif pauses:
        timeouts_ns = [step.timeout_ns for step in manifest.steps_in(Phase.BLACKOUT)]
        chosen, method_reason = _choose_method(method, timeouts_ns, config, budget_ns)
        ceiling_ns = blackout_ceiling_ns(timeouts_ns, chosen)
        predicted_ns = budget_ns if ceiling_ns is None else ceiling_ns
        if verify_ram == "full":
            ram_bytes = sum(g.guest.memory_bytes for g in guests if g.place is not None)
            predicted_ns += full_digests_ns(ram_bytes)
        if predicted_ns > budget_ns or RESERVE_NS[chosen] >= budget_ns:
            reasons.append(
                f"the blackout may last {format_duration(predicted_ns)} (time-outs of its steps, "
                f"digests of all RAM, {format_duration(RESERVE_NS[chosen])} to let guests run), "
                f"the budget is {format_duration(budget_ns)}: "
                "lower the steps' time-outs or raise the budget"
            )
    if reasons:
        raise RefusedError(reasons)

    trusted = synchronised or config.clock.trust_host
    return Plan(
        update=manifest.update.name,
        requested=requested,
        judged=judged,
        actual=actual if pauses else Impact.NONE,
        method=chosen,
        method_reason=method_reason,
        budget_ns=budget_ns,
        predicted_blackout_ns=predicted_ns,
        guests=planned,
        actions=_guarded(
            rivals, _actions(manifest, planned, chosen, budget_ns, config.clock, trusted, handed)
        ),
        rivals=rivals,
        packages=tuple(packages or ()),
        warnings=(
            *notes,
            *_warnings(planned, chosen, predicted_ns, watchdogs or {}),
            *([_UNSYNCHRONISED] if pauses and not trusted else []),
            *(f"guest {name}: {text}" for name, found in signs for text in warnings(found)),
            *(handing.clock_warnings(config.clock) if handed else ()),
            *(
                f"guest {guest.name}: {warning.reason}"
                for guest in paused
                if handed and eligible and guest.uuid in eligible
                for warning in eligible[guest.uuid].warnings
            ),
            *(rivals.notes if rivals is not None else ()),
            *(
                f"guest {located.guest.name} wants to approve updates: this version does not ask"
                for located in guests
                if pauses and located.guest.policy.needs_approval
            ),
        ),
    )


def _judge(manifest: Manifest, packages: Sequence[PackageVerdict]) -> Impact:
    judged = Impact.NONE
    if manifest.update.reboot_only:
        judged = Impact.REBOOT
    elif manifest.qemu is not None:
        judged = Impact.HANDOVER
    elif manifest.steps_in(Phase.BLACKOUT):
        judged = Impact.PAUSE
    for verdict in packages:
        judged = _higher(judged, verdict.impact or Impact.NONE)
    return judged


def _higher(one: Impact, other: Impact) -> Impact:
    return one if one.rank >= other.rank else other


def _blockers(
    manifest: Manifest,
    actual: Impact,
    max_impact: Impact | None,
    packages: Sequence[PackageVerdict] | None,
) -> list[str]:
    reasons = []
    if manifest.packages is not None and packages is None:
        reasons.append("[packages]: what they change was not judged")
    for verdict in packages or ():
        if verdict.impact in (None, Impact.KEXEC, Impact.REBOOT):
            shown = f" ({', '.join(verdict.evidence)})" if verdict.evidence else ""
            reasons.append(f"package {verdict.name}: {verdict.reason}{shown}")
    if actual is Impact.REBOOT:
        reasons.append("the update needs a reboot of the host: guests cannot be kept over that")
    elif actual is Impact.KEXEC:
        reasons.append(f"impact {actual}: this version can do none, pause and handover only")
    if max_impact is not None and actual.rank > max_impact.rank:
        reasons.append(f"impact {actual} is above the allowed {max_impact}")
    return reasons


def _plan_guest(
    located: LocatedGuest, actual: Impact, cgroup2: bool, config: Config, verify_ram: str
) -> PlannedGuest:
    guest, place = located.guest, located.place
    reason = ""
    if actual is Impact.NONE:
        reason = "the update needs no pause"
    elif guest.state is not GuestState.RUNNING:
        reason = f"it is {guest.state}"
    elif place is not None and place.frozen:
        reason = "its owner has frozen its cgroup"
    if reason or place is None:
        return PlannedGuest(
            name=guest.name, uuid=guest.uuid, state=guest.state, pause=False,
            reason=reason or located.problem,
        )  # fmt: skip

    if actual is Impact.HANDOVER:
        return PlannedGuest(
            name=guest.name, uuid=guest.uuid, state=guest.state, pause=True,
            digest_reason="switched off" if verify_ram == "off" else "",
        )  # fmt: skip
    digest_reason = ""
    if verify_ram == "off":
        digest_reason = "switched off"
    elif place.dma_writers:
        digest_reason = "while frozen its RAM may be written by " + ", ".join(place.dma_writers)
    return PlannedGuest(
        name=guest.name,
        uuid=guest.uuid,
        state=guest.state,
        pause=True,
        freeze_by=FreezeBy.CGROUP if cgroup2 else FreezeBy.SIGNAL,
        isolate=cgroup2 and place.shared_cgroup,
        protection=protection_of(place, lock=config.residency.lock),
        digest_reason=digest_reason,
    )


def protection_of(place: GuestPlace, *, lock: bool) -> Protection:
    """What can keep the guest's pages in RAM; ``lock``: locking them is allowed."""
    if place.memory_controller and not place.shared_cgroup:
        return Protection.MEMORY_MIN
    return Protection.LOCKED if place.shared_ram and lock else Protection.NONE


def _budget_ns(
    manifest: Manifest, config: Config, guests: Sequence[LocatedGuest], asked_ns: int | None
) -> int:
    wishes = [HARD_CAP_NS, config.budget.host_ns, manifest.update.budget_ns, asked_ns]
    wishes += [
        located.guest.policy.max_blackout_ns
        for located in guests
        if located.guest.state is GuestState.RUNNING
    ]
    return min(wish for wish in wishes if wish is not None)


def _choose_method(
    method: str, timeouts_ns: Sequence[int | None], config: Config, budget_ns: int
) -> tuple[PauseMethod, str]:
    if method != "auto":
        return PauseMethod(method), "asked for"
    limit_ns = config.pause.freeze_limit_ns
    ceiling_ns = blackout_ceiling_ns(timeouts_ns, PauseMethod.FREEZE)
    longest_ns = budget_ns if ceiling_ns is None else ceiling_ns
    text = f"at most {format_duration(longest_ns)}, limit for freeze {format_duration(limit_ns)}"
    return (PauseMethod.FREEZE if longest_ns <= limit_ns else PauseMethod.STOP), text


def _warnings(
    guests: Sequence[PlannedGuest],
    method: PauseMethod | None,
    predicted_ns: int | None,
    watchdogs: Mapping[str, Watchdog],
) -> tuple[str, ...]:
    found = []
    for guest in guests:
        dog = watchdogs.get(guest.uuid)
        stalls = method is not None and dog is not None and (predicted_ns or 0) > dog.threshold_ns
        if guest.pause and stalls and dog is not None and not dog.pvclock:
            found.append(
                f"guest {guest.name} has no pvclock: paused for longer than "
                f"{format_duration(dog.threshold_ns)}, it may report a soft lockup"
            )
    if method is PauseMethod.FREEZE and (predicted_ns or 0) > GUEST_WATCHDOG_NS:
        found.append("frozen longer than 20 s, a guest reports a soft lockup: prefer method stop")
    if any(guest.freeze_by is FreezeBy.SIGNAL for guest in guests):
        found.append("no cgroup v2 on this host: guests are stopped by SIGSTOP")
    unprotected = [g.name for g in guests if g.freeze_by and g.protection is Protection.NONE]
    if unprotected:
        found.append(
            "nothing keeps the pages of " + ", ".join(unprotected) + " in RAM during the pause; "
            "swapping is measured and reported"
        )
    return tuple(found)


def _actions(
    manifest: Manifest,
    guests: Sequence[PlannedGuest],
    method: PauseMethod | None,
    budget_ns: int,
    clock: Clock,
    trusted: bool,
    handed: bool,
) -> tuple[Action, ...]:
    paused = [guest for guest in guests if guest.pause]
    title = _CLOCK_TITLES[clock.correct, trusted]
    made = {step.name: _step(step) for step in manifest.steps}
    if handed:
        return tuple(handing.handover_actions(manifest, paused, budget_ns, title, made))
    actions = [made[step.name] for step in manifest.steps_in(Phase.STAGE)]
    if method is None or not paused:
        actions += [made[step.name] for step in manifest.steps_in(Phase.BLACKOUT)]
    else:
        actions += pausing.pause_actions(manifest, paused, method, budget_ns, clock, title, made)
    actions += [made[step.name] for step in manifest.steps_in(Phase.FINISH)]
    return tuple(actions)


def _guarded(rivals: Rivals | None, actions: tuple[Action, ...]) -> tuple[Action, ...]:
    if rivals is None or not (rivals.units or rivals.autostart_marker or rivals.inhibit):
        return actions
    kept = [unit.partition(".")[0] for unit in rivals.units]
    kept += ["autostart"] if rivals.autostart_marker else []
    kept += ["a shutdown of the host"] if rivals.inhibit else []
    names = ", ".join(dict.fromkeys(kept))
    first = Action(
        phase=Phase.STAGE, kind="guard", title=f"keep from acting: {names}", undo="let them act"
    )
    last = Action(phase=Phase.FINISH, kind="unguard", title=f"let act again: {names}")
    return (first, *actions, last)


def _step(step: Step) -> Action:
    return Action(
        phase=Phase(step.phase),
        kind="step",
        title=f"run {step.name!r}",
        step=step.name,
        argv=tuple(step.run),
        undo=f"run {' '.join(step.undo)}" if step.undo else "",
        undo_argv=tuple(step.undo or ()),
        timeout_ns=step.timeout_ns,
    )
