"""What runs an experiment's units: this process, Ray's workers, or one task of a job array. The folder is all they share."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probekit.files import file_name
from probekit.hooks.errors import ProbekitError
from probekit.progress import progress, telling
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
    _refuse_one_file(units)
    opened = Run(out or experiment.default_folder(inputs), experiment.name, experiment.options, inputs, experiment.command)

    def kept() -> str:
        done = sum(opened.finished(unit.name) for unit in units)
        return f"interrupted: {done} of {len(units)} units are kept in {opened.folder}; the same command goes on from there"

    with telling(kept), opened.held(shared=shard is not None):
        _discard_damaged(opened, units)
        queue = _Queue(units, _of_shard(units, *part), opened)
        if kind == "ray":
            _with_ray(experiment, opened, queue, address or None, workers)
        else:
            _here(experiment, opened, queue, wait=shard is None)
        if not all(opened.finished(unit.name) for unit in units):
            return None
        with opened.claimed("results", wait=True):  # shards that end at once collect one after the other
            findings = experiment.findings(opened, opened.collect([unit.name for unit in units]))
            findings.write()
        return findings


def _discard_damaged(opened: Run, units: Sequence[Unit]) -> None:
    """Have units that are not as they were written done again, and say so."""
    for unit in units:
        if opened.finished(unit.name) or not opened.damaged(unit.name):
            continue
        with opened.claimed(unit.name, wait=False) as ours:
            if ours and (what := opened.damaged(unit.name)):  # none is just doing it again
                print(f"{what}: is damaged or missing; its unit is done again", flush=True)
                opened.discard(unit.name)


def _refuse_one_file(units: Sequence[Unit]) -> None:
    """Raises ProbekitError where two units would be written under one name."""
    written: dict[str, str] = {}
    for unit in units:
        other = written.setdefault(file_name(unit.name).casefold(), unit.name)
        if other != unit.name:
            raise ProbekitError(f"{other!r} and {unit.name!r}: would be written under one name; call one of them otherwise")


def _of_shard(units: Sequence[Unit], part: int, whole: int) -> list[Unit]:
    """Every whole-th group of units, from the part-th on."""
    groups = list(dict.fromkeys(unit.group or unit.name for unit in units))
    mine = set(groups[part - 1 :: whole])
    return [unit for unit in units if (unit.group or unit.name) in mine]


class _Queue:
    """Which unit is to be done next.

    A shard does its own units that need nothing, then those of its own whose needs are there. What needs units of other
    shards is left to whoever finds those done, and in the end to the last.
    """

    def __init__(self, units: Sequence[Unit], mine: Sequence[Unit], opened: Run) -> None:
        self.units, self.opened = units, opened
        self._mine = {unit.name for unit in mine}
        self._done = {unit.name for unit in units if opened.finished(unit.name)}
        self._given: set[str] = set()
        self.total = sum(unit.size for unit in mine)
        self.at_start = sum(unit.size for unit in mine if unit.name in self._done)

    def next(self, group: str = "", taken: Collection[str] = ()) -> Unit | None:
        """A unit that can be done now, None where there is none (yet).

        group: of the last unit of who asks; another one of it comes first, then one of a group that is not `taken` by others.
        """
        found = [*self._open(self._mine, needy=False)] or [*self._open(self._mine, needy=True)]
        if not found and self._leaves_done():
            found = [*self._open({unit.name for unit in self.units}, needy=True)]
        if not found:
            return None
        unit = min(found, key=lambda unit: (unit.group != group or not group, bool(unit.group) and unit.group in taken))
        self._given.add(unit.name)
        return unit

    def give_back(self, unit: Unit) -> None:
        """The unit is not done after all."""
        self._given.discard(unit.name)

    def _open(self, names: set[str], *, needy: bool) -> Iterator[Unit]:
        for unit in self.units:
            waits = unit.name in names and unit.name not in self._given and not self._finished(unit.name)
            if waits and bool(unit.needs) == needy and all(self._finished(need) for need in unit.needs):
                yield unit

    def _leaves_done(self) -> bool:
        return all(self._finished(unit.name) for unit in self.units if not unit.needs)

    def _finished(self, name: str) -> bool:
        if name not in self._done and self.opened.finished(name):
            self._done.add(name)
        return name in self._done


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


def _do(experiment: Experiment, opened: Run, unit: Unit, advance: Advance, *, wait: bool) -> None:
    """One unit, unless another process has done it in the meantime, or (without `wait`) is doing it."""
    bench = _Bench(opened, advance, unit.size)
    with opened.claimed(unit.name, wait=wait) as ours:
        if ours and not opened.finished(unit.name):
            opened.write(unit.name, experiment.work(unit, bench))
    bench.advance(bench.left)


def _here(experiment: Experiment, opened: Run, queue: _Queue, *, wait: bool) -> None:
    if queue.at_start < queue.total and (said := experiment.costs()):
        print(said, flush=True)
    with progress(experiment.name, queue.total, done=queue.at_start) as advance:
        group = ""
        while (unit := queue.next(group)) is not None:
            _do(experiment, opened, unit, advance, wait=wait)
            group = unit.group


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
            _do(self.experiment, self.run, unit, lambda count: None, wait=True)
        except ProbekitError as error:
            return str(error)
        return None


def _with_ray(experiment: Experiment, opened: Run, queue: _Queue, address: str | None, workers: int | None) -> None:
    """Hand units out as workers come free, one worker a device; a dead worker is replaced and its unit done again."""
    try:
        import ray
    except ImportError as error:
        raise ProbekitError("--engine ray: needs the package ray; pip install 'probekit[ray]'") from error
    started = not ray.is_initialized()
    terminated = signal.getsignal(signal.SIGTERM)
    if started:
        here: dict[str, Any] = {"include_dashboard": False} if address is None else {}
        try:
            ray.init(address=address, log_to_driver=False, configure_logging=False, **here)
        except Exception as error:  # Ray raises a dozen kinds
            raise ProbekitError(f"--engine ray:{address}: no cluster there ({_first_line(error)})") from error
    try:
        if terminated is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, terminated)  # Ray takes it for itself
        _hand_out(ray, experiment, opened, queue, workers)
    finally:
        if started:
            ray.shutdown()


def _hand_out(ray: Any, experiment: Experiment, opened: Run, queue: _Queue, workers: int | None) -> None:
    devices = int(ray.cluster_resources().get("GPU", 0)) if experiment.device in ("auto", "cuda") else 0
    count = workers or max(devices, 1)
    # more workers than devices share them; the processor is never what they wait for
    resources = {"num_gpus": min(1.0, devices / count), "num_cpus": 0}
    make = ray.remote(**resources)(_Worker)

    def new() -> Any:
        threads = max(1, (os.cpu_count() or 1) // count)
        return make.remote(experiment, str(opened.folder.absolute()), str(Path.cwd()), threads)

    idle: list[tuple[Any, str]] = []
    busy: dict[Any, tuple[Any, Unit]] = {}
    deaths: dict[str, int] = {}
    with progress(experiment.name, queue.total, done=queue.at_start) as advance:
        while True:
            while len(busy) < count:
                worker, group = idle.pop() if idle else (None, "")
                unit = queue.next(group, {other.group for _, other in busy.values()})
                if unit is None:
                    idle += [] if worker is None else [(worker, group)]
                    break
                worker = worker or new()
                busy[worker.do.remote(unit)] = (worker, unit)
            if not busy:
                return
            (done,), _ = ray.wait(list(busy), num_returns=1)
            worker, unit = busy.pop(done)
            try:
                said = ray.get(done)
            except ray.exceptions.RayActorError as error:
                deaths[unit.name] = deaths.get(unit.name, 0) + 1
                if deaths[unit.name] == TRIES:
                    raise ProbekitError(f"unit {unit.name!r}: {TRIES} workers died of it ({_first_line(error)})") from error
                queue.give_back(unit)
                continue
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            if said is not None:
                raise ProbekitError(said)
            idle.append((worker, unit.group))
            advance(unit.size)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
