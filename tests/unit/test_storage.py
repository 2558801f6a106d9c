"""Storage that answers, or not, and threads that cannot wake: real files and processes."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostupdate.host import threads
from hostupdate.host.storage import Storage
from tests import silent_fs
from tests.requirements import need

ME = os.getpid()
_SOON_NS = 500_000_000
_LONG_NS = 20_000_000_000

#: ``vfork`` keeps the parent in an uninterruptible sleep until its child ends.
_ASLEEP = """
#include <unistd.h>
int main(void)
{
        char byte;
        if (!vfork()) {
                if (write(1, "x", 1) == 1)
                        _exit(read(0, &byte, 1) < 0);
        }
        pause();
}
"""


def probe(*paths: Path | str, timeout_ns: int = _LONG_NS) -> list[str]:
    return list(Storage().probe([(ME, str(path)) for path in paths], timeout_ns).values())


def test_a_file_and_no_file(tmp_path: Path) -> None:
    file, empty, missing = tmp_path / "file", tmp_path / "empty", tmp_path / "missing"
    file.write_bytes(b"x" * 10)
    empty.touch()
    assert probe(file, missing, empty) == ["", f"{missing}: No such file or directory", ""]


def test_nothing_to_probe() -> None:
    assert Storage().probe([], 1) == {}


def test_one_that_does_not_answer_keeps_no_other_waiting(tmp_path: Path) -> None:
    fifo, file = tmp_path / "fifo", tmp_path / "file"
    os.mkfifo(fifo)
    file.touch()
    open_before = len(os.listdir("/proc/self/fd"))
    storage = Storage()
    files = [(ME, str(fifo)), (ME, str(file)), (ME, str(fifo))]
    assert storage.probe(files, _SOON_NS) == {
        (ME, str(fifo)): f"{fifo}: no answer within 500 ms",
        (ME, str(file)): "",
    }
    assert len(os.listdir("/proc/self/fd")) == open_before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_a_child_that_outlives_the_call_is_collected_by_a_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that is in an uninterruptible sleep; here none is waited for."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    monkeypatch.setattr("hostupdate.host.storage._DEATH_S", 0)
    storage = Storage()
    storage.probe([(ME, str(fifo))], _SOON_NS)
    with pytest.raises(ChildProcessError):
        while True:  # pytest-timeout ends it
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            storage.probe([], 1)


def test_a_file_system_without_direct_io() -> None:
    assert probe("/proc/version") == [""]


def test_a_device_that_has_no_driver(tmp_path: Path) -> None:
    need("root")
    device = tmp_path / "device"
    os.mknod(device, 0o060600, os.makedev(240, 77))
    assert probe(device) == [f"{device}: No such device or address"]


def test_storage_that_is_not_for_root_has_answered(tmp_path: Path) -> None:
    """As NFS with root_squash; here root lacks the capability to read what is not its own."""
    need("root")
    file = tmp_path / "file"
    file.touch(mode=0o600)
    os.chown(file, 65534, 65534)
    files = f"[(os.getpid(), {str(file)!r})]"
    script = (
        "import os; from hostupdate.host.storage import Storage\n"
        f"try: open({str(file)!r})\nexcept PermissionError: print('not for root')\n"
        f"print(list(Storage().probe({files}, {_LONG_NS}).values()))"
    )
    argv = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", sys.executable, "-c"]
    done = subprocess.run([*argv, script], capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout, done.stderr) == ("not for root\n['']\n", "")


def test_a_removed_file_is_reached_by_who_has_it_open(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with open(file, "w"):
        file.unlink()
        assert probe(file) == [""]
    assert probe(file) == [f"{file}: No such file or directory"]


def test_locks_of_an_image_are_left_alone(tmp_path: Path) -> None:
    """An OFD lock as QEMU holds it, also against readers, and none of the probe's behind it."""
    file = tmp_path / "file"
    file.write_bytes(b"x" * 4096)
    lock = struct.pack("=hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    with open(file, "r+b") as image, open(file, "r+b") as other:
        fcntl.fcntl(image, fcntl.F_OFD_SETLK, lock)
        assert probe(file) == [""]
        with pytest.raises(BlockingIOError):
            fcntl.fcntl(other, fcntl.F_OFD_SETLK, lock)


def test_a_program_that_cannot_be_run_is_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "gone"))
    (problem,) = probe(tmp_path)
    assert "cannot be looked at" in problem


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    need("root")
    if not os.path.exists("/dev/fuse"):
        pytest.skip("no /dev/fuse")
    argv = [sys.executable, "-I", silent_fs.__file__, str(tmp_path), "1048576"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "mounted\n"
        yield server, tmp_path / "disk"
        server.kill()
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_a_file_system_that_stops_answering(
    silent: tuple[subprocess.Popen[str], Path],
) -> None:
    server, disk = silent
    assert probe(disk) == [""]
    server.send_signal(signal.SIGSTOP)
    assert probe(disk, timeout_ns=_SOON_NS) == [f"{disk}: no answer within 500 ms"]
    server.send_signal(signal.SIGCONT)
    assert probe(disk) == [""]
    server.kill()
    server.wait()
    assert probe(disk) == [f"{disk}: Transport endpoint is not connected"]


def test_threads_of_ours_can_run() -> None:
    assert threads.stuck(ME, _LONG_NS) == ""


def test_a_process_that_is_gone_is_not_stuck() -> None:
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    assert threads.stuck(gone.pid, _LONG_NS) == ""


def test_a_stopped_process() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        found = threads.stuck(process.pid, _LONG_NS)
        process.kill()
    assert found.endswith(f"`kill -CONT {process.pid}` lets it run")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("c")
    made = tmp_path_factory.mktemp("asleep")
    (made / "asleep.c").write_text(_ASLEEP)
    subprocess.run(["gcc", "-o", made / "asleep", made / "asleep.c"], check=True, timeout=60)
    return made / "asleep"


@pytest.fixture
def asleep(program: Path) -> Iterator[subprocess.Popen[bytes]]:
    pipe = subprocess.PIPE
    with subprocess.Popen([program], stdin=pipe, stdout=pipe, bufsize=0) as process:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], 60)[0]
        yield process
        process.kill()


def test_a_thread_in_an_uninterruptible_sleep(asleep: subprocess.Popen[bytes]) -> None:
    found = threads.stuck(asleep.pid, 100_000_000)
    assert found.startswith("no way to wake for 100 ms, as with dead storage: asleep (")
    assert str(asleep.pid) in found


def test_a_sleep_that_ends_is_usual(asleep: subprocess.Popen[bytes]) -> None:
    assert asleep.stdin is not None
    with subprocess.Popen(["sh", "-c", "sleep 0.1; echo"], stdout=asleep.stdin):
        assert threads.stuck(asleep.pid, _LONG_NS) == ""
