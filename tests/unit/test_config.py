"""The configuration: its defaults, how files are merged, and what mistakes are answered with."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from hostupdate.config import (
    Budget,
    Clock,
    Config,
    Deadlines,
    Paths,
    Pause,
    Residency,
    decode_config,
)
from hostupdate.errors import InputError

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
MAIN, EXTRA = "/etc/hostupdate/hostupdate.toml", "/etc/hostupdate/conf.d/50-site.toml"


def test_the_defaults() -> None:
    assert (
        decode_config([])
        == Config()
        == Config(
            pause=Pause(
                method="auto", freeze_limit_ns=10_000_000_000, stop_timeout_ns=5_000_000_000
            ),
            budget=Budget(host_ns=30_000_000_000),
            deadlines=Deadlines(
                libvirt_ns=5_000_000_000,
                recovery_libvirt_ns=2_000_000_000,
                keeper_grace_ns=2_000_000_000,
            ),
            residency=Residency(verify_ram="sample", lock=True),
            clock=Clock(
                tolerance_ns=1_000_000,
                correct="all",
                require=False,
                trust_host=False,
                hold_network=False,
                guest_exec=False,
                timeout_ns=10_000_000_000,
            ),
            paths=Paths(cgroup2=""),
        )
    )


def test_empty_files_change_nothing() -> None:
    assert decode_config([(MAIN, b""), (EXTRA, b"# nothing\n[pause]\n")]) == Config()


def test_later_files_win_key_by_key() -> None:
    config = decode_config(
        [
            (MAIN, b'[pause]\nmethod = "stop"\nfreeze-limit = "3s"\n[residency]\nlock = false'),
            (EXTRA, b'[pause]\nmethod = "freeze"\n[paths]\ncgroup2 = "none"'),
        ]
    )
    assert config == Config(
        pause=Pause(method="freeze", freeze_limit_ns=3_000_000_000),
        residency=Residency(lock=False),
        paths=Paths(cgroup2="none"),
    )


def test_the_file_with_the_mistake_is_named() -> None:
    good, bad = b'[budget]\nhost = "20s"', b'[budget]\nhost = "40s"'
    for documents, source in (
        ([(MAIN, good), (EXTRA, bad)], EXTRA),
        ([(MAIN, bad), (EXTRA, good)], MAIN),  # even though a later file overrides it
    ):
        with pytest.raises(InputError) as caught:
            decode_config(documents)
        assert caught.value.source == source
        assert str(caught.value).startswith(f'{source}: budget.host: "40s" is not a duration of')
        assert "at most 30 s" in caught.value.remedy


@pytest.mark.parametrize(
    ("text", "field", "problem", "remedy"),
    [
        ("[windows]\n", "windows", 'unknown key "windows"', "valid keys: pause, budget, deadlines"),
        ("pause = 1\n", "pause", "1 is not a table", "a table"),
        (
            '[pause]\nfreeze_limit = "5s"\n',
            "pause.freeze_limit",
            'unknown key "freeze_limit"',
            "did you mean freeze-limit? valid keys: method, freeze-limit, stop-timeout",
        ),
        (
            '[pause]\nmethod = "suspend"\n',
            "pause.method",
            '"suspend" is not one of "auto", "freeze", "stop"',
            '"auto", "freeze", "stop"',
        ),
        ("[pause]\nfreeze-limit = 10\n", "pause.freeze-limit", "10 has no unit", '"5s"'),
        ('[pause]\nstop-timeout = "31s"\n', "pause.stop-timeout", '"31s" is not', "30 s"),
        ('[deadlines]\nlibvirt = "0s"\n', "deadlines.libvirt", '"0s" is not', "at most 60 s"),
        ('[deadlines]\nkeeper-grace = "11s"\n', "deadlines.keeper-grace", '"11s" is', "10 s"),
        (
            '[residency]\nverify-ram = "sampled"\n',
            "residency.verify-ram",
            '"sampled" is not one of',
            '"sample"',
        ),
        ('[residency]\nlock = "yes"\n', "residency.lock", '"yes" is not true or', "true or false"),
        (
            '[paths]\ncgroup2 = "sys/fs/cgroup"\n',
            "paths.cgroup2",
            '"sys/fs/cgroup" is not an absolute path, "none" or ""',
            '"/sys/fs/cgroup"',
        ),
        ("[pause\n", "", 'line 1, column 7): "[pause"', "correct the line"),
        ("x = 1979-05-27\n", "x", 'unknown key "x"', "valid keys"),
    ],
)
def test_each_mistake_is_named(text: str, field: str, problem: str, remedy: str) -> None:
    with pytest.raises(InputError) as caught:
        decode_config([(MAIN, b""), (EXTRA, text.encode())])
    assert (caught.value.source, caught.value.field) == (EXTRA, field)
    assert problem in caught.value.problem
    assert remedy in caught.value.remedy


def test_the_page_names_every_key() -> None:
    page = PAGE.read_text()
    for table in msgspec.structs.fields(Config):
        assert f"[{table.encode_name}]" in page
        for key in msgspec.structs.fields(table.type):
            assert f"`{key.encode_name}`" in page
