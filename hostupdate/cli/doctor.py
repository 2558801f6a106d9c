"""``hostupdate doctor``."""

from __future__ import annotations

import sys

import click
from rich.markup import escape

from hostupdate.cli.compose import HostClock, located_guests, open_cgroups, vital_signs
from hostupdate.cli.settings import Settings, global_options, pass_settings
from hostupdate.cli.terminal import out, print_json
from hostupdate.clocks import Clocks
from hostupdate.config import Config
from hostupdate.durations import format_duration
from hostupdate.errors import DeadlineError, HypervisorError
from hostupdate.guests import Hypervisor, embedded_root
from hostupdate.guests.agent import Agents
from hostupdate.host.prerequisites import Finding, Grade, check_host, check_lab
from hostupdate.model import ExitCode, GuestState
from hostupdate.skew import Skew
from hostupdate.vitals import blockers

SCHEMA = "hostupdate-doctor-v1"
_COLOURS = {Grade.OK: "green", Grade.POOR: "yellow", Grade.MISSING: "red"}


@click.command("doctor")
@global_options
@pass_settings
def command(settings: Settings) -> None:
    """Check what this host lacks for a run, and say how to get it.

    Exits 1 where something is missing.
    """
    config = settings.load_config()
    findings = check_host(config.paths.cgroup2)
    findings.append(_host_clock(config))
    findings += _libvirt(settings, config)
    findings += check_lab()
    if settings.json:
        print_json({"schema": SCHEMA, "findings": findings})
    else:
        console = out()
        for finding in findings:
            mark = f"[{_COLOURS[finding.grade]}]{finding.grade:7}[/]"
            console.print(f"{mark} {escape(finding.name)}: {escape(finding.found)}")
            if finding.remedy:
                console.print(f"        remedy: {escape(finding.remedy)}", soft_wrap=True)
    missing = any(finding.grade is Grade.MISSING for finding in findings)
    sys.exit(ExitCode.ERROR if missing else ExitCode.OK)


def _host_clock(config: Config) -> Finding:
    if HostClock().host_clock_synchronised():
        return Finding(name="host clock", grade=Grade.OK, found="synchronised")
    found = "nothing synchronises it: guests' clocks are not set by it"
    if config.clock.trust_host:
        found = "nothing synchronises it; trusted by [clock] trust-host"
    return Finding(
        name="host clock", grade=Grade.POOR, found=found, remedy="apt-get install -y chrony"
    )


def _libvirt(settings: Settings, config: Config) -> list[Finding]:
    uri = settings.uri
    root = embedded_root(uri)
    if root is not None and not root.exists():
        return [
            Finding(
                name="libvirt", grade=Grade.MISSING, found=f"{root} does not exist",
                remedy="hostupdate lab up",
            )
        ]  # fmt: skip
    try:
        hypervisor = Hypervisor(uri, timeout_ns=config.deadlines.libvirt_ns)
    except (HypervisorError, DeadlineError) as error:
        return [
            Finding(
                name="libvirt",
                grade=Grade.MISSING,
                found=str(error),
                remedy="apt-get install -y libvirt-daemon-system && systemctl start libvirtd; "
                "without a daemon: hostupdate lab up, then --connect lab",
            )
        ]
    try:
        version = hypervisor.version()
        return [
            Finding(name="libvirt", grade=Grade.OK, found=f"{uri}, {version}"),
            *_guests(hypervisor, config),
        ]
    finally:
        hypervisor.close()


def _vitals(hypervisor: Hypervisor, config: Config) -> list[Finding]:
    """What would have a run refused, or hang it."""
    places = located_guests(hypervisor, open_cgroups(config))
    pids = {g.guest.uuid: (g.guest.name, g.place.pid) for g in places if g.place is not None}
    looked = vital_signs(hypervisor).look(
        [(uuid, pid) for uuid, (_, pid) in pids.items()], config.deadlines.libvirt_ns
    )
    return [
        Finding(name=f"guest {pids[uuid][0]}", grade=Grade.MISSING, found=text, remedy="")
        for uuid, found in looked.items()
        for text in blockers(found)
    ]


def _guests(hypervisor: Hypervisor, config: Config) -> list[Finding]:
    """Each running guest's agent, and what its watchdog would say of the longest blackout."""
    running = [g for g in hypervisor.guests() if g.state is GuestState.RUNNING]
    clocks = Clocks(Agents(hypervisor), config.clock)
    offset_ns, _uncertainty_ns = HostClock().host_clock()
    skews = clocks.measure([guest.uuid for guest in running], offset_ns)
    dogs = clocks.watchdogs([guest.uuid for guest in running])
    findings = _vitals(hypervisor, config)
    for guest in running:
        name, skew, dog = f"guest {guest.name}", skews[guest.uuid], dogs.get(guest.uuid)
        if not isinstance(skew, Skew):
            findings.append(
                Finding(
                    name=name, grade=Grade.POOR, remedy=skew.remedy,
                    found=f"its clock cannot be measured: {skew}",
                )
            )  # fmt: skip
            continue
        found = (
            f"its clock is {format_duration(skew.skew_ns)} ahead "
            f"(give or take {format_duration(skew.uncertainty_ns)})"
        )
        stalls = dog is not None and not dog.pvclock and dog.threshold_ns < config.budget.host_ns
        if dog is not None and stalls:
            found += (
                f"; without a pvclock it may report a soft lockup after a stop of more than "
                f"{format_duration(dog.threshold_ns)}"
            )
        findings.append(
            Finding(
                name=name, grade=Grade.POOR if stalls else Grade.OK, found=found,
                remedy="in the guest: sysctl kernel.watchdog_thresh=30; or kvm-clock"
                if stalls else "",
            )
        )  # fmt: skip
    return findings
