"""What is decided before anything is touched."""

from __future__ import annotations

import msgspec
import pytest

from hostupdate.config import Config, decode_config
from hostupdate.config import Handover as HandoverConfig
from hostupdate.durations import MILLISECOND, SECOND
from hostupdate.eligibility import Blocker, Eligibility
from hostupdate.errors import RefusedError
from hostupdate.guestpolicy import GuestPolicy
from hostupdate.handing import HANDOVER_NS
from hostupdate.manifest import Manifest, decode_manifest
from hostupdate.model import (
    FreezeBy,
    GuestState,
    Impact,
    LocatedGuest,
    PackageVerdict,
    PauseMethod,
    Phase,
    Plan,
    Protection,
)
from hostupdate.plan import make_plan
from hostupdate.prediction import full_digests_ns
from hostupdate.rivals import Rivals
from hostupdate.skew import Watchdog
from hostupdate.vitals import Vitals
from tests.unit.fakes import located

STEP = '[[step]]\nname = "{name}"\nphase = "{phase}"\nrun = ["true"]\n'


def manifest(update: str = "", *steps: str) -> Manifest:
    text = f'[update]\nname = "u"\n{update}\n' + "\n".join(steps)
    return decode_manifest(text.encode(), "m.toml")


def step(phase: str = "blackout", name: str = "s", **more: str) -> str:
    lines = STEP.format(name=name, phase=phase)
    return lines + "".join(f"{key} = {value}\n" for key, value in more.items())


def plan(
    what: Manifest,
    *guests: LocatedGuest,
    config: Config | None = None,
    cgroup2: bool = True,
    verify_ram: str = "sample",
    method: str = "auto",
    max_impact: Impact | None = None,
    budget_ns: int | None = None,
    synchronised: bool = True,
    watchdogs: dict[str, Watchdog] | None = None,
    rivals: Rivals | None = None,
    vitals: dict[str, Vitals] | None = None,
    eligible: dict[str, Eligibility] | None = None,
    packages: list[PackageVerdict] | None = None,
) -> Plan:
    return make_plan(
        what,
        config or Config(),
        guests or (located("a"), located("b")),
        cgroup2=cgroup2,
        verify_ram=verify_ram,
        method=method,
        max_impact=max_impact,
        budget_ns=budget_ns,
        synchronised=synchronised,
        watchdogs=watchdogs,
        rivals=rivals,
        vitals=vitals,
        eligible=eligible,
        packages=packages,
    )


def kinds(made: Plan) -> list[str]:
    return [action.kind for action in made.actions]


def test_an_update_without_blackout_steps_pauses_nobody() -> None:
    made = plan(manifest("", step("stage"), step("finish", "t")))
    assert made.judged is made.actual is Impact.NONE
    assert made.method is None
    assert made.predicted_blackout_ns is None
    assert kinds(made) == ["step", "step"]
    assert not made.paused


def test_a_floor_is_never_lowered_and_a_judgement_never_undercut() -> None:
    floor = plan(manifest('impact = "pause"', step("stage")))
    assert (floor.judged, floor.actual) == (Impact.NONE, Impact.PAUSE)
    assert "freeze" in kinds(floor)
    asked_for_less = plan(manifest('impact = "none"', step()))
    assert asked_for_less.actual is Impact.PAUSE


def test_the_actions_of_a_freeze_in_their_order() -> None:
    made = plan(
        manifest("", step("stage", "x"), step("blackout", "y"), step("finish", "z")),
        method="freeze",
    )
    assert kinds(made) == [
        "step", "clocks-before", "record", "measure", "keeper", "recheck",
        "arm", "freeze", "digest", "step", "compare", "thaw", "disarm",
        "clocks", "release", "verify", "step",
    ]  # fmt: skip
    assert [a.step for a in made.actions if a.kind == "step"] == ["x", "y", "z"]
    phases = [action.phase for action in made.actions]
    assert phases == sorted(phases, key=list(Phase).index)


def test_a_stop_wraps_the_freeze() -> None:
    made = plan(manifest("", step()), method="stop")
    order = kinds(made)
    assert order.index("stop") < order.index("freeze") < order.index("thaw")
    assert order.index("thaw") < order.index("resume")


def test_the_method_follows_the_longest_possible_blackout() -> None:
    short = plan(manifest("", step(timeout='"9s"')))
    assert short.method is PauseMethod.FREEZE
    assert short.predicted_blackout_ns == 9 * SECOND + 200 * MILLISECOND
    long = plan(manifest("", step(timeout='"9.9s"')))
    assert long.method is PauseMethod.STOP
    assert long.predicted_blackout_ns == 9 * SECOND + 900 * MILLISECOND + SECOND
    open_end = plan(manifest("", step()))
    assert open_end.method is PauseMethod.STOP
    assert open_end.predicted_blackout_ns == open_end.budget_ns == 30 * SECOND
    limited = decode_config([("c", b'[pause]\nfreeze-limit = "1s"')])
    assert plan(manifest("", step(timeout='"2s"')), config=limited).method is PauseMethod.STOP


def test_the_budget_is_the_least_of_all_wishes() -> None:
    timed = manifest('budget = "20s"', step(timeout='"1s"'))
    assert plan(timed).budget_ns == 20 * SECOND
    assert plan(timed, budget_ns=3 * SECOND).budget_ns == 3 * SECOND
    shy = located("a", policy=GuestPolicy(max_blackout_ns=2 * SECOND))
    assert plan(timed, shy, budget_ns=3 * SECOND).budget_ns == 2 * SECOND
    asleep = located("a", state=GuestState.SHUTOFF, policy=GuestPolicy(max_blackout_ns=2 * SECOND))
    assert plan(timed, asleep, located("b")).budget_ns == 20 * SECOND


def test_a_prediction_above_the_budget_is_refused_with_both_numbers() -> None:
    with pytest.raises(RefusedError, match=r"may last 4\.2 s .* budget is 4 s: lower"):
        plan(manifest('budget = "4s"', step(timeout='"4s"')))


def test_a_budget_that_leaves_no_time_to_resume_is_refused() -> None:
    with pytest.raises(RefusedError, match="budget is 100 ms"):
        plan(manifest('budget = "100ms"', step()))


def test_what_this_version_cannot_do_is_refused() -> None:
    with pytest.raises(RefusedError, match="impact kexec: this version"):
        plan(manifest('impact = "kexec"', step()))


# ---- handover

FINE = Eligibility(blockers=(), warnings=(Blocker(reason="its VNC drops", remedy=""),))


def handed(*steps: str, eligible: dict[str, Eligibility] | None = None, **options: object) -> Plan:
    text = '[update]\nname = "u"\n[qemu]\nprogram = "/opt/qemu"\n' + "".join(steps)
    guests = (located("a"), located("b", state=GuestState.SHUTOFF), located("c"))
    if eligible is None:
        eligible = {"uuid-a": FINE, "uuid-c": FINE}
    return plan(decode_manifest(text.encode(), "m"), *guests, eligible=eligible, **options)


def test_guests_are_handed_over_one_after_the_other() -> None:
    made = handed(step("stage", "install"), step("finish", "tidy"))
    assert (made.judged, made.actual, made.method) == (Impact.HANDOVER, Impact.HANDOVER, None)
    assert [guest.name for guest in made.paused] == ["a", "c"]
    assert [(action.kind, action.step or action.guest) for action in made.actions] == [
        ("keep-qemu", ""),
        ("step", "install"),
        ("warm", ""),
        ("watch", ""),
        ("rehearse", "uuid-a"),
        ("rehearse", "uuid-c"),
        ("clocks-before", ""),
        ("prepare", ""),
        ("recheck", ""),
        *((kind, f"uuid-{name}") for name in "ac" for kind in ("park", "unpark", "commit")),
        ("clocks", ""),
        ("clear", ""),
        ("verify", ""),
        ("step", "tidy"),
    ]
    assert "guest a: its VNC drops" in made.warnings


def test_steps_of_the_blackout_find_every_qemu_gone() -> None:
    made = handed(step(name="modules", timeout='"2s"'))
    dark = [action.step or action.kind for action in made.actions if action.phase is Phase.BLACKOUT]
    assert dark == ["park", "modules", "unpark", "commit", "commit"]
    assert made.predicted_blackout_ns == 2 * HANDOVER_NS + 2 * SECOND
    two = msgspec.structs.replace(Config(), handover=HandoverConfig(workers=2))
    made = handed(step(name="modules", timeout='"2s"'), config=two)
    assert made.predicted_blackout_ns == HANDOVER_NS + 2 * SECOND


def test_digests_of_all_ram_are_foreseen() -> None:
    one = full_digests_ns(located("a").guest.memory_bytes)
    assert handed(verify_ram="full").predicted_blackout_ns == HANDOVER_NS + one
    together = handed(step(name="modules", timeout='"2s"'), verify_ram="full")
    assert together.predicted_blackout_ns == 2 * HANDOVER_NS + 2 * SECOND + 2 * one


def test_a_guest_that_cannot_be_handed_over_refuses_the_update() -> None:
    bad = Eligibility(
        blockers=(Blocker(reason="its RAM is private", remedy="give it files"),), warnings=()
    )
    with pytest.raises(RefusedError, match=r"guest c: its RAM is private \(give it files\)"):
        handed(eligible={"uuid-a": FINE, "uuid-c": bad})
    with pytest.raises(RefusedError, match="guest c: whether it can be handed over is not known"):
        handed(eligible={"uuid-a": FINE})


def test_a_handover_that_may_last_longer_than_the_budget_is_refused() -> None:
    with pytest.raises(RefusedError, match="budget is 1 s"):
        handed(budget_ns=SECOND)


def test_an_impact_of_handover_alone_puts_the_same_qemu_under_guests_anew() -> None:
    made = plan(
        manifest('impact = "handover"', step(timeout='"1s"')),
        located("a"),
        eligible={"uuid-a": FINE},
    )
    assert made.actual is Impact.HANDOVER
    assert "the QEMU that is installed then" in next(
        action.title for action in made.actions if action.kind == "unpark"
    )


@pytest.mark.parametrize("text", ['impact = "handover"\n' + step("stage"), "[qemu]"])
def test_a_handover_needs_to_know_of_each_guest_whether_it_can_be(text: str) -> None:
    with pytest.raises(RefusedError) as refused:
        plan(manifest(text), located("a"), located("b"))
    assert refused.value.reasons == tuple(
        f"guest {name}: whether it can be handed over is not known" for name in "ab"
    )
    can = {located(name).guest.uuid: Eligibility(blockers=(), warnings=()) for name in "ab"}
    made = plan(manifest(text), located("a"), located("b"), eligible=can)
    assert made.actual is Impact.HANDOVER and kinds(made).count("park") == 2


def verdict(name: str, impact: Impact | None) -> PackageVerdict:
    return PackageVerdict(
        name=name, old="1", new="2", impact=impact, reason=f"why {name}", evidence=("/x",)
    )


def test_packages_that_cannot_be_judged_or_done_are_refused_by_name() -> None:
    found = [verdict("fine", Impact.NONE), verdict("vswitch", None), verdict("linux", Impact.KEXEC)]
    what = decode_manifest(b'[update]\nname="u"\n[packages]\nall=true\n', "m")
    with pytest.raises(RefusedError) as refused:
        plan(what, packages=found)
    assert refused.value.reasons[:2] == (
        "package vswitch: why vswitch (/x)",
        "package linux: why linux (/x)",
    )
    with pytest.raises(RefusedError, match=r"\[packages\]: what they change was not judged"):
        plan(what)


def test_packages_that_touch_no_guest_are_a_plan_with_their_verdicts() -> None:
    what = decode_manifest(b'[update]\nname="u"\n[packages]\nall=true\n', "m")
    made = plan(what, packages=[verdict("fine", Impact.NONE)])
    assert made.actual is Impact.NONE and [v.name for v in made.packages] == ["fine"]


def test_reboot_packages_and_the_ceiling_are_all_named_in_one_refusal() -> None:
    text = b'[update]\nname="u"\nreboot-only=true\n[packages]\nall=true\n'
    with pytest.raises(RefusedError) as refused:
        plan(decode_manifest(text, "m"), max_impact=Impact.PAUSE)
    assert len(refused.value.reasons) == 3
    for words in ("packages", "reboot", "above the allowed pause"):
        assert words in str(refused.value)


def test_guests_that_do_not_run_or_are_frozen_by_their_owner_are_left_alone() -> None:
    made = plan(
        manifest("", step()),
        located("off", state=GuestState.SHUTOFF),
        located("slept", state=GuestState.PAUSED),
        located("iced", frozen=True),
        located("runs"),
    )
    assert [guest.name for guest in made.paused] == ["runs"]
    reasons = {guest.name: guest.reason for guest in made.guests}
    assert reasons["slept"] == "it is paused"
    assert "frozen" in reasons["iced"]


def test_with_nobody_to_pause_the_steps_run_without_a_pause() -> None:
    made = plan(manifest("", step()), located("off", state=GuestState.SHUTOFF))
    assert (made.judged, made.actual, made.method) == (Impact.PAUSE, Impact.NONE, None)
    assert kinds(made) == ["step"]


def test_a_running_guest_that_cannot_be_found_refuses_a_pause_and_only_a_pause() -> None:
    lost = located("lost", problem="its QEMU process was not found")
    with pytest.raises(RefusedError, match="guest lost: its QEMU"):
        plan(manifest("", step()), lost)
    assert plan(manifest("", step("stage")), lost).actual is Impact.NONE


@pytest.mark.parametrize(
    ("facts", "protection"),
    [
        ({"memory_controller": True}, Protection.MEMORY_MIN),
        ({"memory_controller": True, "shared_cgroup": True}, Protection.LOCKED),
        ({"shared_ram": True}, Protection.LOCKED),
        ({"shared_ram": False}, Protection.NONE),
    ],
)
def test_what_keeps_pages_in_ram(facts: dict[str, object], protection: Protection) -> None:
    made = plan(manifest("", step()), located("a", **facts))
    assert made.guests[0].protection is protection
    assert any("nothing keeps" in text for text in made.warnings) == (protection is Protection.NONE)


def test_locking_can_be_switched_off() -> None:
    off = decode_config([("c", b"[residency]\nlock = false")])
    assert plan(manifest("", step()), config=off).guests[0].protection is Protection.NONE


def test_a_digest_is_taken_only_where_it_means_something() -> None:
    written = located("a", dma_writers=("vhost", "io_uring"))
    made = plan(manifest("", step()), written)
    assert "vhost, io_uring" in made.guests[0].digest_reason
    assert "digest" not in kinds(made)
    off = plan(manifest("", step()), verify_ram="off")
    assert off.guests[0].digest_reason == "switched off"


def test_a_host_without_cgroup2_uses_signals_and_says_so() -> None:
    made = plan(manifest("", step()), located("a", cgroup=None), cgroup2=False)
    assert made.guests[0].freeze_by is FreezeBy.SIGNAL
    assert any("SIGSTOP" in text for text in made.warnings)
    assert "isolate" not in kinds(made)


def test_a_shared_cgroup_is_left_for_one_of_its_own() -> None:
    made = plan(manifest("", step()), located("a", shared_cgroup=True), located("b"))
    assert [guest.isolate for guest in made.guests] == [True, False]
    (isolate,) = [action for action in made.actions if action.kind == "isolate"]
    assert "a" in isolate.title and isolate.undo


def test_a_long_freeze_that_was_asked_for_warns_of_lockups() -> None:
    made = plan(manifest("", step(timeout='"25s"')), method="freeze")
    assert any("soft lockup" in text for text in made.warnings)


def test_a_guest_without_a_pvclock_is_warned_of_where_the_blackout_may_be_too_long() -> None:
    dogs = {
        "uuid-a": Watchdog(threshold_ns=4 * SECOND, pvclock=False),
        "uuid-b": Watchdog(threshold_ns=4 * SECOND, pvclock=True),
    }
    long = plan(manifest("", step(timeout='"5s"')), method="stop", watchdogs=dogs)
    (warning,) = [text for text in long.warnings if "soft lockup" in text]
    assert warning.startswith("guest a has no pvclock: paused for longer than 4 s")
    short = plan(manifest("", step(timeout='"2s"')), method="stop", watchdogs=dogs)
    assert not any("soft lockup" in text for text in short.warnings)


@pytest.mark.parametrize(
    ("clock", "synchronised", "title"),
    [
        ("", True, "set the clocks of a, b to the host's time"),
        ("", False, "give the clocks of a, b back what the pause took"),
        ("trust-host = true", False, "set the clocks of a, b to the host's time"),
        ('correct = "ours"', True, "give the clocks of a, b back what the pause took"),
        ('correct = "off"', True, "measure the clocks of a, b again"),
    ],
)
def test_the_plan_says_what_becomes_of_clocks(clock: str, synchronised: bool, title: str) -> None:
    config = decode_config([("c", f"[clock]\n{clock}".encode())])
    made = plan(manifest("", step()), config=config, synchronised=synchronised)
    assert [action.title for action in made.actions if action.kind == "clocks"] == [title]
    unsure = any("nothing synchronises" in text for text in made.warnings)
    assert unsure == (not synchronised and not config.clock.trust_host)


def test_links_are_held_only_if_asked() -> None:
    assert "links-down" not in kinds(plan(manifest("", step())))
    held = decode_config([("c", b"[clock]\nhold-network = true")])
    order = kinds(plan(manifest("", step()), config=held, method="stop"))
    assert order.index("record") < order.index("links-down") < order.index("arm")
    after = order.index("resume") + 1
    assert order[after : after + 3] == ["clocks", "links-up", "disarm"]


def test_a_guest_that_wants_to_approve_is_not_asked_and_that_is_said() -> None:
    made = plan(manifest("", step()), located("a", policy=GuestPolicy(needs_approval=True)))
    assert any("guest a wants to approve" in text for text in made.warnings)


# ---- who else acts, and guests that are not well


def test_others_are_held_still_first_and_let_go_last() -> None:
    rivals = Rivals(
        units=("libvirt-guests.service",), autostart_marker="/run/m", inhibit=True, notes=("n",)
    )
    made = plan(manifest("", step("stage", "f"), step(), step("finish", "t")), rivals=rivals)
    assert (kinds(made)[0], kinds(made)[-1]) == ("guard", "unguard")
    for words in ("libvirt-guests", "autostart", "a shutdown of the host"):
        assert words in made.actions[0].title
    assert "n" in made.warnings
    assert "guard" not in kinds(plan(manifest("", step()), rivals=Rivals()))


def test_a_package_manager_at_work_refuses_the_update() -> None:
    with pytest.raises(RefusedError, match="dpkg is held"):
        plan(manifest("", step()), rivals=Rivals(busy=("dpkg is held by pid 7",)))


def test_a_guest_that_is_not_well_refuses_the_update_that_would_pause_it() -> None:
    sick = {"uuid-b": Vitals(job="backup")}
    with pytest.raises(RefusedError, match="guest b: libvirt's job 'backup'"):
        plan(manifest("", step()), vitals=sick)
    assert plan(manifest("", step("stage")), vitals=sick).actual is Impact.NONE


def test_a_silent_agent_is_a_warning() -> None:
    made = plan(manifest("", step()), vitals={"uuid-b": Vitals(agent=False)})
    assert any(
        warning.startswith("guest b: its agent does not answer") for warning in made.warnings
    )
