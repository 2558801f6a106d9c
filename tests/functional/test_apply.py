"""A host update under paused guests, end to end, on real guests."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from tests.functional.cli import Lab

Write = Callable[..., Path]

STAGE = '[[step]]\nname = "fetch"\nphase = "stage"\nrun = ["touch", "{dir}/fetched"]\n'
CHANGE = """[[step]]
name = "change"
phase = "blackout"
run = ["sh", "-c", "cp {dir}/fetched {dir}/changed && sleep 0.3"]
undo = ["rm", "-f", "{dir}/changed"]
timeout = "3s"
verify = ["test", "-e", "{dir}/changed"]
"""
FINISH = '[[step]]\nname = "tidy"\nphase = "finish"\nrun = ["rm", "{dir}/fetched"]\n'


@pytest.fixture
def manifest(tmp_path: Path, write_manifest: Write) -> Path:
    return write_manifest(*(part.format(dir=tmp_path) for part in (STAGE, CHANGE, FINISH)))


@pytest.mark.parametrize("method", ["freeze", "stop"])
def test_an_update_is_made_while_guests_are_paused(
    lab: Lab, manifest: Path, tmp_path: Path, method: str
) -> None:
    ended = lab.apply(manifest, "--pause-method", method)
    assert ended.code == 0, ended.err
    report = ended.data
    assert (tmp_path / "changed").exists()
    assert not (tmp_path / "fetched").exists()
    assert report["schema"] == "hostupdate-report-v1"
    assert (report["outcome"], report["exit_code"], report["method"]) == ("ok", 0, method)
    assert report["impact"] == {"requested": "auto", "judged": "pause", "actual": "pause"}
    assert [guest["name"] for guest in report["guests"]] == list(lab.names)
    for guest in report["guests"]:
        assert guest["impact"] == "pause"
        assert (guest["state_before"], guest["state_after"]) == ("running", "running")
        assert 300_000_000 <= guest["blackout_ns"] <= report["blackout_ns"] <= report["budget_ns"]
        residency = guest["residency"]
        assert residency["major_faults"] == 0
        assert residency["swapped_in_bytes"] == residency["swapped_out_bytes"] == 0
        assert residency["ram_bytes"] >= 192 << 20
        assert 0 < residency["resident_bytes"] <= residency["ram_bytes"]
        assert residency["protection"] in ("locked", "memory.min")
        assert residency["digest_equal"] is True, residency["digest_reason"]
        assert residency["digest_pages"] > 0
        assert guest["clock"]["problem"] == ""
        assert None not in guest["clock"].values()
    assert [step["exit"] for step in report["steps"]] == [0, 0, 0]
    assert 0 <= report["spread_ns"] <= report["stop_all_ns"]


def test_the_consoles_see_a_freeze_as_a_gap_and_go_on(lab: Lab, manifest: Path) -> None:
    from hostupdate.lab import console

    before = {name: console.last_tick(lab.console(name)) for name in lab.names}
    report = lab.apply(manifest, "--pause-method", "freeze").data
    lab.assert_healthy()
    for guest in report["guests"]:
        first = before[guest["name"]]
        assert first is not None
        seen = console.ticks(lab.console(guest["name"]), after_seq=first.seq - 1)
        gap_ns = max(b.monotonic_ns - a.monotonic_ns for a, b in pairwise(seen))
        # Frozen, the guest's clock runs on: its own gap is at least what we say the blackout was.
        assert gap_ns >= 300_000_000
        assert [tick.seq for tick in seen] == list(range(first.seq, first.seq + len(seen)))


def test_dry_run_prints_what_apply_then_does(lab: Lab, manifest: Path, tmp_path: Path) -> None:
    dry = lab.apply(manifest, "--dry-run")
    assert dry.code == 0, dry.err
    assert not (tmp_path / "fetched").exists(), "a dry run ran a step"
    planned = [action["title"] for action in dry.data["actions"]]
    done = lab.apply(manifest).data
    assert done["actions"] == planned
    assert done["predicted_blackout_ns"] == dry.data["predicted_blackout_ns"]
    text = lab.run("apply", str(manifest), "--dry-run").out
    positions = [text.index(f". {title}") for title in planned]
    assert positions == sorted(positions)
    assert f"cp {tmp_path}/fetched" in text
    assert f"undo: run rm -f {tmp_path}/changed" in text


def test_an_update_that_needs_no_pause_pauses_nobody(
    lab: Lab, tmp_path: Path, write_manifest: Write
) -> None:
    report = lab.apply(write_manifest(STAGE.format(dir=tmp_path))).data
    assert report["impact"]["actual"] == "none"
    assert report["blackout_ns"] is None
    assert (tmp_path / "fetched").exists()


def test_a_full_digest_reads_all_of_the_ram(lab: Lab, manifest: Path) -> None:
    report = lab.apply(manifest, "--verify-ram", "full").data
    sampled = lab.apply(manifest, "--verify-ram", "sample").data
    for full, some in zip(report["guests"], sampled["guests"], strict=True):
        assert full["residency"]["digest_equal"] is True
        assert full["residency"]["digest_pages"] > some["residency"]["digest_pages"]
    off = lab.apply(manifest, "--verify-ram", "off").data
    for guest in off["guests"]:
        assert guest["residency"]["digest_equal"] is None
        assert guest["residency"]["digest_reason"] == "switched off"


def test_a_guest_paused_by_its_owner_stays_paused(lab: Lab, manifest: Path, suspended: str) -> None:
    report = lab.apply(manifest).data
    guests = {guest["name"]: guest for guest in report["guests"]}
    assert report["exit_code"] == 0
    assert guests[suspended]["impact"] == "none"
    assert guests[suspended]["blackout_ns"] is None
    shown = {row["name"]: row["state"] for row in lab.run("guests", "--json").data["guests"]}
    assert shown[suspended] == "paused"


def test_without_cgroup2_guests_are_stopped_by_signals_and_it_is_said(
    lab: Lab, manifest: Path, tmp_path: Path
) -> None:
    config = tmp_path / "hostupdate.toml"
    config.write_text('[paths]\ncgroup2 = "none"\n')
    ended = lab.apply(manifest, "--config", str(config))
    assert ended.code == 0, ended.err
    assert {guest["frozen_by"] for guest in ended.data["guests"]} == {"signal"}
    assert any("SIGSTOP" in reason for reason in ended.data["reasons"])


def test_the_report_is_kept_and_shown(lab: Lab, manifest: Path) -> None:
    report = lab.apply(manifest).data
    assert lab.run("report", "--json").data == report
    assert lab.run("report", report["run_id"], "--json").data == report
    assert lab.run("status", "--json").data["last"] == report
    text = lab.run("report").out
    for word in (report["run_id"], "blackout", *lab.names, "equal"):
        assert word in text
    listed = lab.run("report", "--list", "--json").data["runs"]
    assert report["run_id"] in [run["run_id"] for run in listed]


def test_guests_shows_how_each_can_be_paused(lab: Lab) -> None:
    rows = lab.run("guests", "--json").data["guests"]
    assert [row["name"] for row in rows] == list(lab.names)
    for row in rows:
        assert row["pausable"] is True
        assert row["pid"] > 0
        assert row["digest"] is True
    text = lab.run("guests").out
    assert all(name in text for name in lab.names)
