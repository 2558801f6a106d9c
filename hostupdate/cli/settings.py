"""Options that every verb takes, before or after its name."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec
from click.core import ParameterSource

from hostupdate.config import WORKERS_MAX, Config, decode_config
from hostupdate.errors import InputError

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_URI = "qemu:///system"
DEFAULT_STATE = Path("/var/lib/hostupdate")
DEFAULT_CONFIG = Path("/etc/hostupdate/hostupdate.toml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the global options say. ``connect`` None: not given."""

    connect: str | None = None
    state: Path = DEFAULT_STATE
    config: Path | None = None
    json: bool = False
    verbose: int = 0
    quiet: bool = False

    @property
    def uri(self) -> str:
        """The hypervisor's URI; ``lab`` is short for the lab's guests."""
        from hostupdate.guests import default_lab_uri

        if self.connect == "lab":
            return default_lab_uri(self.state)
        return self.connect or DEFAULT_URI

    def load_config(self) -> Config:
        """Reads the configuration, with workers for this host's cores where it names none. A file
        named by --config must exist, the default may not."""
        main = self.config or DEFAULT_CONFIG
        if self.config is not None and not main.exists():
            raise InputError(str(main), "", "no such file", remedy="correct --config")
        paths = [main] if main.exists() else []
        paths += sorted((main.parent / "conf.d").glob("*.toml"))
        config = decode_config([(str(path), read_file(path)) for path in paths])
        workers = config.handover.workers or min(WORKERS_MAX, len(os.sched_getaffinity(0)))
        handover = msgspec.structs.replace(config.handover, workers=workers)
        return msgspec.structs.replace(config, handover=handover)


def read_file(path: Path) -> bytes:
    """A file from outside; InputError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            str(path), "", error.strerror or "cannot be read", remedy="check the path and its mode"
        ) from error


def global_options(command: F) -> F:
    """Adds the global options to a verb; what is given after it wins over what stands before."""

    @click.option("--connect", "-c", metavar="URI", help="libvirt URI, or 'lab'.")
    @click.option(
        "--state",
        type=click.Path(path_type=Path, file_okay=False, readable=False),
        envvar="HOSTUPDATE_STATE",
        help=f"State directory [default: {DEFAULT_STATE}].",
    )
    @click.option(
        "--config",
        type=click.Path(path_type=Path, dir_okay=False, readable=False),
        help=f"Configuration file [default: {DEFAULT_CONFIG}].",
    )
    @click.option("--json", "json_", is_flag=True, help="One JSON document on stdout.")
    @click.option("-v", "--verbose", count=True, help="Say more, on stderr.")
    @click.option("-q", "--quiet", is_flag=True, help="Say nothing but results and errors.")
    @functools.wraps(command)
    def wrapper(
        *args: Any,
        connect: str | None,
        state: Path | None,
        config: Path | None,
        json_: bool,
        verbose: int,
        quiet: bool,
        **rest: Any,
    ) -> Any:
        context = click.get_current_context()
        if context.parent is not None and (
            context.get_parameter_source("state") is ParameterSource.ENVIRONMENT
        ):
            state = None  # the program's own context has it, unless an option overruled it there
        settings = context.find_object(Settings) or Settings()
        settings = replace(
            settings,
            connect=connect or settings.connect,
            state=state.absolute() if state is not None else settings.state,
            config=config.absolute() if config is not None else settings.config,
            json=json_ or settings.json,
            verbose=verbose or settings.verbose,
            quiet=quiet or settings.quiet,
        )
        context.obj = settings
        level = logging.DEBUG if settings.verbose > 1 else logging.INFO
        logging.basicConfig(
            level=level if settings.verbose else logging.WARNING,
            format="%(name)s: %(message)s",
            force=True,
        )
        if not settings.verbose:  # it warns of what its caller is told by an exception
            logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)
        return command(*args, **rest)

    return wrapper  # type: ignore[return-value]


pass_settings = click.make_pass_decorator(Settings)
