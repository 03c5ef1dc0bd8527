"""A process that has imported everything, whose forks are commands: each takes tenths of a second to start, not ten seconds."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import importlib
import json
import os
import pkgutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

CHANGES = ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir")
"""Calls of the operating system that change what lies on the disk: a kill between two of them is one while writing."""


@dataclass(frozen=True)
class Ended:
    """How a command ended. changes: how many of `CHANGES` it made, where it was not killed."""

    code: int
    said: str
    seconds: float
    changes: int


class Warmed:
    """The process, as others see it."""

    def __enter__(self) -> Self:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        command = [sys.executable, __file__]  # not as a part of the tests, which have every shape checked
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def run(
        self,
        arguments: list[str],
        cwd: Path,
        *,
        seconds: float | None = None,
        change: int | None = None,
        threads: int = 1,
    ) -> Ended:
        """A command in a folder, killed after so many seconds, or before its so-manieth change of what lies on the disk."""
        job = {"arguments": arguments, "cwd": str(cwd), "seconds": seconds, "change": change, "threads": threads}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the warmed process has died"
        told = json.loads(answer)
        return Ended(told["code"], base64.b64decode(told["said"]).decode(errors="replace"), told["seconds"], told["changes"])


# --- in the process ----------------------------------------------------------------------------------------------------


def _serve() -> None:
    _import_all()
    _shorten_trainings()
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        answer, imported = _ended(json.loads(line))
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        for name in imported:  # so that the next fork finds it
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def _import_all() -> None:
    import torch

    torch.set_num_threads(1)
    for part in ("", ".experiments", ".hooks"):
        package = importlib.import_module(f"probekit{part}")
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if ".papers" not in module.name:
                importlib.import_module(module.name)
    for heavy in ("diffusers", "pandas", "matplotlib.pyplot", "pyarrow.parquet", "zarr"):
        importlib.import_module(heavy)


def _shorten_trainings() -> None:
    """Every recipe as it is, but with few steps of small batches, a checkpoint after every one, and two snapshots."""
    from probekit.data.scenes import all_scenes
    from probekit.zoo import (
        avatar_families,
        avatar_reader,
        mini_sd,
        planted_sd,
        scene_clip,
        scene_reader,
        scene_transformers,
        scene_vae,
        training,
    )

    few = all_scenes()[::500]
    mini_sd.split = lambda held_out: few  # type: ignore[assignment]
    for module in (avatar_reader, mini_sd, planted_sd, scene_clip, scene_reader, scene_transformers, scene_vae):
        for name, value in list(vars(module).items()):
            if isinstance(value, training.Schedule):
                setattr(module, name, _short(value))
        if hasattr(module, "BATCH"):
            module.BATCH = 4
    scene_transformers.SCHEDULES = {name: _short(schedule) for name, schedule in scene_transformers.SCHEDULES.items()}
    avatar_families.FAMILIES = {
        name: dataclasses.replace(family, schedule=_short(family.schedule), batch=4, keep=(2, 4) if family.keep else ())
        for name, family in avatar_families.FAMILIES.items()
    }
    assert training.train.__kwdefaults__ is not None
    training.train.__kwdefaults__["save_every_seconds"] = 0.0


def _short(schedule: Any) -> Any:
    return dataclasses.replace(schedule, steps=6)


def _ended(job: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Run a command in a fork of this process, kill it when that is asked for; how it ended, and what it has imported."""
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as told:
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            _become(job, said.fileno(), told.fileno())
        ended, status = 0, 0
        while not ended and job["seconds"] is not None and time.monotonic() < began + job["seconds"]:
            time.sleep(0.001)
            ended, status = os.waitpid(child, os.WNOHANG)
        if not ended:
            if job["seconds"] is not None:
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        seconds = time.monotonic() - began
        said.seek(0)
        told.seek(0)
        changes, imported = json.loads(told.read() or "[0, []]")
        code, words = os.waitstatus_to_exitcode(status), base64.b64encode(said.read()).decode()
        return {"code": code, "said": words, "seconds": seconds, "changes": changes}, imported


def _become(job: dict[str, Any], said: int, told: int) -> None:
    """Be the command; never returns."""
    code, before = 70, set(sys.modules)
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.chdir(job["cwd"])
        sys.argv = ["probekit", *job["arguments"]]
        sys.modules["torch"].set_num_threads(job["threads"])
        with _counted(job["change"]) as count:
            from probekit.cli import main

            try:
                main()
            except SystemExit as ended:
                code = int(ended.code or 0)
        imported = [name for name in sys.modules if name not in before and not name.startswith("_")]
        os.write(told, json.dumps([count[0], imported]).encode())
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@contextlib.contextmanager
def _counted(last: int | None) -> Iterator[list[int]]:
    """Count the changes of what lies on the disk, and kill this process before the last one."""
    count = [0]

    def counting(call: Any) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            count[0] += 1
            if count[0] == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return counted

    for name in CHANGES:
        setattr(os, name, counting(getattr(os, name)))
    yield count


if __name__ == "__main__":
    _serve()
