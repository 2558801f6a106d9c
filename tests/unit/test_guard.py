"""The race guard on a small host: a tree of files, and a systemctl that remembers."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from hostupdate.errors import DeadlineError, HostUpdateError, PrerequisiteError
from hostupdate.host.guard import Guard
from hostupdate.rivals import Held, Rivals

GUESTS, DAILY, DNF = "libvirt-guests.service", "apt-daily.service", "dnf-automatic.service"
SYSTEM = "qemu:///system"

#: Like systemd, it goes by the drop-ins that were there when it was last told to look.
SYSTEMCTL = """\
#!/bin/sh
cd "$(dirname "$0")/.."
while [ "${1#--no-}" != "$1" ]; do shift; done
echo "$*" >>calls
[ ! -e "hang-$1" ] || exec sleep 1000
[ ! -e "fail-$1" ] || { echo "it went wrong" >&2; exit 1; }
verb=$1; shift
case $verb in
daemon-reload) (cd root && find run/systemd/system -type f) >loaded ;;
show)
	shift
	for unit; do
		load=not-found active=inactive
		[ ! -e "units/$unit" ] || read -r load active <"units/$unit"
		printf 'Id=%s\\nLoadState=%s\\nActiveState=%s\\n' "$unit" "$load" "$active"
		echo "DropInPaths=$(grep "/$unit.d/" loaded | sed 's,^,/,' | tr '\\n' ' ')"
		echo
	done ;;
esac
"""
INHIBIT = """\
#!/bin/sh
here=$(dirname "$0")/..
echo "$*" >>"$here/calls"
[ ! -e "$here/fail-inhibit" ] || { echo "Failed to inhibit: Access denied" >&2; exit 1; }
while [ "${1#--}" != "$1" ]; do shift; done
exec "$@"
"""


class Host:
    """A host below ``top``: its files in root, its programs in bin, its units in units."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.root = top / "root"
        self.dropins = self.root / "run/systemd/system"
        for directory in (self.dropins, top / "bin", top / "units"):
            directory.mkdir(parents=True)
        (top / "loaded").touch()
        self.program("systemctl", SYSTEMCTL)
        self.program("systemd-inhibit", INHIBIT)
        self.unit(GUESTS, "loaded active")
        self.unit(DAILY, "loaded inactive")
        self.guard = self.make_guard()

    def make_guard(self, timeout_ns: int = 30_000_000_000) -> Guard:
        return Guard(self.root, path=f"{self.top}/bin", timeout_ns=timeout_ns)

    def program(self, name: str, text: str) -> None:
        (self.top / "bin" / name).write_text(text)
        (self.top / "bin" / name).chmod(0o755)

    def unit(self, name: str, state: str) -> None:
        (self.top / "units" / name).write_text(state + "\n")

    def make(self, name: str, text: str = "") -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def calls(self) -> list[str]:
        """The verbs of systemctl so far."""
        calls = self.top / "calls"
        return [c.split()[0] for c in calls.read_text().splitlines()] if calls.exists() else []

    def tree(self) -> dict[str, str]:
        return {
            str(p.relative_to(self.root)): p.read_text() if p.is_file() else ""
            for p in sorted(self.root.rglob("*"))
        }

    def loaded(self) -> str:
        return (self.top / "loaded").read_text()


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


# ---- survey


def test_a_survey_finds_the_units_that_exist_and_changes_nothing(host: Host) -> None:
    before = host.tree()

    rivals = host.guard.survey(SYSTEM)

    assert rivals == Rivals(units=(GUESTS, DAILY), inhibit=True)
    assert rivals.held == Held(units=(GUESTS, DAILY))
    assert host.tree() == before and host.calls() == ["show"]


def test_a_unit_that_its_owner_masked_is_left_alone(host: Host) -> None:
    host.unit(DAILY, "masked inactive")

    assert host.guard.survey(SYSTEM).units == (GUESTS,)


@pytest.mark.parametrize("state", ["activating", "deactivating", "reloading"])
def test_an_updater_at_work_is_a_reason_to_refuse(host: Host, state: str) -> None:
    host.unit(DNF, f"loaded {state}")

    assert host.guard.survey(SYSTEM).busy == (f"{DNF} is at work",)


def test_without_systemd_nothing_is_held_and_nobody_is_asked(host: Host) -> None:
    host.dropins.rmdir()

    rivals = host.guard.survey(SYSTEM)

    assert (rivals.units, rivals.inhibit, rivals.notes) == ((), False, ())
    assert host.guard.hold(rivals) == () and host.calls() == []


def test_without_systemd_inhibit_the_operator_is_told(host: Host) -> None:
    (host.top / "bin/systemd-inhibit").unlink()

    rivals = host.guard.survey(SYSTEM)

    assert not rivals.inhibit and "holds off a shutdown" in rivals.notes[0]


def test_systemd_without_systemctl_is_refused(host: Host) -> None:
    (host.top / "bin/systemctl").unlink()

    with pytest.raises(PrerequisiteError, match="systemctl"):
        host.guard.survey(SYSTEM)


def test_a_systemctl_that_hangs_is_not_waited_for(host: Host) -> None:
    (host.top / "hang-show").touch()

    with pytest.raises(DeadlineError, match="systemctl show"):
        host.make_guard(timeout_ns=200_000_000).survey(SYSTEM)


@pytest.mark.parametrize("answer", ["", "Id=x\n\nId=y", "Id=x\nLoadState=loaded", "no"])
def test_an_answer_that_is_not_understood_is_refused(host: Host, answer: str) -> None:
    host.program("systemctl", f"#!/bin/sh\nprintf '{answer}'\n")

    with pytest.raises(HostUpdateError, match="not understood"):
        host.guard.survey(SYSTEM)


@pytest.mark.parametrize(
    ("in_s", "refused"), [(-5, True), (600, True), (7200, False), (None, True)]
)
def test_a_shutdown_that_is_due_is_a_reason_to_refuse(
    host: Host, in_s: int | None, refused: bool
) -> None:
    text = "MODE=reboot\n" if in_s is None else f"USEC={(int(time.time()) + in_s) * 1_000_000}\n"
    host.make("run/systemd/shutdown/scheduled", text)

    busy = host.guard.survey(SYSTEM).busy

    assert len(busy) == refused and all("shutdown -c" in reason for reason in busy)


@pytest.mark.parametrize(
    ("uri", "marker"),
    [
        (SYSTEM, "/run/libvirt/qemu/autostarted"),
        ("qemu+unix:///system", "/run/libvirt/qemu/autostarted"),
        ("qemu+ssh://other/system", ""),
        ("qemu:///session", ""),
        ("qemu:///embed?root=/srv/lab", ""),
        ("test:///default", ""),
    ],
)
def test_the_autostart_marker_is_wanted_for_this_hosts_daemon_only(
    host: Host, uri: str, marker: str
) -> None:
    (host.root / "run/libvirt/qemu").mkdir(parents=True)

    assert host.guard.survey(uri).autostart_marker == marker


def test_no_marker_is_wanted_where_it_is_there_or_libvirt_is_not(host: Host) -> None:
    assert host.guard.survey(SYSTEM).autostart_marker == ""

    host.make("run/libvirt/qemu/autostarted")

    assert host.guard.survey(SYSTEM).autostart_marker == ""


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ('auto_shutdown_try_save = "persistent"\nauto_shutdown_poweroff="all"\n', 2),
        ('  auto_shutdown_try_shutdown = "transient"', 1),
        ('#auto_shutdown_poweroff = "all"\nauto_shutdown_try_save = "none"\n', 0),
        ("auto_shutdown_wait = 30\nauto_shutdown_restore = 1\n", 0),
    ],
)
def test_libvirts_own_shutdown_settings_are_told(host: Host, text: str, names: int) -> None:
    host.make("etc/libvirt/qemu.conf", text)

    notes = host.guard.survey(SYSTEM).notes

    assert sum(note.count("auto_shutdown_") for note in notes) == names
    assert host.guard.survey("qemu:///session").notes == ()


# ---- hold and restore


def test_what_is_held_is_put_back_and_nothing_else_is_changed(host: Host) -> None:
    host.make("run/libvirt/qemu/other")
    before = host.tree()
    rivals = host.guard.survey(SYSTEM)

    assert host.guard.hold(rivals) == ()

    held = host.tree()
    guests = held[f"run/systemd/system/{GUESTS}.d/zz-hostupdate.conf"]
    assert guests == "[Service]\nExecStart=\nExecStart=true\nExecStop=\n"
    daily = f"run/systemd/system/{DAILY}.d/zz-hostupdate.conf"
    assert held[daily] == f"[Unit]\nConditionPathExists=!/{daily}\n"
    assert "run/libvirt/qemu/autostarted" in held
    assert DAILY in host.loaded() and GUESTS in host.loaded()

    host.guard.close()
    host.guard.restore(rivals.held)

    assert host.tree() == before and host.loaded() == ""


def test_holding_and_restoring_are_safe_to_repeat(host: Host) -> None:
    before = host.tree()
    rivals = host.guard.survey(SYSTEM)
    host.guard.restore(rivals.held)
    host.guard.hold(rivals)
    held = host.tree()
    host.guard.hold(rivals)
    assert host.tree() == held

    host.guard.restore(rivals.held)
    host.guard.restore(rivals.held)
    host.make_guard().restore(rivals.held)

    assert host.tree() == before
    host.guard.close()
    host.guard.close()


def test_nothing_held_asks_nobody(host: Host) -> None:
    host.guard.restore(Held())

    assert host.calls() == []


def test_after_a_boot_there_is_nothing_to_put_back(host: Host) -> None:
    (host.root / "run/libvirt/qemu").mkdir(parents=True)
    held = host.guard.survey(SYSTEM).held
    host.make("run/libvirt/qemu/autostarted")  # libvirt's own, of this boot
    before = host.tree()

    host.guard.restore(held)

    assert host.tree() == before and "daemon-reload" not in host.calls()


def test_an_owners_drop_ins_stay(host: Host) -> None:
    mine = host.make(f"run/systemd/system/{DAILY}.d/mine.conf", "[Unit]\n")
    rivals = host.guard.survey(SYSTEM)

    host.guard.hold(rivals)
    host.guard.close()
    host.guard.restore(rivals.held)

    assert mine.read_text() == "[Unit]\n" and not mine.with_name("zz-hostupdate.conf").exists()


def test_a_marker_that_libvirt_made_meanwhile_is_libvirts(host: Host) -> None:
    (host.root / "run/libvirt/qemu").mkdir(parents=True)
    rivals = host.guard.survey(SYSTEM)
    marker = host.make("run/libvirt/qemu/autostarted")

    host.guard.hold(rivals)
    host.guard.close()
    host.guard.restore(rivals.held)

    assert marker.read_text() == ""


@pytest.mark.parametrize("failure", ["reload", "unheeded", "file", "marker"])
def test_a_hold_that_fails_puts_back_what_it_did(host: Host, failure: str) -> None:
    (host.root / "run/libvirt/qemu").mkdir(parents=True)
    rivals = host.guard.survey(SYSTEM)
    if failure == "reload":
        (host.top / "fail-daemon-reload").touch()
    elif failure == "unheeded":
        text = SYSTEMCTL.replace("find run", "false && find run")
        host.program("systemctl", text)
    elif failure == "file":
        host.make(f"run/systemd/system/{DAILY}.d")
    else:
        (host.root / "run/libvirt/qemu").rmdir()
    before = host.tree()

    with pytest.raises(HostUpdateError):
        host.guard.hold(rivals)

    assert host.tree() == before and host.loaded() == ""


def test_a_reload_that_hangs_is_a_deadline_and_leaves_no_file(host: Host) -> None:
    rivals = Rivals(units=(GUESTS,))
    (host.top / "hang-daemon-reload").touch()
    before = host.tree()

    with pytest.raises(DeadlineError, match="daemon-reload"):
        host.make_guard(timeout_ns=300_000_000).hold(rivals)

    assert host.tree() == before


def test_a_restore_tries_every_part_and_tells_all_that_failed(host: Host) -> None:
    (host.root / "run/libvirt/qemu").mkdir(parents=True)
    rivals = host.guard.survey(SYSTEM)
    host.guard.hold(rivals)
    stuck = host.dropins / f"{GUESTS}.d/zz-hostupdate.conf"
    stuck.unlink()
    stuck.mkdir()
    (host.top / "fail-daemon-reload").touch()

    with pytest.raises(HostUpdateError, match=r"zz-hostupdate.*it went wrong") as failed:
        host.guard.restore(rivals.held)

    assert "daemon-reload" in failed.value.remedy
    assert not (host.dropins / f"{DAILY}.d").exists()
    assert not (host.root / "run/libvirt/qemu/autostarted").exists()

    stuck.rmdir()
    (host.top / "fail-daemon-reload").unlink()
    host.guard.restore(rivals.held)  # systemd still went by them

    assert host.loaded() == ""
    host.guard.close()


def test_an_inhibitor_that_cannot_be_had_is_told_and_fails_nothing(host: Host) -> None:
    (host.top / "fail-inhibit").touch()

    (note,) = host.guard.hold(Rivals(inhibit=True))

    assert note.endswith("Failed to inhibit: Access denied")
