"""Where guests live in a cgroup tree: read from directories that look like one."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from hostupdate.errors import GuestError, PrerequisiteError
from hostupdate.host import cgroups as module
from hostupdate.host.cgroups import Cgroups, find_cgroup2

SCOPE = r"/machine.slice/machine-qemu\x2d1\x2dweb.scope"


class Tree:
    """A directory tree with the files of cgroup v2."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.cgroups = Cgroups(root)
        (root / "cgroup.procs").write_text("")

    def add(self, cgroup: str, *, procs: tuple[int, ...] = (), **files: str) -> Path:
        directory = self.root / cgroup.lstrip("/")
        directory.mkdir(parents=True, exist_ok=True)
        contents = {
            "cgroup.procs": "".join(f"{pid}\n" for pid in procs),
            "cgroup.type": "domain\n",
            "cgroup.events": "populated 1\nfrozen 0\n",
            "cgroup.freeze": "0\n",
        } | {name.replace("_", "."): text for name, text in files.items()}
        for name, text in contents.items():
            (directory / name).write_text(text)
        return directory

    def text(self, cgroup: str, name: str) -> str:
        return (self.root / cgroup.lstrip("/") / name).read_text()


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


@pytest.fixture
def lives_in(monkeypatch: pytest.MonkeyPatch) -> dict[int, str]:
    """pid -> the cgroup that its /proc/PID/cgroup shows, beside two v1 hierarchies."""
    homes: dict[int, str] = {}

    def fake_open(path: str, **_: object) -> io.StringIO:
        pid = int(path.split("/")[2])
        return io.StringIO(f"9:name=systemd:/x\n1:cpu:/\n0::{homes[pid]}\n")

    monkeypatch.setattr(module, "open", fake_open, raising=False)
    return homes


# ---- whose cgroup


def test_the_scope_is_found_above_libvirts_threaded_children(
    tree: Tree, lives_in: dict[int, str]
) -> None:
    tree.add(SCOPE, procs=(7,))
    tree.add(f"{SCOPE}/libvirt", cgroup_type="domain threaded\n")
    tree.add(f"{SCOPE}/libvirt/emulator", cgroup_type="threaded\n")
    lives_in[7] = f"{SCOPE}/libvirt/emulator"
    assert tree.cgroups.of_process(7) == SCOPE


def test_a_scope_without_libvirts_child_is_found_too(tree: Tree, lives_in: dict[int, str]) -> None:
    tree.add(SCOPE)
    tree.add(f"{SCOPE}/vcpu0", cgroup_type="threaded\n")
    lives_in[7] = f"{SCOPE}/vcpu0"
    assert tree.cgroups.of_process(7) == SCOPE


def test_a_process_in_a_domain_cgroup_is_where_it_is(tree: Tree, lives_in: dict[int, str]) -> None:
    tree.add("/user.slice/session-1.scope")
    lives_in[7] = "/user.slice/session-1.scope"
    assert tree.cgroups.of_process(7) == "/user.slice/session-1.scope"
    lives_in[8] = "/"
    assert tree.cgroups.of_process(8) == "/"


def test_the_root_is_everybodys(tree: Tree) -> None:
    assert tree.cgroups.is_shared("/", 7)


@pytest.mark.parametrize("scope", [SCOPE, "/machine/web.libvirt-qemu"])
def test_a_scope_of_libvirts_is_the_guests_helpers_included(tree: Tree, scope: str) -> None:
    tree.add(scope, procs=(7, 8))
    assert not tree.cgroups.is_shared(scope, 7)


def test_any_other_cgroup_is_the_guests_only_where_it_is_alone(tree: Tree) -> None:
    tree.add("/alone", procs=(7,))
    assert not tree.cgroups.is_shared("/alone", 7)
    tree.add("/together", procs=(7, 8))
    assert tree.cgroups.is_shared("/together", 7)


def test_a_process_further_below_shares_too(tree: Tree) -> None:
    tree.add("/top", procs=(7,))
    tree.add("/top/below/deep", procs=(9,))
    assert tree.cgroups.processes("/top") == {7, 9}
    assert tree.cgroups.is_shared("/top", 7)


def test_threaded_children_that_list_no_processes_are_passed_over(tree: Tree) -> None:
    tree.add("/top", procs=(7,))
    (tree.add("/top/vcpu0") / "cgroup.procs").unlink()
    assert tree.cgroups.processes("/top") == {7}


def test_frozen_is_what_cgroup_events_says(tree: Tree) -> None:
    tree.add("/a", cgroup_events="populated 1\nfrozen 1\n")
    tree.add("/b")
    assert tree.cgroups.is_frozen("/a")
    assert not tree.cgroups.is_frozen("/b")
    assert not tree.cgroups.is_frozen("/")
    assert not tree.cgroups.is_frozen("/nowhere")


def test_the_memory_controller_shows_by_its_files(tree: Tree) -> None:
    tree.add("/with", memory_min="0\n")
    tree.add("/without")
    assert tree.cgroups.has_memory("/with")
    assert not tree.cgroups.has_memory("/without")


# ---- memory.min


def test_each_guest_and_every_cgroup_above_it_gets_enough(tree: Tree) -> None:
    for cgroup in ("/m.slice", "/m.slice/a", "/m.slice/b"):
        tree.add(cgroup, memory_min="0\n")
    changes = tree.cgroups.memory_min_changes([("/m.slice/a", 100), ("/m.slice/b", 30)])
    assert changes == {
        "/m.slice": ("0", "130"),
        "/m.slice/a": ("0", "100"),
        "/m.slice/b": ("0", "30"),
    }


def test_no_protection_is_ever_lowered(tree: Tree) -> None:
    tree.add("/m.slice", memory_min="max\n")
    tree.add("/m.slice/a", memory_min="500\n")
    tree.add("/m.slice/b", memory_min="10\n")
    wanted = [("/m.slice/a", 100), ("/m.slice/b", 30)]
    assert tree.cgroups.memory_min_changes(wanted) == {"/m.slice/b": ("10", "30")}


def test_a_cgroup_without_the_controller_is_left_out(tree: Tree) -> None:
    tree.add("/m.slice")
    tree.add("/m.slice/a", memory_min="0\n")
    assert tree.cgroups.memory_min_changes([("/m.slice/a", 100)]) == {"/m.slice/a": ("0", "100")}
    assert tree.cgroups.memory_min_changes([("/m.slice/gone", 100)]) == {}


def test_what_was_raised_is_put_back_exactly(tree: Tree) -> None:
    for cgroup in ("/m.slice", "/m.slice/a"):
        tree.add(cgroup, memory_min="7\n")
    changes = tree.cgroups.memory_min_changes([("/m.slice/a", 100)])
    tree.cgroups.set_memory_min({cgroup: new for cgroup, (_, new) in changes.items()})
    assert tree.text("/m.slice/a", "memory.min").startswith("100")
    tree.cgroups.set_memory_min({cgroup: old for cgroup, (old, _) in changes.items()})
    assert tree.text("/m.slice/a", "memory.min").startswith("7")


def test_a_cgroup_that_is_gone_needs_no_memory_min_back(tree: Tree) -> None:
    tree.cgroups.set_memory_min({"/gone": "0"})


def test_current_memory_is_a_number_even_where_there_is_none(tree: Tree) -> None:
    tree.add("/a", memory_current="4096\n")
    assert tree.cgroups.memory_current("/a") == 4096
    assert tree.cgroups.memory_current("/nowhere") == 0


# ---- a cgroup of its own


def test_isolating_where_the_kernel_refuses_is_an_error_that_names_both_places(tree: Tree) -> None:
    # A plain directory has no cgroup.procs to write to, as a kernel that refuses.
    with pytest.raises(GuestError, match=r"moved from cgroup /home to /hostupdate/u-1") as failed:
        tree.cgroups.isolate(7, "/home", "u-1")
    assert failed.value.guest == "u-1"
    assert not (tree.root / "hostupdate").exists(), "our cgroup was left behind"


def test_going_home_thaws_first_and_moves_the_process(tree: Tree) -> None:
    tree.add("/hostupdate/u-1", cgroup_freeze="1\n")
    tree.add("/home")
    tree.cgroups.restore(7, "/hostupdate/u-1", "/home")
    assert tree.text("/hostupdate/u-1", "cgroup.freeze").startswith("0")
    assert tree.text("/home", "cgroup.procs").startswith("7")


def test_a_home_that_is_gone_is_replaced_by_the_nearest_above(tree: Tree) -> None:
    tree.add("/hostupdate/u-1")
    tree.add("/m.slice")
    tree.cgroups.restore(7, "/hostupdate/u-1", "/m.slice/gone/deeper")
    assert tree.text("/m.slice", "cgroup.procs").startswith("7")
    tree.cgroups.restore(8, "/hostupdate/u-1", "/nothing/left")
    assert tree.text("/", "cgroup.procs").startswith("8")


def test_a_process_that_is_gone_is_not_moved(tree: Tree) -> None:
    tree.add("/hostupdate/u-1")
    tree.add("/home")
    tree.cgroups.restore(None, "/hostupdate/u-1", "/home")
    assert tree.text("/home", "cgroup.procs") == ""


def test_going_home_twice_does_nothing_the_second_time(tree: Tree) -> None:
    tree.cgroups.restore(7, "/hostupdate/never-made", "/home")


def test_thawing_what_is_gone_is_no_error(tree: Tree) -> None:
    tree.cgroups.thaw("/gone")
    tree.add("/a", cgroup_freeze="1\n")
    tree.cgroups.thaw("/a")
    assert tree.text("/a", "cgroup.freeze").startswith("0")


# ---- the mount


def test_a_configured_mount_must_be_one(tree: Tree, tmp_path: Path) -> None:
    assert find_cgroup2(str(tree.root)) == tree.root
    assert find_cgroup2("none") is None
    with pytest.raises(PrerequisiteError, match="not a cgroup v2 mount") as error:
        find_cgroup2(str(tmp_path / "elsewhere"))
    assert error.value.remedy == "correct paths.cgroup2"


@pytest.mark.parametrize(
    ("mountinfo", "found"),
    [
        ("31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n", None),
        ("32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n", None),
        (
            "32 31 0:29 / /c/cpu rw shared:1 - cgroup cgroup rw\n"
            "38 31 0:38 / /sys/fs/cgroup/unified rw shared:5 master:2 - cgroup2 cgroup2 rw\n",
            Path("/sys/fs/cgroup/unified"),
        ),
        ("9 1 0:5 / /with\\040space rw - cgroup2 none rw\n", Path("/with space")),
    ],
)
def test_the_mount_is_found_in_mountinfo(
    monkeypatch: pytest.MonkeyPatch, mountinfo: str, found: Path | None
) -> None:
    monkeypatch.setattr(module, "open", lambda *_, **__: io.StringIO(mountinfo), raising=False)
    assert find_cgroup2() == found
