"""The command line by itself: options, documents, messages, exit codes. No guest, no libvirt."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import click
import pytest

from hostupdate import __version__, cli, errors
from hostupdate.cli.settings import Settings, global_options, pass_settings
from hostupdate.model import ExitCode
from tests.requirements import need

VERBS = ("apply", "doctor", "guests", "lab", "prepare-guest", "report", "resume", "status")
ESCAPE = "\x1b"


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


Call = Callable[..., Ended]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Calls the program in this process."""
    monkeypatch.delenv("HOSTUPDATE_STATE", raising=False)

    def call(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["hostupdate", *arguments])
        try:
            cli.main()
            code: object = 0
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        assert isinstance(code, int) or code is None
        return Ended(int(code or 0), captured.out, captured.err)

    return call


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[Settings], None]], None]]:
    """Makes a verb ``try`` of a function."""

    def make(body: Callable[[Settings], None]) -> None:
        module = ModuleType("hostupdate.cli.try")
        module.command = click.command("try")(global_options(pass_settings(body)))  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "hostupdate.cli.try", module)
        monkeypatch.setitem(cli._VERBS, "try", "A verb of the tests.")

    yield make


def run(*arguments: str, **environment: str) -> Ended:
    """Runs the program in a process of its own."""
    ended = subprocess.run(
        [sys.executable, "-m", "hostupdate", *arguments],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], **environment},
        stdin=subprocess.DEVNULL,
        timeout=60,
        check=False,
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr)


# ---- help and version


def test_help_lists_every_verb_and_the_exit_codes(call: Call) -> None:
    ended = call("--help")
    assert (ended.code, ended.err) == (0, "")
    assert sorted(cli._VERBS) == sorted(VERBS)
    for name in VERBS:
        assert re.search(rf"^  {name}  +\w", ended.out, re.MULTILINE)
    for code in ExitCode:
        assert re.search(rf"\b{int(code)}\b", ended.out), f"exit code {int(code)} is not told"


@pytest.mark.parametrize(
    "arguments", [*((name,) for name in VERBS), ("lab", "up"), ("lab", "down"), ("lab", "status")]
)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_verb_has_help_with_the_global_options(
    call: Call, arguments: tuple[str, ...], flag: str
) -> None:
    ended = call(*arguments, flag)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith(f"Usage: hostupdate {' '.join(arguments)}")
    for option in ("--connect", "--state", "--config", "--json", "--verbose", "--quiet", "--help"):
        assert option in ended.out


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['hostupdate', '--help']\n"
        "from hostupdate.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'libvirt', 'psutil', 'hostupdate._core', 'qemu.qmp', 'rich.table'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert ended.stderr == "[]\n"


def test_version(call: Call) -> None:
    assert call("--version") == Ended(0, f"hostupdate, version {__version__}\n", "")


# ---- usage


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("fly",), "No such command 'fly'"),
        (("--warp", "status"), "No such option"),
        (("status", "--warp"), "No such option"),
        (("status", "extra"), "unexpected extra argument"),
        (("apply",), "Missing argument 'MANIFEST'"),
        (("apply", "m", "--pause-method", "nap"), "'nap' is not one of"),
        (("apply", "m", "--max-impact", "much"), "'much' is not one of"),
        (("apply", "m", "--verify-ram", "some"), "'some' is not one of"),
        (("lab", "up", "--guests", "0"), "0 is not in the range"),
        (("lab", "up", "--guests", "two"), "'two' is not a valid integer"),
        (("--state",), "requires an argument"),
        (("--state", __file__, "status"), "is a file"),
    ],
)
def test_wrong_usage_is_told_on_stderr_with_exit_2(
    call: Call, arguments: tuple[str, ...], words: str
) -> None:
    ended = call(*arguments)
    assert (ended.code, ended.out) == (ExitCode.USAGE, "")
    assert words in ended.err
    assert "Error: " in ended.err


# ---- global options


def test_global_options_stand_before_or_after_the_verb(
    call: Call, verb: Callable[[Callable[[Settings], None]], None], tmp_path: Path
) -> None:
    seen: list[Settings] = []
    verb(seen.append)
    options = (
        "--state", str(tmp_path), "--connect", "lab", "--config", "c.toml", "--json", "-vv", "-q",
    )  # fmt: skip
    for arguments in ((*options, "try"), ("try", *options), (*options[:4], "try", *options[4:])):
        assert call(*arguments).code == 0
    expected = Settings(
        connect="lab",
        state=tmp_path,
        config=Path("c.toml").absolute(),
        json=True,
        verbose=2,
        quiet=True,
    )
    assert seen == [expected] * 3


def test_what_stands_after_the_verb_wins(
    call: Call, verb: Callable[[Callable[[Settings], None]], None]
) -> None:
    seen: list[Settings] = []
    verb(seen.append)
    call("--connect", "qemu:///one", "--state", "/one", "try", "--connect", "qemu:///two",
         "--state", "/two")  # fmt: skip
    assert (seen[0].uri, seen[0].state) == ("qemu:///two", Path("/two"))


def test_the_environment_names_the_state_unless_an_option_does(
    call: Call,
    verb: Callable[[Callable[[Settings], None]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Settings] = []
    verb(seen.append)
    call("try")
    monkeypatch.setenv("HOSTUPDATE_STATE", "/from/environment")
    for arguments in (("try",), ("--state", "/given", "try"), ("try", "--state", "/given")):
        call(*arguments)
    states = [str(settings.state) for settings in seen]
    assert states == ["/var/lib/hostupdate", "/from/environment", "/given", "/given"]


def test_lab_is_short_for_the_uri_of_the_labs_guests() -> None:
    assert Settings(connect="lab", state=Path("/s t")).uri == "qemu:///embed?root=/s%20t/lab"
    assert Settings().uri == "qemu:///system"


def test_a_relative_state_directory_is_made_absolute(
    call: Call,
    verb: Callable[[Callable[[Settings], None]], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The keeper changes to / and runs the recovery from there."""
    seen: list[Settings] = []
    verb(seen.append)
    monkeypatch.chdir(tmp_path)
    call("--state", "here", "--config", "c.toml", "try")
    assert seen[0].state == tmp_path / "here"


# ---- errors


def _classes(root: type[errors.HostUpdateError]) -> list[type[errors.HostUpdateError]]:
    found = [root]
    for child in root.__subclasses__():
        found += _classes(child)
    return found


EXAMPLES: dict[str, tuple[errors.HostUpdateError, ExitCode]] = {
    "HostUpdateError": (errors.HostUpdateError("it", remedy="mend"), ExitCode.ERROR),
    "InputError": (errors.InputError("f", "x.y", "it", remedy="mend"), ExitCode.ERROR),
    "ImageError": (errors.ImageError("f", "x", 8, "it", remedy="mend"), ExitCode.ERROR),
    "PrerequisiteError": (errors.PrerequisiteError("it", remedy="mend"), ExitCode.ERROR),
    "RefusedError": (errors.RefusedError(["it", "and that"], remedy="mend"), ExitCode.REFUSED),
    "BusyError": (errors.BusyError("run it, pid 1"), ExitCode.BUSY),
    "JournalError": (errors.JournalError("f", "it"), ExitCode.ERROR),
    "DeadlineError": (errors.DeadlineError("it", 10**9, remedy="mend"), ExitCode.ERROR),
    "CoreError": (errors.CoreError("it", 28, detail="mend"), ExitCode.ERROR),
    "HypervisorError": (errors.HypervisorError("it", remedy="mend"), ExitCode.ERROR),
    "GuestError": (errors.GuestError("g", "it", remedy="mend"), ExitCode.REFUSED),
    "StepError": (errors.StepError("s", "it"), ExitCode.ERROR),
    "Interrupted": (errors.Interrupted("it"), ExitCode.ERROR),
    "StopError": (errors.StopError("it", "hangs", late=("u",)), ExitCode.REFUSED),
    "AgentError": (errors.AgentError("it does not answer"), ExitCode.ERROR),
    "LabError": (errors.LabError("it", remedy="mend"), ExitCode.ERROR),
}


def test_every_class_of_error_has_an_example_here() -> None:
    ours = {kind.__name__ for kind in _classes(errors.HostUpdateError)
            if kind.__module__ == "hostupdate.errors"}  # fmt: skip
    assert ours == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("option", [(), ("--json",)])
def test_every_error_is_told_on_stderr_with_its_exit_code_and_remedy(
    call: Call,
    verb: Callable[[Callable[[Settings], None]], None],
    name: str,
    option: tuple[str, ...],
) -> None:
    error, code = EXAMPLES[name]

    def fail(_: Settings) -> None:
        raise error

    verb(fail)
    ended = call("try", *option)
    assert ended.code == code
    if option:
        document = json.loads(ended.out)
        assert document["schema"] == "hostupdate-error-v1"
        assert (document["exit_code"], document["error"]) == (code, str(error))
    else:
        assert ended.out == ""
    assert "Traceback" not in ended.err
    lines = ended.err.splitlines()
    word = "refused" if name == "RefusedError" else "error"
    assert lines[0].startswith(f"{word}: ")
    assert "it" in lines[0].split()[1:] or "it:" in lines[0] or "it," in lines[0]
    if error.remedy:
        assert lines[-1] == f"remedy: {error.remedy}"
    if isinstance(error, errors.RefusedError):
        assert lines[1] == "refused: and that"


def test_an_error_of_the_system_is_told_without_a_traceback(
    call: Call, verb: Callable[[Callable[[Settings], None]], None]
) -> None:
    def fail(_: Settings) -> None:
        raise OSError(30, "Read-only file system", "/var/lib/x")

    verb(fail)
    ended = call("try")
    assert (ended.code, ended.out) == (ExitCode.ERROR, "")
    assert ended.err.startswith("error: /var/lib/x: Read-only file system\n")


def test_text_from_outside_is_not_taken_for_markup(
    call: Call, verb: Callable[[Callable[[Settings], None]], None]
) -> None:
    def fail(_: Settings) -> None:
        raise errors.GuestError("[bold]web[/]", "[/nonsense] [link=x]", remedy="[red]x")

    verb(fail)
    ended = call("try")
    assert "guest [bold]web[/]: [/nonsense] [link=x]" in ended.err
    assert "remedy: [red]x" in ended.err


def test_a_reader_that_went_away_is_no_traceback(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(
        [sys.executable, "-m", "hostupdate", "--state", str(tmp_path), "status", "--json"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (ExitCode.ERROR, "")


# ---- documents


@pytest.mark.parametrize(
    ("arguments", "schema", "codes"),
    [
        (("status",), "hostupdate-status-v1", {0}),
        (("report", "--list"), "hostupdate-reports-v1", {0}),
        (("doctor", "--connect", "lab"), "hostupdate-doctor-v1", {0, 1}),
        (("resume",), "hostupdate-resume-v1", {0}),
        (("lab", "status"), "hostupdate-lab-v1", {0}),
        (("lab", "down"), "hostupdate-lab-v1", {0}),
    ],
)
def test_json_is_one_document_with_a_schema_and_nothing_else(
    tmp_path: Path, arguments: tuple[str, ...], schema: str, codes: set[int]
) -> None:
    if arguments[0] in ("resume", "lab"):
        need("root")
    for options in (("--json",), ("--json", "-vv")):
        ended = run("--state", str(tmp_path), *arguments, *options)
        assert ended.code in codes, ended.err
        assert json.loads(ended.out)["schema"] == schema
        if len(options) == 1:
            assert ended.err == ""


def test_every_finding_of_doctor_that_is_bad_has_a_remedy(tmp_path: Path) -> None:
    ended = run("--state", str(tmp_path), "doctor", "--connect", "lab", "--json")
    findings = json.loads(ended.out)["findings"]
    assert {"root", "cgroup v2 freezer", "libvirt", "QEMU"} <= {f["name"] for f in findings}
    for finding in findings:
        assert finding["grade"] == "ok" or finding["remedy"], finding
    missing = any(finding["grade"] == "missing" for finding in findings)
    assert ended.code == (1 if missing else 0)
    assert missing, "the lab of an empty state directory was found"


# ---- terminals


def _on_terminal(arguments: list[str], **environment: str) -> str:
    """What the program writes to a terminal that is both its stdout and its stderr."""
    main, side = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "hostupdate", *arguments],
        stdin=side,
        stdout=side,
        stderr=side,
        env={"PATH": os.environ["PATH"], "TERM": "xterm-256color", **environment},
    )
    os.close(side)
    said = b""
    try:
        while chunk := os.read(main, 4096):
            said += chunk
    except OSError:  # EIO: the other side has been closed
        pass
    os.close(main)
    assert process.wait(timeout=60) is not None
    return said.decode()


def test_no_escape_codes_where_there_is_no_terminal(tmp_path: Path) -> None:
    for arguments in (("status",), ("doctor", "--connect", "lab"), ("report",)):
        ended = run("--state", str(tmp_path), *arguments, TERM="xterm-256color")
        assert ESCAPE not in ended.out + ended.err


def test_colours_only_on_a_terminal_and_not_where_they_are_unwanted(tmp_path: Path) -> None:
    arguments = ["--state", str(tmp_path), "report"]
    colour = re.compile(r"\x1b\[[0-9;]*3[0-9]m")
    assert colour.search(_on_terminal(arguments))
    plain = _on_terminal(arguments, NO_COLOR="1")
    assert not colour.search(plain)
    assert "error:" in plain


# ---- completion


def test_the_shell_completes_verbs_and_options() -> None:
    program = Path(sys.executable).with_name("hostupdate")
    if not program.exists():
        pytest.skip("hostupdate is not installed as a program")

    def complete(words: str, number: int) -> list[str]:
        ended = subprocess.run(
            [program],
            capture_output=True,
            text=True,
            env={
                "PATH": os.environ["PATH"],
                "_HOSTUPDATE_COMPLETE": "bash_complete",
                "COMP_WORDS": words,
                "COMP_CWORD": str(number),
            },
            timeout=60,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
        return [line.partition(",")[2] for line in ended.stdout.splitlines()]

    assert complete("hostupdate ap", 1) == ["apply"]
    assert complete("hostupdate ", 1) == sorted(VERBS)
    assert complete("hostupdate lab ", 2) == ["down", "status", "up"]
    assert "--pause-method" in complete("hostupdate apply --pa", 2)
    assert complete("hostupdate apply --pause-method ", 3) == ["auto", "freeze", "stop"]
