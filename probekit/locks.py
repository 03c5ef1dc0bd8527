"""Locks: a file that a process holds while it is at work, and that names it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from types import ModuleType
from typing import Any, Self

from probekit.files import write_whole

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None


class Lock:
    """A file that a process holds, alone or beside others, and that names who took it last.

    The kernel holds it for the process (flock), and lets go when that ends, in whatever way, and on any machine of a shared
    file system. Where a file system has no such locks the file itself is the lock: one whose process is dead is taken over, one
    of another machine stays, since nothing tells whether that process lives, and there is no holding it beside others.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None
        self._named = False

    def take(self, *, shared: bool = False) -> bool:
        """Take it, beside others who share it or alone; False where others hold it. Who shares it may take it again, alone."""
        while True:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:  # who let go has removed the folder
                continue
            try:
                held = _flock(file, shared=shared)
            except OSError:
                os.close(file)
                return self._take_by_name(shared)
            if held and _is(file, self.path):
                self._file = file
                os.ftruncate(file, 0)
                os.pwrite(file, _name(), 0)
                return True
            os.close(file)
            if not held:
                return False

    def share(self) -> None:
        """Let others share what this process holds alone."""
        if self._file is not None:
            _flock(self._file, shared=True)
        else:
            self.release()

    def wait(self) -> None:
        """Take it alone, once whoever holds it has let go."""
        told = False
        while not self.take():
            if not told and (holder := self.holder):
                print(f"waiting for {holder}", flush=True)
                told = True
            time.sleep(0.1)

    @property
    def holder(self) -> str:
        """Who took it last, in words; '' where nobody has written that down."""
        name = self._read()
        if not name:
            return ""
        other = "" if name["host"] == socket.gethostname() else f"; if it has ended, delete {str(self.path)!r}"
        return f"process {name['pid']} on {name['host']}, at work since {name['since']}{other}"

    def release(self) -> None:
        """Let go; the file is removed unless others hold it, too."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                if _flock(self._file, shared=False):
                    self.path.unlink()
            os.close(self._file)
        elif self._named:
            self.path.unlink(missing_ok=True)
        else:
            return
        self._file, self._named = None, False
        with contextlib.suppress(OSError):  # not empty, while others hold theirs
            self.path.parent.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _take_by_name(self, shared: bool) -> bool:
        """`take` on a file system without locks."""
        if (name := self._read()) and (name["host"] != socket.gethostname() or _lives(name)):
            return False
        if not shared:
            ours = _name()
            write_whole(self.path, ours)
            time.sleep(0.05)  # of several who find it free, the last to write has it
            self._named = self.path.read_bytes() == ours
            return self._named
        return True

    def _read(self) -> dict[str, Any]:
        try:
            name = json.loads(self.path.read_bytes())
            return {key: name[key] for key in ("host", "pid", "since", "started")}
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return {}


def clear(folder: Path) -> None:
    """Remove the locks in a folder that killed processes have left there."""
    for path in folder.glob("*"):
        with Lock(path) as lock:
            lock.take()


def _flock(file: int, *, shared: bool) -> bool:
    """Whether the lock is to be had. Raises OSError where the file system has none."""
    if fcntl is None:
        raise OSError("no locks")
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is(file: int, path: Path) -> bool:
    """Whether the open file is still the one at that place: who held it removes it when letting go."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(file), there)


def _name() -> bytes:
    import psutil

    since = time.strftime("%Y-%m-%d %H:%M:%S")
    name = {"host": socket.gethostname(), "pid": os.getpid(), "since": since, "started": psutil.Process().create_time()}
    return json.dumps(name).encode()


def _lives(name: dict[str, Any]) -> bool:
    """Whether the process of that name is still there; another may have its number by now."""
    import psutil

    try:
        process = psutil.Process(name["pid"])
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - name["started"]) < 1
    except (psutil.Error, TypeError, ValueError):
        return False
