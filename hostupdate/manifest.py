"""One update, as the operator describes it: the manifest (docs/manifest.md)."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, field

from hostupdate.config import Switch, Table, convert, decode_toml
from hostupdate.durations import HOUR, format_duration, quoted, span
from hostupdate.errors import InputError
from hostupdate.model import HARD_CAP_NS, Phase

#: Names of the steps that install packages begin with it, and no others.
PACKAGES = "[packages]"
_NO_CONTROL = r"[^\x00-\x1f\x7f-\x9f\u2028\u2029]"

Name = Annotated[
    str,
    Meta(
        pattern=rf"\A(?=.*\S){_NO_CONTROL}{{1,100}}\Z",
        description="a name of 1 to 100 characters without control characters",
        examples=["restart vswitchd"],
    ),
]
Argument = Annotated[
    str, Meta(pattern=r"\A[^\x00]+\Z", description="a text that is not empty and has no NUL")
]
Argv = Annotated[
    tuple[Argument, ...],
    Meta(
        min_length=1,
        description="a list of a program and its arguments",
        examples=[["systemctl", "restart", "openvswitch-switch"]],
    ),
]
#: Begins with a letter or digit, so that no package manager takes it for an option.
PackageName = Annotated[
    str,
    Meta(
        pattern=r"\A[A-Za-z0-9][A-Za-z0-9+._-]*(:[a-z0-9-]+)?\Z",
        description="a package name",
        examples=["openvswitch-switch"],
    ),
]


class Update(Table, frozen=True, kw_only=True):
    """What the update is and how much it may disturb."""

    name: Name
    description: Annotated[
        str,
        Meta(
            pattern=r"\A[^\x00-\x08\x0b-\x1f\x7f-\x9f]*\Z",
            description="a text without control characters other than tab and line feed",
        ),
    ] = ""
    reboot_only: Switch = False
    #: A floor: never done with less impact than this, nor with less than judged.
    impact: Literal["auto", "none", "pause", "handover", "kexec"] = "auto"
    #: Longest blackout; None: what the configuration says.
    budget_ns: Annotated[int, span(HARD_CAP_NS)] | None = None


class Packages(Table, frozen=True, kw_only=True):
    """Packages to upgrade: those listed, or all. Never both."""

    upgrade: Annotated[
        tuple[PackageName, ...],
        Meta(description="a list of package names", examples=[["openvswitch-switch"]]),
    ] = ()
    all: Switch = False


class Step(Table, frozen=True, kw_only=True):
    """One command of the update. Commands are argument vectors; no shell reads them."""

    name: Name
    phase: Annotated[
        Phase,
        Meta(description='one of "stage", "blackout", "finish"', examples=["blackout"]),
    ]
    run: Argv
    #: Takes back what ``run`` did; None where nothing needs to be, or can be, taken back.
    undo: Argv | None = None
    #: None: a blackout step may take what the budget leaves.
    timeout_ns: Annotated[int, span(HOUR)] | None = None
    #: Exits 0 where the step had its effect.
    verify: Argv | None = None


class Qemu(Table, frozen=True, kw_only=True):
    """Guests come under another QEMU: an update of impact handover."""

    #: The program; empty: the one that each guest's definition names, as it is when the steps of
    #: phase stage have run.
    program: Annotated[
        str,
        Meta(
            pattern=r"\A(/[^\x00-\x1f\x7f]*)?\Z",
            description='an absolute path, or ""',
            examples=["/usr/bin/qemu-system-x86_64"],
        ),
    ] = ""


class Manifest(Table, frozen=True, kw_only=True):
    """A decoded manifest. It holds steps, packages or a QEMU, or says that only a reboot will
    do."""

    update: Annotated[Update, Meta(description="a table [update] with at least a name")]
    packages: Packages | None = None
    qemu: Qemu | None = None
    steps: Annotated[
        tuple[Step, ...], Meta(description="a list of tables, each written as [[step]]")
    ] = field(name="step", default=())

    def steps_in(self, phase: Phase) -> tuple[Step, ...]:
        """The steps of ``phase``, in the order of the manifest."""
        return tuple(step for step in self.steps if step.phase == phase)


def decode_manifest(data: bytes, source: str) -> Manifest:
    """The manifest that ``data`` (TOML) holds; ``source`` names it in errors, say its path.

    Raises InputError for the first mistake, with file, field, value and remedy.
    """
    manifest = convert(decode_toml(data, source), Manifest, source)
    _check_packages(manifest.packages, source)
    _check_steps(manifest.steps, source)
    named = manifest.steps or manifest.packages or manifest.qemu is not None
    if not (named or manifest.update.reboot_only):
        raise InputError(
            source, "", "the manifest is empty", remedy="add a [[step]], [packages] or [qemu] to it"
        )
    return manifest


def _check_packages(packages: Packages | None, source: str) -> None:
    if packages is None:
        return
    if packages.all and packages.upgrade:
        names = ", ".join(packages.upgrade)
        problem = f"true, but packages.upgrade lists {names}"
        raise InputError(source, "packages.all", problem, remedy="keep one of the two")
    if not packages.all and not packages.upgrade:
        remedy = 'write upgrade = ["NAME"] or all = true, or leave [packages] out'
        raise InputError(source, "packages", "names no package", remedy=remedy)


def _check_steps(steps: tuple[Step, ...], source: str) -> None:
    first: dict[str, int] = {}
    for number, step in enumerate(steps, start=1):
        if step.name in first:
            problem = f"{quoted(step.name)} is also the name of step[{first[step.name]}]"
            remedy = "give each step a name of its own"
            raise InputError(source, f"step[{number}].name", problem, remedy=remedy)
        first[step.name] = number
        if step.name.startswith(PACKAGES):
            problem = f"{quoted(step.name)} begins as the steps of [packages] do"
            remedy = "give the step another name"
            raise InputError(source, f"step[{number}].name", problem, remedy=remedy)
        asked_ns = step.timeout_ns or 0
        if step.phase is Phase.BLACKOUT and asked_ns > HARD_CAP_NS:
            asked, limit = format_duration(asked_ns), format_duration(HARD_CAP_NS)
            problem = f"{asked} is more than a blackout may last (step {quoted(step.name)})"
            remedy = f"write at most {limit}, or move the step to phase stage or finish"
            raise InputError(source, f"step[{number}].timeout", problem, remedy=remedy)
