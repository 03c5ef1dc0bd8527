"""What runs units: this process, Ray's workers, shards of a job array; killed, interrupted, and gone on with."""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pytest
import typer
from diffusers import DDIMScheduler, DDPMPipeline

from probekit import ProbekitError
from probekit.experiments import InvertRun, NoiseMapRun
from probekit.report.findings import Findings
from probekit.runs import engines
from probekit.runs.experiment import Bench, Experiment, Unit, Work
from probekit.runs.folder import Run
from tests.conftest import probekit, process, refused, tiny

RUN = ["noise-map", "run", "--model", "tiny", "--n", "320", "--steps", "2,3", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a tiny model lies, and `local`, a noise map of it by this process: ten units of samples, and two that need five."""
    folder = tmp_path_factory.mktemp("engines")
    DDPMPipeline(tiny(), DDIMScheduler()).save_pretrained(folder / "tiny")
    done = probekit(*RUN, "--out", "local", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def same(folder: Path, name: str) -> None:
    """The run of that name has the rows and the page's figure of the local one, byte for byte, and all its units."""
    local, other = folder / "local", folder / name
    assert {path.name for path in (other / "units").iterdir()} == {path.name for path in (local / "units").iterdir()}
    assert len(list((other / "units").iterdir())) == 12
    for file in ("results.parquet", "figures/accuracy.svg", "states/samples-3-0000256/states.npy"):
        assert (other / file).read_bytes() == (local / file).read_bytes(), file


# --- an experiment of nothing ------------------------------------------------------------------------------------------


def counting() -> Any:
    """The class of an experiment whose units square numbers, and whose last one adds them up.

    It is local, so that Ray's workers are sent it whole: they cannot import the tests.
    """

    @dataclass(frozen=True, kw_only=True)
    class Counting(Experiment):
        """Square numbers."""

        name: ClassVar[str] = "count-squares"

        n: Annotated[int, typer.Option(min=1, help="How many.")] = 4
        die: Annotated[str, typer.Option(help="What becomes of unit 2: kill-once, kill, refuse, break, stop, nothing.")] = (
            "nothing"
        )
        marks: Annotated[str, typer.Option(help="A folder for who did what.")]

        @property
        def subject(self) -> str:
            return "numbers"

        def inputs(self) -> dict[str, Any]:
            return {}

        def plan(self) -> list[Unit]:
            leaves = [Unit(f"square {i}", group=f"pair {i // 2}") for i in range(self.n)]
            return [*leaves, Unit("sum", needs=tuple(unit.name for unit in leaves))]

        def work(self, unit: Unit, bench: Bench) -> Work:
            import os
            import signal
            from pathlib import Path

            import numpy as np

            from probekit import ProbekitError
            from probekit.runs.experiment import Work

            if unit.needs:
                return Work([{"what": "sum", "value": int(bench.stacked(unit.needs, "square")[:].sum())}])
            number, marks = int(unit.name.split()[1]), Path(self.marks)
            with (marks / unit.name).open("a") as file:
                file.write(f"{os.getpid()}\n")
            tried = len((marks / unit.name).read_text().split())
            if number == 2 and (self.die == "kill" or (self.die == "kill-once" and tried == 1)):
                os.kill(os.getpid(), signal.SIGKILL)
            if number == 2 and self.die == "refuse":
                raise ProbekitError("--n 2: cannot be squared")
            if number == 2 and self.die == "break":
                raise ArithmeticError("two is odd")
            if number == 2 and self.die == "stop":
                raise KeyboardInterrupt
            return Work([{"what": unit.name, "value": number**2}], arrays={"square": np.array([number**2])})

        def findings(self, run: Run, rows: Any) -> Findings:
            return Findings(run, rows, [], lambda: b"counted")

    return Counting


def tried(marks: Path) -> dict[str, int]:
    """How often each unit was begun."""
    return {path.name: len(path.read_text().split()) for path in sorted(marks.iterdir())}


@pytest.fixture
def marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where units of `Counting` leave marks; runs are beside it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "marks").mkdir()
    return tmp_path / "marks"


# --- this process ------------------------------------------------------------------------------------------------------


def test_units_are_done_once_those_that_need_others_last_and_rows_are_in_the_plan_s_order(marks: Path) -> None:
    found = counting()(marks=str(marks)).run(out="run")
    assert found.rows.what.tolist() == ["square 0", "square 1", "square 2", "square 3", "sum"]
    assert found.rows.value.tolist() == [0, 1, 4, 9, 14] and (Path("run") / "report.html").read_bytes() == b"counted"
    again = counting()(marks=str(marks)).run(out="run")
    assert again.rows.equals(found.rows) and set(tried(marks).values()) == {1}


def test_what_stops_a_run_says_what_is_kept_and_the_same_goes_on_from_there(marks: Path) -> None:
    stopped = counting()(marks=str(marks), die="stop")
    with pytest.raises(KeyboardInterrupt, match=r"interrupted: 2 of 5 units are kept in run; the same command goes on"):
        stopped.run(out="run")
    assert tried(marks) == {"square 0": 1, "square 1": 1, "square 2": 1}
    with pytest.raises(ProbekitError, match="holds a run of another config"):
        counting()(marks=str(marks)).run(out="run")
    with pytest.raises(KeyboardInterrupt):
        stopped.run(out="run")
    assert tried(marks)["square 0"] == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--engine", "slurm"], "--engine 'slurm': choose local, ray or ray:ADDRESS"),
        (["--engine", "local:1"], "--engine 'local:1': choose"),
        (["--workers", "2"], "--workers 2: goes with --engine ray"),
        (["--engine", "ray", "--workers", "0"], "--workers 0: goes with --engine ray, at least 1"),
        (["--shard", "3/2"], "--shard '3/2': write i/n"),
        (["--shard", "0/2"], "--shard '0/2': write i/n"),
        (["--shard", "half"], "--shard 'half': write i/n"),
    ],
)
def test_engines_and_shards_that_are_none_are_refused_before_anything_is_written(
    folder: Path, options: list[str], said: str
) -> None:
    assert said in refused(*RUN, *options, "--out", "refused", cwd=folder)
    assert not (folder / "refused").exists()


# --- two at once, and what is stopped ------------------------------------------------------------------------------------


def test_a_second_process_is_told_who_is_at_work_and_touches_nothing(marks: Path) -> None:
    asked = counting()(marks=str(marks))
    assert asked.run(out="run", shard="1/2") is None
    before = contents(Path("run"))
    opened = Run.opened(Path("run"))
    with opened.held(shared=False):
        for shard in (None, "2/2"):
            with pytest.raises(
                ProbekitError, match=rf"--out 'run': process {os.getpid()} on .*; wait until it has ended"
            ) as error:
                asked.run(out="run", shard=shard)
            assert "\n" not in str(error.value)
    assert contents(Path("run")) == before
    with opened.held(shared=True):  # as a shard does
        with pytest.raises(ProbekitError, match=rf"--out 'run': process {os.getpid()} on"):
            asked.run(out="run")
        assert asked.run(out="run", shard="2/2") is not None
    assert not (Path("run") / "locks").exists()


def test_a_shard_leaves_out_a_unit_that_another_process_holds(marks: Path) -> None:
    asked = counting()(marks=str(marks))
    opened = Run(Path("run"), asked.name, asked.options, {}, asked.command)
    with opened.held(shared=True), opened.claimed("square 3", wait=False) as ours:
        assert ours and asked.run(out="run", shard="2/2") is None and asked.run(out="run", shard="1/2") is None
    assert tried(marks) == {"square 0": 1, "square 1": 1, "square 2": 1}
    assert asked.run(out="run", shard="2/2").rows.value.tolist() == [0, 1, 4, 9, 14]


@pytest.mark.parametrize("stage", ["work", "findings"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_stops_a_command_has_it_say_what_is_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch, stage: str, number: signal.Signals, code: int
) -> None:
    original, called = getattr(NoiseMapRun, stage), []

    def stopped(*given: Any) -> Any:
        called.append(given)
        if len(called) == (3 if stage == "work" else 1):
            os.kill(os.getpid(), number)
            time.sleep(5)
        return original(*given)

    monkeypatch.setattr(NoiseMapRun, stage, stopped)
    name = f"stopped-{stage}-{code}"
    if stage == "findings":
        shutil.copytree(folder / "local", folder / name)
    # a shell has what it starts in the background ignore SIGINT
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        done = probekit(*RUN, "--out", name, cwd=folder)
    finally:
        signal.signal(signal.SIGINT, before)
    kept = {"work": 2, "findings": 12}[stage]
    assert done.returncode == code
    assert done.stderr == f"probekit: interrupted: {kept} of 12 units are kept in {name}; the same command goes on from there\n"
    assert not list((folder / name).rglob("*.partial")) and not (folder / name / "locks").exists()


# --- what is damaged -----------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "flipped": flipped,
    "emptied": lambda content: b"",
    "cut": lambda content: content[:-5],
    "zeroed": lambda content: bytes(len(content)),
}


@pytest.mark.parametrize(
    "file",
    [
        "units/square_1.parquet",
        "states/square_1/square.npy",
        "checksums/unit-square_1.json",
        "checksums/results.json",
        "results.parquet",
    ],
)
def test_what_is_damaged_is_done_again_and_said(marks: Path, file: str, capfd: pytest.CaptureFixture[str]) -> None:
    asked = counting()(marks=str(marks))
    asked.run(out="run")
    path, before = Path("run") / file, contents(Path("run"))
    capfd.readouterr()
    for number, damage in enumerate([*DAMAGES.values(), None], start=1):
        if damage is None:  # a folder in its place
            path.unlink()
            (path / "inside").mkdir(parents=True)
        else:
            path.write_bytes(damage(before[file]))
        asked.run(out="run")
        assert contents(Path("run")) == before
        said = capfd.readouterr().out
        if "results" not in file:  # which are written anew in any case
            assert "square_1" in said and "is damaged or missing; its unit is done again" in said
            assert tried(marks) == {"square 0": 1, "square 1": 1 + number, "square 2": 1, "square 3": 1}


# --- shards ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("order", [(3, 1, 2), (1, 2, 3)])
def test_shards_in_any_order_give_the_bytes_of_one_run_and_the_last_collects(folder: Path, order: tuple[int, ...]) -> None:
    name = "shards-" + "".join(map(str, order))
    for part in order:
        done = probekit(*RUN, "--shard", f"{part}/3", "--out", name, cwd=folder)
        assert done.returncode == 0, done.stderr
        last = part == order[-1]
        assert ("report: " in done.stdout) == last == (folder / name / "results.parquet").exists()
        assert (f"this part is done ({part}/3); units of others are missing" in done.stdout) != last
    same(folder, name)
    before = {path: path.stat().st_mtime_ns for path in (folder / name / "units").iterdir()}
    assert "report: " in probekit(*RUN, "--shard", f"{order[0]}/3", "--out", name, cwd=folder).stdout
    assert {path: path.stat().st_mtime_ns for path in (folder / name / "units").iterdir()} == before


def test_more_shards_than_units_leave_some_nothing_to_do(marks: Path) -> None:
    asked = counting()(marks=str(marks), n=2)
    found = [asked.run(out="run", shard=f"{part}/4") for part in (4, 3, 2, 1)]
    assert found[:3] == [None] * 3 and found[3].rows.value.tolist() == [0, 1, 1] and set(tried(marks).values()) == {1}


def test_shards_keep_to_groups_and_together_do_every_unit_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    units = InvertRun(model="tiny", n=200, steps=2, device="cpu").plan()
    for whole in (1, 2, 3, 7):
        parts = [engines._of_shard(units, part, whole) for part in range(1, whole + 1)]
        assert sorted(unit.name for part in parts for unit in part) == sorted(unit.name for unit in units)
        for group in {unit.group for unit in units if unit.group}:
            assert sum(any(unit.group == group for unit in part) for part in parts) == 1
            assert len([unit for unit in units if unit.group == group]) == 5  # samples, and four ways there and back


@pytest.mark.slow
def test_two_shards_at_once_and_one_killed_meanwhile_come_to_the_same(folder: Path) -> None:
    units = folder / "at-once" / "units"
    both = [process(*RUN, "--shard", f"{part}/2", "--out", "at-once", cwd=folder) for part in (1, 2)]
    while both[0].poll() is None and not any(units.glob("*.parquet")):
        time.sleep(0.002)
    both[0].kill()
    for shard in both:
        shard.communicate()
    assert both[0].returncode == -9 and both[1].returncode == 0
    assert probekit(*RUN, "--shard", "1/2", "--out", "at-once", cwd=folder).returncode == 0
    same(folder, "at-once")


# --- Ray ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ray_s_workers_give_the_bytes_of_a_local_run(folder: Path) -> None:
    import ray

    done = probekit(*RUN, "--engine", "ray", "--workers", "2", "--out", "ray", cwd=folder)
    assert done.returncode == 0, done.stderr
    same(folder, "ray")
    assert not ray.is_initialized()  # what was started is stopped


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray on this machine, for several runs: it takes seconds to start."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


def workers() -> list[Any]:
    """The processes of Ray's actors that run an experiment."""
    import psutil

    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if any(part.startswith("ray::_Worker") for part in child.cmdline()):
                found.append(child)
        except psutil.Error:  # it has ended meanwhile
            continue
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_worker_that_is_killed_is_replaced_and_its_unit_done_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    units, gone = folder / "ray-killed" / "units", []

    def kill() -> None:
        while not gone:
            time.sleep(0.005)
            if any(units.glob("*.parquet")) and (there := workers()):
                os.kill(there[0].pid, signal.SIGKILL)
                gone.append(there[0].pid)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    found = NoiseMapRun(model="tiny", n=320, steps="2,3", device="cpu").run(out="ray-killed", engine="ray", workers=2)
    assert gone and found is not None, "it was over before a worker could be killed"
    same(folder, "ray-killed")


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_unit_whose_worker_dies_once_is_begun_again_and_nothing_else_is(marks: Path) -> None:
    found = counting()(marks=str(marks), die="kill-once").run(out="run", engine="ray", workers=2)
    assert found.rows.value.tolist() == [0, 1, 4, 9, 14]
    assert tried(marks) == {"square 0": 1, "square 1": 1, "square 2": 2, "square 3": 1}
    pids = {path.name: path.read_text().split() for path in marks.iterdir()}
    assert pids["square 0"] == pids["square 1"] and len({pid for some in pids.values() for pid in some}) >= 2
    assert str(os.getpid()) not in {pid for some in pids.values() for pid in some}


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("die", "error", "said"),
    [
        ("kill", ProbekitError, "unit 'square 2': 3 workers died of it"),
        ("refuse", ProbekitError, "--n 2: cannot be squared"),
        ("break", ArithmeticError, "two is odd"),
    ],
)
def test_what_a_worker_cannot_do_is_said_and_what_was_done_is_kept(
    marks: Path, die: str, error: type[Exception], said: str
) -> None:
    asked = counting()(marks=str(marks), die=die)
    with pytest.raises(error, match=re.escape(said)) as caught:
        asked.run(out="run", engine="ray", workers=1)
    assert "\n" not in str(caught.value)
    assert tried(marks)["square 2"] == (3 if die == "kill" else 1)
    assert {"square_0.parquet", "square_1.parquet"} <= {path.name for path in (Path("run") / "units").iterdir()}
