"""The command line. Verbs live in a module each and are imported when they are called."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import NoReturn

import click

from hostupdate import __version__
from hostupdate.cli.settings import global_options
from hostupdate.errors import (
    BusyError,
    GuestError,
    HostUpdateError,
    RefusedError,
)
from hostupdate.model import ExitCode

#: verb -> (module, one line for --help). A verb's module is not imported to print the help.
_VERBS = {
    "apply": "Apply an update under the running guests.",
    "doctor": "Check what this host lacks, and say how to get it.",
    "guests": "Show the guests of this host and how each can be paused.",
    "lab": "Scratch guests to try things on.",
    "prepare-guest": "Make a guest's RAM one that can stay in place while its QEMU is replaced.",
    "report": "Show what a run did.",
    "resume": "Finish or undo an interrupted run: every guest runs again.",
    "status": "Show whether a run holds the host, and how the last one ended.",
}


class _Verbs(click.Group):
    def list_commands(self, _context: click.Context) -> list[str]:
        return sorted(_VERBS)

    def get_command(self, _context: click.Context, name: str) -> click.Command | None:
        if name not in _VERBS:
            return None
        command = import_module(f"hostupdate.cli.{name.replace('-', '_')}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, _context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(sorted(_VERBS.items()))


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="hostupdate")
@global_options
def cli() -> None:
    """Update a Linux/KVM host under its running guests.

    Guests pause, their memory stays in the host's RAM, the host is updated, guests run again
    within 30 seconds.

    \b
    Exit codes: 0 ok or nothing to do, 1 error (nothing happened), 2 usage, 20 refused,
    30 applied but degraded, 40 failed (guests safe), 50 a guest needs a human,
    75 another run holds the host.
    """


def main() -> None:
    """The program: runs a verb, prints what it raised, exits with the documented code."""
    try:
        cli.main(prog_name="hostupdate", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(ExitCode.USAGE)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(ExitCode.ERROR)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(ExitCode.ERROR)
    except HostUpdateError as error:
        _fail(error)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        remedy = "check the path and its mode"
        _fail(HostUpdateError(f"{where}{error.strerror or error}", remedy=remedy))


def _fail(error: HostUpdateError) -> NoReturn:
    from hostupdate.cli.terminal import print_error, print_json

    code = _exit_code(error)
    if "--json" in sys.argv:
        document = {"schema": "hostupdate-error-v1", "exit_code": int(code)}
        print_json(document | {"error": str(error), "remedy": error.remedy})
    print_error(error)
    sys.exit(code)


def _exit_code(error: HostUpdateError) -> ExitCode:
    match error:
        case BusyError():
            return ExitCode.BUSY
        case RefusedError():
            return ExitCode.REFUSED
        case GuestError():
            return ExitCode.REFUSED
        case _:
            return ExitCode.ERROR
