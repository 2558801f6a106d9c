"""What is wrong from outside: one clear error, the documented exit code, guests untouched."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hostupdate.guests import default_lab_uri
from hostupdate.host.cgroups import find_cgroup2
from hostupdate.lab import console
from tests.functional.cli import Ended, Lab, Program, keepers
from tests.requirements import NOBODY, need

UPDATE = '[update]\nname = "u"\n'
STEP = '[[step]]\nname = "x"\nphase = "blackout"\nrun = ["true"]\ntimeout = "1s"\n'
GOOD = UPDATE + STEP


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = tmp_path / "update.toml"
    path.write_text(GOOD)
    return path


def assert_one_error(ended: Ended, *words: str, code: int = 1, word: str = "error") -> None:
    assert ended.code == code, ended.err
    assert "Traceback" not in ended.err
    errors = [line for line in ended.err.splitlines() if line.startswith((f"{word}: ", "error: "))]
    assert len(errors) == 1, ended.err
    for expected in words:
        assert expected in ended.err
    assert ended.out == ""


@pytest.fixture(scope="module")
def cgroups(running_lab: Lab) -> list[Path]:
    """The cgroups that a run would make for the guests."""
    mount = find_cgroup2()
    assert mount is not None
    rows = running_lab.run("guests", "--json").data["guests"]
    return [mount / "hostupdate" / row["uuid"] for row in rows]


@pytest.fixture
def lab(running_lab: Lab, cgroups: list[Path]) -> Iterator[Lab]:
    """Guests that no test here may touch: they tick on, no cgroup is made, no keeper started."""
    before = {name: console.last_tick(running_lab.console(name)) for name in running_lab.names}
    yield running_lab
    assert not any(cgroup.exists() for cgroup in cgroups)
    assert not keepers(running_lab)
    assert not (running_lab.run.state / "armed.json").exists()
    deadline_ns = time.monotonic_ns() + 30_000_000_000
    for name, tick in before.items():
        assert tick is not None
        log = running_lab.console(name)
        while (last := console.last_tick(log)) is None or last.seq <= tick.seq:
            assert time.monotonic_ns() < deadline_ns, f"{name} does not tick any more"
            time.sleep(0.02)
        assert last.bad == 0


# ---- manifests

MANIFESTS: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "unknown key": (
        (UPDATE + 'budgte = "5s"\n' + STEP).encode(),
        ("update.budgte", "unknown key", "did you mean budget?"),
    ),
    "unknown key of a step": (
        (GOOD + 'unod = ["true"]\n').encode(),
        ("step[1].unod", "unknown key", "did you mean undo?"),
    ),
    "text where a list belongs": (
        GOOD.replace('["true"]', '"true"').encode(),
        ("step[1].run", '"true"', "a list of a program"),
    ),
    "number where a text belongs": (
        GOOD.replace('"u"', "5").encode(), ("update.name", "5 is not"),
    ),
    "unknown phase": (
        GOOD.replace('"blackout"', '"night"').encode(), ("step[1].phase", '"night"', '"finish"'),
    ),
    "negative budget": (
        (UPDATE + 'budget = "-1s"\n' + STEP).encode(), ("update.budget", '"-1s"'),
    ),
    "budget of nothing": (
        (UPDATE + 'budget = "0s"\n' + STEP).encode(), ("update.budget", '"0s"'),
    ),
    "budget too large": (
        (UPDATE + 'budget = "31s"\n' + STEP).encode(), ("update.budget", '"31s"', "at most 30 s"),
    ),
    "budget without a unit": (
        (UPDATE + "budget = 5\n" + STEP).encode(), ("update.budget", "5", "unit"),
    ),
    "blackout step longer than any blackout": (
        GOOD.replace('"1s"', '"31s"').encode(), ("step[1].timeout", "31 s", "at most 30 s"),
    ),
    "two steps of one name": ((GOOD + STEP).encode(), ("step[2].name", '"x"', "step[1]")),
    "nothing in it": (b"", ("update", "missing")),
    "no step": (UPDATE.encode(), ("the manifest is empty", "add a [[step]]")),
    "program that is missing": (
        GOOD.replace('"true"', '"no-such-program"').encode(),
        ("step 'x'", "run", "'no-such-program' is not installed"),
    ),
    "undo whose program is missing": (
        (GOOD + 'undo = ["no-such-program"]\n').encode(),
        ("step 'x'", "undo", "'no-such-program' is not installed"),
    ),
    "not UTF-8": (GOOD.encode() + b"# \xff\n", ("line 8", "0xff is not UTF-8")),
    "not TOML": ((GOOD + "run = [\n").encode(), ("not valid TOML", "line")),
    "too long": (GOOD.encode() + b"#" * (1 << 20), ("more than 1048576 bytes",)),
}  # fmt: skip


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_that_is_wrong(lab: Lab, manifest: Path, case: str) -> None:
    data, words = MANIFESTS[case]
    manifest.write_bytes(data)
    for options in ((), ("--dry-run",)):
        named = () if "is not installed" in words[-1] else (str(manifest),)
        ended = lab.run("apply", str(manifest), *options)
        assert_one_error(ended, *named, *words, "remedy: ")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.unlink(), "No such file or directory"),
        (lambda path: (path.unlink(), path.mkdir()), "Is a directory"),
    ],
)
def test_a_manifest_that_cannot_be_read(
    lab: Lab, manifest: Path, make: Callable[[Path], object], words: str
) -> None:
    make(manifest)
    assert_one_error(lab.run("apply", str(manifest)), str(manifest), words, "remedy: ")


# ---- the command line


@pytest.mark.parametrize("budget", ["-1s", "0s", "31s", "1h", "5", "soon", ""])
def test_a_budget_that_is_wrong(lab: Lab, manifest: Path, budget: str) -> None:
    ended = lab.run("apply", str(manifest), f"--budget={budget}")
    assert_one_error(ended, "command line: --budget", f"'{budget}'", "remedy: ")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--budget", "1s"), ("the blackout may last 1.2 s", "the budget is 1 s")),
        (("--budget", "100ms", "--pause-method", "stop"), ("the budget is 100 ms",)),
        (("--max-impact", "none"), ("impact pause is above the allowed none",)),
    ],
)
def test_an_update_beyond_its_limits_is_refused(
    lab: Lab, manifest: Path, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    ended = lab.run("apply", str(manifest), *options)
    assert_one_error(ended, *words, code=20, word="refused")
    as_json = lab.apply(manifest, *options)
    assert as_json.code == 20
    assert (as_json.data["outcome"], as_json.data["exit_code"]) == ("refused", 20)
    assert all(word in as_json.data["reasons"][0] for word in words)


def test_a_reboot_is_refused_with_every_reason(lab: Lab, manifest: Path) -> None:
    manifest.write_text(UPDATE + "reboot-only = true\n")
    ended = lab.run("apply", str(manifest), "--max-impact", "pause")
    assert ended.code == 20
    assert ended.err.count("refused: ") == 2


# ---- configuration


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[pause]\nmethd = 'stop'\n", ("pause.methd", "unknown key", "did you mean method?")),
        ("[pause]\nmethod = 'nap'\n", ("pause.method", '"nap" is not one of')),
        ("[budget]\nhost = '-3s'\n", ("budget.host", '"-3s"')),
        ("[budget]\nhost = '40s'\n", ("budget.host", '"40s"', "at most 30 s")),
        ("[deadlines]\nlibvirt = 5\n", ("deadlines.libvirt", "unit")),
        ("[residency]\nlock = 'yes'\n", ("residency.lock", '"yes"', "true or false")),
        ("[paths]\ncgroup2 = 'sys'\n", ("paths.cgroup2", '"sys"')),
        ("[paths\n", ("not valid TOML", "line 1")),
        (None, ("no such file",)),
    ],
)
def test_a_configuration_that_is_wrong(
    lab: Lab, manifest: Path, tmp_path: Path, text: str | None, words: tuple[str, ...]
) -> None:
    config = tmp_path / "hostupdate.toml"
    if text is not None:
        config.write_text(text)
    ended = lab.run("apply", str(manifest), "--config", str(config))
    assert_one_error(ended, str(config), *words, "remedy: ")


def test_a_cgroup_mount_that_is_none(lab: Lab, manifest: Path, tmp_path: Path) -> None:
    config = tmp_path / "hostupdate.toml"
    config.write_text(f"[paths]\ncgroup2 = '{tmp_path}'\n")
    ended = lab.run("apply", str(manifest), "--config", str(config))
    assert_one_error(ended, f"{tmp_path} is not a cgroup v2 mount", "paths.cgroup2")


# ---- URIs


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("qemu+ssh://root@host/system", ("leads to another host",)),
        ("qemu://host/system", ("leads to another host",)),
        ("test:///default", ("is not a QEMU driver", "qemu:///system")),
        ("xen:///", ("is not a QEMU driver",)),
        ("nonsense", ("is not a QEMU driver",)),
        ("qemu:///embed", ("names no root directory",)),
        ("qemu:///embed?root=relative", ("names no root directory",)),
        ("qemu:///embed?root=/nowhere/at/all", ("/nowhere/at/all", "no such directory")),
        ("qemu:///system?socket=/nowhere/at/all", ("/nowhere/at/all",)),
    ],
)
def test_a_uri_that_leads_to_no_guests_of_this_host(
    lab: Lab, manifest: Path, uri: str, words: tuple[str, ...]
) -> None:
    start_ns = time.monotonic_ns()
    ended = lab.run("apply", str(manifest), "--connect", uri)
    assert time.monotonic_ns() - start_ns < 10_000_000_000
    assert_one_error(ended, *words, "remedy: ")
    assert not Path("/nowhere").exists()


# ---- who runs it


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that everybody can read."""
    path = Path(tempfile.mkdtemp(prefix="hu-p-", dir="/var/tmp"))
    path.chmod(0o755)
    (path / "update.toml").write_text(GOOD)
    yield path
    shutil.rmtree(path)


def as_nobody(*arguments: str) -> Ended:
    need("root", "nobody")
    ended = subprocess.run(
        [*NOBODY, sys.executable, "-m", "hostupdate", *arguments],
        capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60, check=False,
        cwd="/",
    )  # fmt: skip
    return Ended(ended.returncode, ended.stdout, ended.stderr)


@pytest.mark.parametrize(
    "arguments",
    [("apply", "{public}/update.toml"), ("guests",), ("resume",), ("lab", "up"), ("lab", "down")],
)
def test_somebody_who_is_not_root(lab: Lab, public: Path, arguments: tuple[str, ...]) -> None:
    words = [word.format(public=public) for word in arguments]
    ended = as_nobody("--state", str(lab.run.state), "--connect", "lab", *words)
    assert_one_error(ended, "must be run as root", "remedy: run it with sudo")


@pytest.mark.parametrize("arguments", [("status",), ("report",), ("report", "--list")])
def test_a_state_that_is_not_ours_to_read_is_not_taken_for_an_empty_one(
    lab: Lab, public: Path, arguments: tuple[str, ...]
) -> None:
    closed = public / "state"
    closed.mkdir(mode=0o700)
    ended = as_nobody("--state", str(closed), *arguments)
    assert_one_error(ended, str(closed), "Permission denied", "remedy: run as root")


def test_somebody_who_is_not_root_can_ask_what_is_missing(public: Path) -> None:
    ended = as_nobody("--state", str(public), "--connect", "lab", "doctor")
    assert ended.code == 1
    assert "run it with sudo" in ended.out
    assert "Traceback" not in ended.err


# ---- the state directory


def elsewhere(lab: Lab, state: Path) -> Program:
    """The lab's guests with another state directory."""
    return Program(state).with_options("--connect", default_lab_uri(lab.run.state))


OTHER = '{"compatible": "hostupdate-pending-v9", "sha256": "", "record": {}}'
PENDING = {
    "damaged": ("{", "damaged"),
    "empty": ("", "damaged"),
    "of another version": (OTHER, "'hostupdate-pending-v9' is not"),
    "changed": (OTHER.replace("v9", "v1"), "is not that of the record"),
}


@pytest.mark.parametrize("what", PENDING)
@pytest.mark.parametrize("verb", ["apply", "resume", "status"])
def test_a_pending_record_that_cannot_be_understood(
    lab: Lab, manifest: Path, tmp_path: Path, verb: str, what: str
) -> None:
    """It may stand for paused guests: nothing goes on before somebody has looked."""
    text, words = PENDING[what]
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    pending = state / "pending.json"
    pending.write_text(text)
    arguments = ("apply", str(manifest)) if verb == "apply" else (verb,)
    ended = elsewhere(lab, state)(*arguments)
    assert_one_error(ended, str(pending), words, "remedy: ")
    assert pending.read_text() == text, "the record was changed"
    pending.unlink()  # else it stands in the way of every other run on this host
    assert not list(state.glob("runs/*"))


def test_a_dry_run_is_refused_too_where_guests_may_be_paused(
    lab: Lab, manifest: Path, tmp_path: Path
) -> None:
    (tmp_path / "pending.json").write_text("{")
    ended = elsewhere(lab, tmp_path)("apply", str(manifest), "--dry-run")
    assert_one_error(ended, str(tmp_path / "pending.json"), "damaged")


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    need("root")
    mount = tmp_path / "tiny"
    mount.mkdir()
    argv = ["mount", "-t", "tmpfs", "-o", "size=8m,mode=700", "hu-test", str(mount)]
    subprocess.run(argv, check=True, timeout=20)
    yield mount
    subprocess.run(["umount", str(mount)], check=True, timeout=20)


def fill(directory: Path) -> Path:
    """A file that leaves no room for another byte."""
    path = directory / "ballast"
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            pass
    return path


def test_a_state_on_a_full_file_system(lab: Lab, manifest: Path, tiny: Path) -> None:
    ballast = fill(tiny)
    ended = elsewhere(lab, tiny)("apply", str(manifest))
    assert_one_error(ended, str(tiny), "remedy: ", "--state")
    assert "disk is full" in ended.err or "No space left on device" in ended.err
    assert not (tiny / "pending.json").exists()
    ballast.unlink()
    assert elsewhere(lab, tiny)("apply", str(manifest)).code == 0


def test_a_file_system_too_small_for_a_run(lab: Lab, manifest: Path, tmp_path: Path) -> None:
    """What a run may have to write is taken before anything is touched."""
    mount = tmp_path / "small"
    mount.mkdir()
    argv = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "hu-test", str(mount)]
    subprocess.run(argv, check=True, timeout=20)
    try:
        ended = elsewhere(lab, mount)("apply", str(manifest))
        assert_one_error(ended, str(mount), "disk is full", "remedy: ", "--state")
        assert not (mount / "pending.json").exists()
    finally:
        subprocess.run(["umount", str(mount)], check=True, timeout=20)


JOURNALS = {
    "truncated": lambda data: data[: len(data) // 2],
    "foreign": lambda data: b"SQLite format 3\0" + bytes(4080),
    "overwritten": lambda data: b"\xa5" * len(data),
}


@pytest.mark.parametrize("what", JOURNALS)
def test_a_journal_that_is_not_one(lab: Lab, manifest: Path, tmp_path: Path, what: str) -> None:
    state = tmp_path / "state"
    program = elsewhere(lab, state)
    assert program("apply", str(manifest)).code == 0
    path = state / "journal.db"
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    bad = JOURNALS[what](path.read_bytes())
    path.write_bytes(bad)
    for arguments in (("apply", str(manifest)), ("report",), ("status",)):
        ended = program(*arguments)
        assert ended.code == (0 if arguments == ("status",) else 1), ended.err
        assert str(path) in ended.err and "remedy: " in ended.err
        assert "Traceback" not in ended.err
    assert path.read_bytes() == bad, "it was touched"
    assert not (state / "pending.json").exists()


def test_a_file_system_that_fills_up_in_the_run(lab: Lab, manifest: Path, tiny: Path) -> None:
    """The update is made and shown; that its report is not kept is said."""
    flood = f"cat /dev/zero > {tiny}/ballast; true"
    manifest.write_text(
        UPDATE + f'[[step]]\nname = "x"\nphase = "blackout"\nrun = ["sh", "-c", "{flood}"]\n'
        'timeout = "5s"\n'
    )
    program = elsewhere(lab, tiny)
    ended = program("apply", str(manifest), "--json", "--yes")
    assert "Traceback" not in ended.err
    assert ended.code == 30, ended.err
    assert (ended.data["outcome"], ended.data["exit_code"]) == ("degraded", 30)
    assert any("No space left on device" in reason for reason in ended.data["reasons"])
    assert {guest["state_after"] for guest in ended.data["guests"]} == {"running"}
    assert not (tiny / "pending.json").exists()


def test_a_state_on_a_read_only_file_system(lab: Lab, manifest: Path, tiny: Path) -> None:
    remount = ["mount", "-o", "remount,ro", str(tiny)]
    subprocess.run(remount, check=True, timeout=20)
    ended = elsewhere(lab, tiny)("apply", str(manifest))
    assert_one_error(ended, str(tiny), "Read-only file system", "remedy: ", "--state")
    assert elsewhere(lab, tiny)("resume").code == 0, "there is nothing to resume"
    ended = Program(tiny)("lab", "up")
    assert_one_error(ended, str(tiny), "Read-only file system", "remedy: ")
    assert os.listdir(tiny) == []


def test_reading_needs_no_writing(lab: Lab, tiny: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(tiny)], check=True, timeout=20)
    program = elsewhere(lab, tiny)
    assert program("status").code == 0
    assert program("report", "--list").code == 0
    assert program("guests").code == 0


# ---- the rest


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("report", "19991231"), ("'19991231' names 0 runs",)),
        (("lab", "up", "--memory", "lots"), ("--memory", "'lots' is not a size")),
        (("lab", "up", "--memory", "16M"), ("at least 160 MiB",)),
        (("lab", "up", "--connect", "qemu:///system"), ("is not an embedded driver",)),
    ],
)
def test_other_verbs(
    lab: Lab, manifest: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    assert lab.apply(manifest).code == 0  # so that there is a run
    ended = lab.run(*arguments)
    assert_one_error(ended, *words, "remedy: ")
