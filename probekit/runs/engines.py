"""What runs an experiment's units: this process, Ray's workers, or one task of a job array. The folder is all they share."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probekit.hooks.errors import ProbekitError
from probekit.progress import progress
from probekit.runs.experiment import Advance, Experiment, Findings, Unit, read_shard
from probekit.runs.folder import Run, Stacked

if TYPE_CHECKING:
    import numpy as np

TRIES = 3
"""How often a unit is begun again by another worker after one has died of it."""


def run(
    experiment: Experiment, out: Path | None = None, engine: str = "local", workers: int | None = None, shard: str | None = None
) -> Findings | None:
    """`Experiment.run`."""
    part = read_shard(shard) if shard is not None else (1, 1)
    kind, _, address = engine.partition(":")
    if kind not in ("local", "ray") or (address and kind != "ray"):
        raise ProbekitError(f"--engine {engine!r}: choose local, ray or ray:ADDRESS")
    if workers is not None and (kind != "ray" or workers < 1):
        raise ProbekitError(f"--workers {workers}: goes with --engine ray, at least 1")
    inputs = experiment.inputs()
    units = experiment.plan()
    opened = Run(out or experiment.default_folder(inputs), experiment.name, experiment.options, inputs, sys.argv)
    mine = _of_shard(units, *part)
    try:
        if kind == "ray":
            _with_ray(experiment, opened, units, mine, address or None, workers)
        else:
            _here(experiment, opened, units, mine)
    except KeyboardInterrupt:
        done = sum(opened.finished(unit.name) for unit in units)
        raise KeyboardInterrupt(
            f"interrupted: {done} of {len(units)} units are kept in {opened.folder}; the same command goes on from there"
        ) from None
    missing = [unit.name for unit in units if not opened.finished(unit.name)]
    if missing:
        return None
    findings = experiment.findings(opened, opened.collect([unit.name for unit in units]))
    findings.write()
    return findings


def _of_shard(units: Sequence[Unit], part: int, whole: int) -> list[Unit]:
    """Every whole-th group of units, from the part-th on."""
    groups = list(dict.fromkeys(unit.group or unit.name for unit in units))
    mine = set(groups[part - 1 :: whole])
    return [unit for unit in units if (unit.group or unit.name) in mine]


def _sorted(units: Sequence[Unit], wanted: Sequence[Unit], opened: Run) -> list[Unit]:
    """The unfinished units among those wanted, each after the unfinished ones that it needs, whoever they belong to."""
    by_name = {unit.name: unit for unit in units}
    found: dict[str, Unit] = {}

    def add(unit: Unit) -> None:
        if unit.name not in found and not opened.finished(unit.name):
            for need in unit.needs:
                add(by_name[need])
            found[unit.name] = unit

    for unit in wanted:
        add(unit)
    # what needs nothing first: by the time that the others are due, other shards may have done what those need
    return sorted(found.values(), key=lambda unit: bool(unit.needs))


@dataclass
class _Bench:
    """A unit's `Bench` in this process."""

    run: Run
    advance_: Advance
    left: int

    def arrays(self, unit: str) -> Mapping[str, np.ndarray]:
        return self.run.arrays(unit)

    def stacked(self, units: Sequence[str], key: str) -> Stacked:
        return Stacked([self.run.array(unit, key) for unit in units])

    def advance(self, count: int) -> None:
        count = min(count, self.left)
        self.left -= count
        self.advance_(count)


def _do(experiment: Experiment, opened: Run, unit: Unit, advance: Advance) -> None:
    """One unit, unless another process has done it in the meantime."""
    bench = _Bench(opened, advance, unit.size)
    if not opened.finished(unit.name):
        opened.write(unit.name, experiment.work(unit, bench))
    bench.advance(bench.left)


def _here(experiment: Experiment, opened: Run, units: Sequence[Unit], mine: Sequence[Unit]) -> None:
    waiting = _sorted(units, mine, opened)
    total = sum(unit.size for unit in {*mine, *waiting})
    with progress(experiment.name, total, done=total - sum(unit.size for unit in waiting)) as advance:
        for unit in waiting:
            _do(experiment, opened, unit, advance)


# --- Ray ---------------------------------------------------------------------------------------------------------------


class _Worker:
    """An actor: the experiment with what it has loaded, and the folder."""

    def __init__(self, experiment: Experiment, folder: str, here: str, threads: int) -> None:
        import torch

        os.chdir(here)  # the folder and the data may be named from there
        torch.set_num_threads(threads)
        self.experiment, self.run = experiment, Run.opened(Path(folder))

    def do(self, unit: Unit) -> str | None:
        """Do a unit; what the user can mend comes back as text."""
        try:
            _do(self.experiment, self.run, unit, lambda count: None)
        except ProbekitError as error:
            return str(error)
        return None


def _with_ray(
    experiment: Experiment, opened: Run, units: Sequence[Unit], mine: Sequence[Unit], address: str | None, workers: int | None
) -> None:
    """Hand units out as workers come free, one worker a device; a dead worker is replaced and its unit done again."""
    try:
        import ray
    except ImportError as error:
        raise ProbekitError("--engine ray: needs the package ray; pip install 'probekit[ray]'") from error
    waiting = _sorted(units, mine, opened)
    if not waiting:
        return
    started = not ray.is_initialized()
    if started:
        try:
            ray.init(address=address, log_to_driver=False, include_dashboard=False if address is None else None, configure_logging=False)
        except Exception as error:  # Ray raises a dozen kinds
            raise ProbekitError(f"--engine ray:{address}: no cluster there ({' '.join(str(error).split())[:160]})") from error
    try:
        _hand_out(ray, experiment, opened, waiting, workers, {*mine, *waiting})
    finally:
        if started:
            ray.shutdown()


def _hand_out(ray: Any, experiment: Experiment, opened: Run, waiting: list[Unit], workers: int | None, all_: set[Unit]) -> None:
    devices = int(ray.cluster_resources().get("GPU", 0))
    wants_gpu = devices > 0 and experiment.device in ("auto", "cuda")
    count = min(workers or (devices if wants_gpu else 1), len(waiting))
    threads = max(1, (os.cpu_count() or 1) // count)
    # more workers than devices share them; the processor is never what they wait for
    resources = {"num_gpus": min(1.0, devices / count) if wants_gpu else 0, "num_cpus": 0}
    make = ray.remote(**resources)(_Worker)

    def new() -> Any:
        return make.remote(experiment, str(opened.folder.absolute()), str(Path.cwd()), threads)

    idle, busy, tries = [new() for _ in range(count)], dict[Any, tuple[Any, Unit]](), dict[str, int]()
    left = list(waiting)
    total = sum(unit.size for unit in all_)
    with progress(experiment.name, total, done=total - sum(unit.size for unit in waiting)) as advance:
        while left or busy:
            ready = [u for u in left if all(opened.finished(need) for need in u.needs)]
            for unit in ready[: len(idle)]:
                left.remove(unit)
                worker = idle.pop()
                busy[worker.do.remote(unit)] = (worker, unit)
            (done,), _ = ray.wait(list(busy), num_returns=1)
            worker, unit = busy.pop(done)
            try:
                said = ray.get(done)
            except ray.exceptions.RayActorError as error:
                tries[unit.name] = tries.get(unit.name, 0) + 1
                if tries[unit.name] >= TRIES:
                    raise ProbekitError(f"unit {unit.name!r}: {TRIES} workers have died of it ({_first_line(error)})") from error
                left.insert(0, unit)
                idle.append(new())
                continue
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            if said is not None:
                raise ProbekitError(said)
            idle.append(worker)
            advance(unit.size)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
