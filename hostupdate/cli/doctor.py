"""``hostupdate doctor``."""

from __future__ import annotations

import sys

import click
from rich.markup import escape

from hostupdate.cli.settings import Settings, global_options, pass_settings
from hostupdate.cli.terminal import out, print_json
from hostupdate.config import Config
from hostupdate.errors import DeadlineError, HypervisorError
from hostupdate.guests import Hypervisor, embedded_root
from hostupdate.host.prerequisites import Finding, Grade, check_host, check_lab
from hostupdate.model import ExitCode

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
    findings.append(_libvirt(settings, config))
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


def _libvirt(settings: Settings, config: Config) -> Finding:
    uri = settings.uri
    root = embedded_root(uri)
    if root is not None and not root.exists():
        return Finding(
            name="libvirt", grade=Grade.MISSING, found=f"{root} does not exist",
            remedy="hostupdate lab up",
        )  # fmt: skip
    try:
        hypervisor = Hypervisor(uri, timeout_ns=config.deadlines.libvirt_ns)
    except (HypervisorError, DeadlineError) as error:
        return Finding(
            name="libvirt",
            grade=Grade.MISSING,
            found=str(error),
            remedy="apt-get install -y libvirt-daemon-system && systemctl start libvirtd; "
            "without a daemon: hostupdate lab up, then --connect lab",
        )
    try:
        return Finding(name="libvirt", grade=Grade.OK, found=f"{uri}, {hypervisor.version()}")
    finally:
        hypervisor.close()
