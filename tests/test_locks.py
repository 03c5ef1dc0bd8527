"""Locks: who holds one, who is told so, and what becomes of those of the dead."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from probekit import locks
from probekit.locks import Lock

HOLD = "import sys, time; from pathlib import Path; from probekit.locks import Lock; lock = Lock(Path(sys.argv[1]));"
HOLD += "print(lock.take(), flush=True); sys.stdin.read()"


@pytest.fixture(params=["by the kernel", "by name"])
def path(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a lock, on a file system that has locks and on one that has none."""

    def none(file: int, *, shared: bool) -> bool:
        raise OSError("no locks")

    if request.param == "by name":
        monkeypatch.setattr(locks, "_flock", none)
    return tmp_path / "locks" / "run"


def test_one_holds_it_at_a_time_and_is_named_and_nothing_is_left(path: Path) -> None:
    with Lock(path) as first:
        assert first.take() and not Lock(path).take() and not Lock(path).take(shared=True)
        assert first.holder.startswith(f"process {os.getpid()} on {socket.gethostname()}, at work since 20")
    assert not path.parent.exists()
    with Lock(path) as second:
        assert second.take()


def test_several_may_share_it_and_then_none_has_it_alone(tmp_path: Path) -> None:
    one, two, alone = (Lock(tmp_path / "locks" / "run") for _ in range(3))
    assert one.take(shared=True) and two.take(shared=True) and not alone.take()
    one.release()
    assert not alone.take() and alone.path.exists()
    two.release()
    assert alone.take()
    alone.share()
    assert one.take(shared=True)


def test_that_of_a_dead_process_is_taken_over(path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "True\n"
        with Lock(path) as lock:
            assert not lock.take() and f"process {other.pid} on" in lock.holder
        other.kill()
        other.wait()
        with Lock(path) as lock:
            lock.wait()
            assert f"process {os.getpid()} on" in lock.holder


def test_whether_a_process_of_another_machine_is_dead_nobody_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(file: int, *, shared: bool) -> bool:
        raise OSError("no locks")

    monkeypatch.setattr(locks, "_flock", none)
    path = tmp_path / "run"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 12, "since": "2026-01-01 10:00:00", "started": 0.0}))
    lock = Lock(path)
    assert not lock.take() and not lock.take(shared=True)
    assert lock.holder == f"process 12 on elsewhere, at work since 2026-01-01 10:00:00; if it has ended, delete {str(path)!r}"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"host": 3}', b"[" * 100_000, b"\xff"])
def test_a_name_that_cannot_be_read_keeps_nobody_out(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with Lock(path) as lock:
        assert lock.holder == "" and lock.take() and lock.holder


def test_a_number_that_another_process_has_by_now_is_not_the_one_that_held_it(path: Path) -> None:
    name = {"host": socket.gethostname(), "pid": os.getpid(), "since": "2026-01-01 10:00:00", "started": 1.0}
    path.parent.mkdir()
    path.write_text(json.dumps(name))
    assert Lock(path).take()
