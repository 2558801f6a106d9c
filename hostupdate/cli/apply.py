"""``hostupdate apply``."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import click

from hostupdate.cli.compose import (
    HostClock,
    located_guests,
    make_hands,
    open_cgroups,
    open_hypervisor,
    require_root,
    vital_signs,
)
from hostupdate.cli.plan_text import print_plan
from hostupdate.cli.progress import Lines, Silent
from hostupdate.cli.report_text import print_report
from hostupdate.cli.settings import Settings, global_options, pass_settings, read_file
from hostupdate.cli.terminal import duration, err, print_error, print_json
from hostupdate.clocks import Clocks
from hostupdate.config import Config
from hostupdate.durations import DurationError, parse_duration
from hostupdate.eligibility import Eligibility
from hostupdate.engine import Run
from hostupdate.engine.ports import HandoverPort
from hostupdate.errors import InputError, RefusedError
from hostupdate.guests import Hypervisor
from hostupdate.guests.agent import Agents
from hostupdate.host import processes
from hostupdate.host.cgroups import Cgroups
from hostupdate.host.guard import Guard
from hostupdate.host.steps import find_programs
from hostupdate.journal import Journal
from hostupdate.manifest import Manifest, Packages, decode_manifest
from hostupdate.model import (
    HARD_CAP_NS,
    ExitCode,
    Impact,
    ImpactReport,
    LocatedGuest,
    Outcome,
    PackageVerdict,
    PendingRecord,
    Phase,
    Plan,
    Report,
)
from hostupdate.plan import make_plan
from hostupdate.vitals import Vitals


@click.command("apply")
@click.argument("manifest_path", metavar="MANIFEST", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Print every action that apply would do; do none.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask on a terminal.")
@click.option(
    "--pause-method", type=click.Choice(["auto", "freeze", "stop"]), help="How guests are paused."
)
@click.option(
    "--max-impact", type=click.Choice([str(impact) for impact in Impact]), help="Refuse above it."
)
@click.option("--budget", metavar="DURATION", help="Longest allowed blackout, such as 5s.")
@click.option(
    "--verify-ram",
    type=click.Choice(["full", "sample", "off"]),
    help="Digest of guests' RAM before and after the pause.",
)
@global_options
@pass_settings
def command(
    settings: Settings,
    manifest_path: Path,
    dry_run: bool,
    yes: bool,
    pause_method: str | None,
    max_impact: str | None,
    budget: str | None,
    verify_ram: str | None,
) -> None:
    """Apply the update that MANIFEST describes, under the running guests."""
    manifest = decode_manifest(read_file(manifest_path), str(manifest_path))
    config = settings.load_config()
    budget_ns = _budget_ns(budget)
    for step in manifest.steps:
        find_programs(step)
    require_root()
    verify = verify_ram or config.residency.verify_ram
    journal = Journal(settings.state)
    run_id = journal.new_run() if not dry_run else "dry-run"
    lock = None
    guard = Guard()
    try:
        lock = journal.lock(run_id) if not dry_run else None
        _refuse_interrupted(journal)
        if not dry_run:
            journal.check()
        with open_hypervisor(settings, config) as hypervisor:
            cgroups = open_cgroups(config)
            guests = located_guests(hypervisor, cgroups)
            verdicts: tuple[PackageVerdict, ...] | None = None
            notes: tuple[str, ...] = ()
            if manifest.packages is not None:
                manifest, verdicts, notes = _judged(manifest, manifest.packages, settings, guests)
            clocks = Clocks(Agents(hypervisor), config.clock)
            asked = _asked(manifest, guests)
            signs = vital_signs(hypervisor)

            def look(whom: Sequence[tuple[str, int]]) -> Mapping[str, Vitals]:
                return signs.look(whom, config.deadlines.libvirt_ns)

            vitals = look(
                [(g.guest.uuid, g.place.pid) for g in guests if g.place and g.guest.uuid in asked]
            )
            plan = make_plan(
                manifest,
                config,
                guests,
                cgroup2=cgroups is not None,
                verify_ram=verify,
                method=pause_method or config.pause.method,
                max_impact=Impact(max_impact) if max_impact else None,
                budget_ns=budget_ns,
                synchronised=HostClock().host_clock_synchronised(),
                watchdogs=clocks.watchdogs(asked),
                rivals=guard.survey(settings.uri),
                vitals=vitals,
                eligible=_eligible(manifest, settings, config, hypervisor, guests),
                packages=verdicts,
                notes=notes,
            )
            if dry_run:
                print_json(plan) if settings.json else print_plan(plan)
                return
            if not (yes or _confirmed(plan)):
                raise RefusedError(["not confirmed"])
            report = _execute(
                run_id,
                plan,
                settings,
                config,
                manifest,
                journal,
                hypervisor,
                clocks,
                cgroups,
                guests,
                verify,
                guard,
                look,
                vitals,
                _handover(run_id, plan, settings, config, manifest, hypervisor, verify),
            )
    except RefusedError as error:
        if not settings.json or dry_run:
            raise
        print_json(_refusal(run_id, manifest, error))
        print_error(error)
        sys.exit(ExitCode.REFUSED)
    finally:
        guard.close()
        if lock is not None:
            lock.release()
        if not dry_run:
            journal.drop_if_empty(run_id)
    try:
        print_json(report) if settings.json else print_report(report)
    except OSError:  # nobody reads it: what happened to the host counts, and is on disk
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  the interpreter flushes it at its end
    sys.exit(report.exit_code)


def _execute(
    run_id: str,
    plan: Plan,
    settings: Settings,
    config: Config,
    manifest: Manifest,
    journal: Journal,
    hypervisor: Hypervisor,
    clocks: Clocks,
    cgroups: Cgroups | None,
    guests: list[LocatedGuest],
    verify_ram: str,
    guard: Guard,
    look: Callable[[Sequence[tuple[str, int]]], Mapping[str, Vitals]],
    vitals: Mapping[str, Vitals],
    handover: HandoverPort | None,
) -> Report:
    pending = PendingRecord(
        run_id=run_id,
        boot_id=processes.boot_id(),
        uri=settings.uri,
        pid=os.getpid(),
        started=processes.started(os.getpid()),
        libvirt_timeout_ns=config.deadlines.recovery_libvirt_ns,
    )
    with closing(journal.begin(plan, pending)) as run_journal, ExitStack() as stack:
        try:
            hands = stack.enter_context(
                make_hands(
                    run_id=run_id,
                    settings=settings,
                    config=config,
                    manifest=manifest,
                    directory=journal.directory(run_id),
                    journal=run_journal,
                    guard=guard,
                    look=look,
                    vitals=vitals,
                    hypervisor=hypervisor,
                    clocks=clocks,
                    cgroups=cgroups,
                    guests=guests,
                    verify_ram=verify_ram,
                    handover=handover,
                    progress=Silent() if settings.quiet else Lines(),
                )
            )
            run = Run(run_id, plan, config, hands)
        except BaseException:  # nothing was done: there is nothing to resume
            run_journal.end()
            raise
        return run.execute()


def _judged(
    manifest: Manifest, wanted: Packages, settings: Settings, guests: list[LocatedGuest]
) -> tuple[Manifest, tuple[PackageVerdict, ...], tuple[str, ...]]:
    """The manifest with its packages as steps, what each does to guests, and warnings."""
    from hostupdate.cli.candidates import qemu_uses
    from hostupdate.host.packages import Apt
    from hostupdate.impact import judge_packages
    from hostupdate.packaging import package_warnings, with_packages

    transaction = Apt(settings.state / "packages").resolve(wanted)
    verdicts = judge_packages(transaction.changes, qemu_uses(guests))
    manifest = with_packages(manifest, transaction, verdicts)
    for step in manifest.steps:
        find_programs(step)
    return manifest, verdicts, package_warnings(transaction)


def _eligible(
    manifest: Manifest,
    settings: Settings,
    config: Config,
    hypervisor: Hypervisor,
    guests: list[LocatedGuest],
) -> Mapping[str, Eligibility]:
    """Who can be handed over, where somebody is to be. PrerequisiteError, InputError: nobody."""
    if manifest.qemu is None and manifest.update.impact != "handover":
        return {}
    from hostupdate.cli.candidates import eligibility
    from hostupdate.cli.handing_over import parking_host

    host = parking_host(settings, config, hypervisor, "")
    host.hook.check()
    return eligibility(hypervisor, guests, config, host)


def _handover(
    run_id: str,
    plan: Plan,
    settings: Settings,
    config: Config,
    manifest: Manifest,
    hypervisor: Hypervisor,
    verify_ram: str,
) -> HandoverPort | None:
    if plan.actual is not Impact.HANDOVER:
        return None
    from hostupdate.cli.handing_over import HandoverHand, parking_host

    program = manifest.qemu.program if manifest.qemu is not None else ""
    host = parking_host(settings, config, hypervisor, run_id)
    together = bool(manifest.steps_in(Phase.BLACKOUT))
    return HandoverHand(host, config, hypervisor, program, verify_ram, outlive=not together)


def _asked(manifest: Manifest, guests: list[LocatedGuest]) -> list[str]:
    """The guests whose watchdogs matter: those that a blackout would pause."""
    pauses = manifest.steps_in(Phase.BLACKOUT) or manifest.qemu is not None
    if not (pauses or manifest.update.impact == "handover"):
        return []
    return [g.guest.uuid for g in guests if g.place is not None and not g.place.frozen]


def _budget_ns(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        budget_ns = parse_duration(text)
    except DurationError as error:
        raise InputError(
            "command line", "--budget", f"{text!r} {error.problem}", remedy=error.remedy
        ) from error
    if not 0 < budget_ns <= HARD_CAP_NS:
        raise InputError(
            "command line", "--budget", f"{text!r} is not more than 0 and at most 30 s",
            remedy="write a budget such as 5s",
        )  # fmt: skip
    return budget_ns


def _refuse_interrupted(journal: Journal) -> None:
    record = journal.pending()
    if record is not None:
        raise RefusedError(
            [f"run {record.run_id} was interrupted: guests may be paused"],
            remedy="run `hostupdate resume` first",
        )


def _confirmed(plan: Plan) -> bool:
    console = err()
    if not plan.paused or not (sys.stdin.isatty() and console.is_terminal):
        return True
    longest = duration(plan.predicted_blackout_ns)
    return click.confirm(
        f"Pause {len(plan.paused)} guests for {longest} or less?", default=True, err=True
    )


def _refusal(run_id: str, manifest: Manifest, error: RefusedError) -> Report:
    """A refusal as a report, so that --json always is one."""
    return Report(
        run_id=run_id,
        update=manifest.update.name,
        started_realtime_ns=time.time_ns(),
        impact=ImpactReport(requested=manifest.update.impact, judged=None, actual=None),
        method=None,
        outcome=Outcome.REFUSED,
        exit_code=ExitCode.REFUSED,
        reasons=list(error.reasons),
        budget_ns=None,
    )
