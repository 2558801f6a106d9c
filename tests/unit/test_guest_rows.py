"""What ``hostupdate guests`` shows of a guest."""

from __future__ import annotations

import pytest

from hostupdate.cli.guests import GuestRow, _row, print_rows
from hostupdate.eligibility import Blocker, Eligibility
from hostupdate.model import GuestState
from tests.unit.fakes import located

MEMFD = Blocker(reason="RAM pc.ram is a memfd", remedy="give it a file", by_restart=True)
PCI = Blocker(reason="host device (pci) cannot be handed over", remedy="detach it")
SCREEN = Blocker(reason="viewers of its screen (vnc) are disconnected", remedy="none needed")


def row(name: str, found: Eligibility | None, **more: object) -> GuestRow:
    return _row(located(name, **more), found, cgroup2=True, lock=True)  # type: ignore[arg-type]


def shown(capsys: pytest.CaptureFixture[str], *rows: GuestRow) -> list[str]:
    print_rows(rows)
    return capsys.readouterr().out.splitlines()


def test_the_table_fits_80_columns_and_remarks_stand_below(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    name = "a-name-of-17-char"
    bad = Eligibility(blockers=(MEMFD, PCI), warnings=(SCREEN,))
    good = Eligibility(blockers=(), warnings=(SCREEN,))
    lines = shown(
        capsys, row(name, bad), row("good", good), row("off", None, state=GuestState.SHUTOFF)
    )
    assert lines[0].split() == [
        *("guest", "state", "memory", "vcpus"),
        *("pid", "pause", "handover", "kept", "by"),
    ]
    table = [line.split() for line in lines[1:4]]
    assert [(line[0], line[-2]) for line in table] == [(name, "no"), ("good", "yes"), ("off", "-")]
    assert all(len(line.rstrip()) <= 80 for line in lines[:4])
    assert lines[4:] == [
        f"{name}: no handover: RAM pc.ram is a memfd (give it a file)",
        f"{name}: no handover: host device (pci) cannot be handed over (detach it)",
        f"{name}: `hostupdate prepare-guest {name}` shows what to change",
        "good: in a handover viewers of its screen (vnc) are disconnected",
    ]


def test_a_row_tells_blockers_with_their_remedies() -> None:
    found = row("g", Eligibility(blockers=(PCI,), warnings=())).handover
    assert found is not None and not found.eligible and found.blockers == (PCI,)
    assert row("g", None).handover is None
