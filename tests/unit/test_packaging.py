"""Packages become steps that say exactly what is done, and what takes it back."""

from __future__ import annotations

import msgspec
import pytest

from hostupdate.errors import InputError
from hostupdate.impact import PackageChange, judge_packages
from hostupdate.manifest import PACKAGES, Manifest, Step, decode_manifest
from hostupdate.model import Impact, PackageVerdict, Phase
from hostupdate.packaging import Archive, Transaction, package_warnings, with_packages

PLACE = "/state/packages"
UPGRADED = PackageChange(name="qemu", old="1:7", new="1:10", architecture="amd64")
NEW = PackageChange(name="libnew", old="", new="3", architecture="all")
MANIFEST = decode_manifest(
    b'[update]\nname="u"\n[packages]\nupgrade=["qemu"]\n'
    b'[[step]]\nname="own"\nphase="stage"\nrun=["true"]\n',
    "m",
)
HANDED = PackageVerdict(name="qemu", old="1:7", new="1:10", impact=Impact.HANDOVER, reason="")


def transaction(old: Archive | None) -> Transaction:
    return Transaction(
        changes=(NEW, UPGRADED),
        new={
            "qemu": Archive(path=f"{PLACE}/qemu_1%3a10_amd64.deb", fetch=True),
            "libnew": Archive(path="/mirror/libnew_3_all.deb", fetch=True),
        },
        old={"qemu": old} if old else {},
        directory=PLACE,
    )


FETCHED = Archive(path=f"{PLACE}/qemu_1%3a7_amd64.deb", fetch=True)


def steps(made: Manifest) -> dict[str, Step]:
    return {step.name.removeprefix(f"{PACKAGES} "): step for step in made.steps}


def test_the_steps_and_their_order() -> None:
    made = with_packages(MANIFEST, transaction(FETCHED), [HANDED])
    assert [*steps(made)] == [
        *("download", "look for what was not judged", "keep the way back", "install"),
        *("clear up", "own"),
    ]
    assert [step.phase for step in made.steps_in(Phase.FINISH)] == [Phase.FINISH]
    assert made.qemu is not None and made.qemu.program == ""


def test_exact_versions_are_installed_verified_and_taken_back() -> None:
    found = steps(with_packages(MANIFEST, transaction(FETCHED), []))
    install = found["install"]
    assert install.run[-4:] == ("install", "--no-remove", "--only-upgrade", "qemu=1:10")
    assert "libnew" not in " ".join(install.run)  # a dependency: apt goes on taking it for one
    assert "NEEDRESTART_SUSPEND=1" in install.run
    assert install.verify is not None and install.undo is not None
    assert install.verify[-2:] == ("libnew:all=3", "qemu:amd64=1:10")
    assert install.undo[-1].endswith(
        f"--allow-downgrades install {PLACE}/qemu_1%3a7_amd64.deb libnew-"
    )
    assert f"install -d -m 0700 {PLACE}/partial" in found["download"].run[-1]
    assert found["look for what was not judged"].run[-2:] == (
        "/mirror/libnew_3_all.deb",
        f"{PLACE}/qemu_1%3a10_amd64.deb",
    )
    assert found["clear up"].run == ("rm", "-rf", "--", PLACE)


@pytest.mark.parametrize(
    ("old", "kept", "absent"),
    [
        (FETCHED, "--download-only --reinstall --no-remove install qemu=1:7", "cp --"),
        (
            Archive(path=f"{PLACE}/q.deb", here="/var/cache/apt/archives/q.deb"),
            f"cp -- /var/cache/apt/archives/q.deb {PLACE}",
            "--reinstall",
        ),
        (Archive(path=f"{PLACE}/q.deb"), f"{PLACE}/partial", "--reinstall"),  # there already
    ],
)
def test_the_old_packages_are_kept_before_the_new_ones_are_installed(
    old: Archive, kept: str, absent: str
) -> None:
    keep = steps(with_packages(MANIFEST, transaction(old), []))["keep the way back"]
    assert kept in keep.run[-1] and absent not in keep.run[-1]


def test_without_the_old_packages_there_is_no_undo_and_that_is_said() -> None:
    found = steps(with_packages(MANIFEST, transaction(None), []))
    assert found["install"].undo is None and "keep the way back" not in found
    assert package_warnings(transaction(FETCHED)) == ()
    (warning,) = package_warnings(transaction(None))
    assert "no archive of qemu 1:7" in warning


def test_nothing_to_upgrade_is_said_and_nothing_is_done() -> None:
    empty = msgspec.structs.replace(transaction(None), changes=())
    assert with_packages(MANIFEST, empty, judge_packages([], [])).steps == MANIFEST.steps
    assert "nothing to upgrade" in package_warnings(empty)[0]


def test_a_qemu_that_the_manifest_names_stays() -> None:
    text = b'[update]\nname="u"\n[packages]\nall=true\n[qemu]\nprogram="/opt/q"\n'
    made = with_packages(decode_manifest(text, "m"), transaction(FETCHED), [HANDED])
    assert made.qemu is not None and made.qemu.program == "/opt/q"


def test_nobody_elses_step_is_named_like_these() -> None:
    text = b'[update]\nname="u"\n[[step]]\nname="[packages] x"\nphase="stage"\nrun=["true"]\n'
    with pytest.raises(InputError) as error:
        decode_manifest(text, "m")
    assert error.value.field == "step[1].name"
