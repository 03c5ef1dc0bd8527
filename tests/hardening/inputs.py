"""Bad input: 500 commands that must be refused, each with exit code 2 and one line, within 10 seconds and 4 GB.

    python -m tests.hardening.inputs [--seed 0] [--count 500] [--only PATTERN]

Every option of every command is given values of each class that it must refuse; beside them stand malformed pipelines, tables,
pictures, checkpoints, stores and classes of one's own. Each command is run in a child of one process that has imported
everything, watched from outside; some also in a process of their own. Whatever is wrong is printed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.hardening.bad_files import THERE, Files

SECONDS, BYTES = 10.0, 4 * 2**30
LINE = 2000
"""Characters of an answer, at most."""
PROCESSES = 20
"""Cases that are also run in a process of their own."""


@dataclass(frozen=True)
class Case:
    """A command that must be refused. name: what is wrong, `group: what`."""

    name: str
    arguments: tuple[str, ...]

    @property
    def group(self) -> str:
        return self.name.partition(":")[0]


@dataclass(frozen=True)
class Answer:
    """What a command came to. code: its exit code, or minus the signal that ended it; wrong: why it is no refusal, or "".

    seconds: from its start to its end, without those in which it waited for a core that others had.
    """

    case: Case
    code: int
    seconds: float
    bytes: int
    said: str
    wrong: str


# --- the options of every command ----------------------------------------------------------------------------------------

PROMPTS = ("--prompt-original", "a red fish", "--prompt-edit", "a blue star")


def bases(files: Files) -> dict[str, tuple[str, ...]]:
    """What a command is given beside the option that is bad, so that nothing else is; arguments before options."""
    return {
        "inject sweep": (*PROMPTS, "--num-steps", "2"),
        "inject image": (*PROMPTS, "--num-steps", "2", "--layers", "@mid"),
        "inject script": (files.script, *PROMPTS, "--num-steps", "2", "--layers", "@mid"),
        "latents encode": ("avatar-vae",),
        "layers": ("mini-sd",),
        "inspect": ("mini-sd", "--no-browser"),
        "zoo train": ("avatar-vae",),
        "zoo evaluate": ("avatar-vae",),
    }


FREE = {"--prompt", "--prompt-original", "--prompt-edit"}
"""Options whose text may be anything that says something."""

WRITTEN = {"--out", "--checkpoints"}
"""Paths that are written to."""

NUMBERS = ("x", "", " ", "0x10", "1e3", "nan", "9" * 5000, "10**20", str(10**20), "-1e9", "1,2", "１２x", "--", "[/x]")
TEXTS = ("", " ", "\t", "\udcff", "a\udcffb", "\x1b[31mred", "a\x00b", "x" * 20_000)
GARBAGE = ("[/x]", "$\\frac$", "a" * 250, "%s%n%n", "../../../../../etc/passwd", "<script>alert(1)</script>", "nöt-thére", ",")


def option_cases(files: Files) -> Iterator[Case]:
    """Every option of every command, with values of each class that its kind must refuse."""
    from probekit import cli
    from probekit.experiments import EXPERIMENTS, find
    from probekit.experiments.latents_encode import LatentsEncode
    from probekit.runs.experiment import options_of

    commands: dict[str, Any] = {" ".join(name.rsplit("-", 1)): (find(name), cli._How) for name in EXPERIMENTS}
    commands |= {"latents encode": (LatentsEncode,)}
    commands |= {"layers": (cli.layers,), "models": (cli.models,), "describe": (cli.describe,)}
    commands |= {"zoo train": (cli.train,), "zoo evaluate": (cli.evaluate,), "inspect": (cli.inspect,)}
    for command, made in commands.items():
        for option in (option for part in made for option in options_of(part)):
            for value in _bad_values(option, files):
                base = list(bases(files).get(command, ()))
                if option.flag.startswith("--"):
                    given = [option.flag, value]
                    while option.flag in base:  # in its place
                        at = base.index(option.flag)
                        del base[at : at + 2]
                    arguments = [*base, *given]
                else:
                    rest = base[1:] if base and not base[0].startswith("--") else base
                    arguments = [*rest, "--", value]
                out = ["--out", f"{THERE}/new"] if command in OUTPUTS and option.flag != "--out" else []
                told = value if len(value) < 40 else f"{value[:30]}… ({len(value)})"
                yield Case(f"options: {command} {option.flag} {told!r}", (*command.split(), *out, *arguments))


OUTPUTS = {"inject sweep", "probe run", "stitch run", "noise-map run", "invert run", "latents encode"}


def _bad_values(option: Any, files: Files) -> list[str]:
    if option.kinds[0] is bool:
        return []
    if int in option.kinds or float in option.kinds:
        beyond = [f"{option.most * 10 + 1:.0f}", f"{option.least - 1:.0f}"]
        return [*beyond, *(["1.5"] if float not in option.kinds else ["inf", "-inf", "1e400"]), *_of(NUMBERS, option)]
    if Path in option.kinds:
        return [*TEXTS, *(files.unwritable if option.flag in WRITTEN else files.unreadable)]
    return [*TEXTS, *(() if option.flag in FREE else GARBAGE)]


def _of(numbers: Sequence[str], option: Any) -> list[str]:
    """Those that are no such number."""

    def bad(text: str) -> bool:
        try:
            value = float(text) if float in option.kinds else int(text)
        except ValueError:
            return True
        return not option.least <= value <= option.most

    return [text for text in numbers if bad(text)]


# --- running them --------------------------------------------------------------------------------------------------------


def warm() -> None:
    """Import all that a command may, so that its children need not; as users do, without the tests' checks of shapes."""
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)
    os.environ.pop("HF_HUB_OFFLINE")
    import diffusers
    import pandas
    import torch
    import transformers
    import zarr
    from diffusers import AutoPipelineForText2Image, StableDiffusionPipeline
    from transformers import CLIPTextModel, CLIPTokenizer

    from probekit.experiments import EXPERIMENTS, find

    torch.set_num_threads(1)
    for name in EXPERIMENTS:
        find(name)
    _ = (
        diffusers,
        pandas,
        transformers,
        zarr,
        AutoPipelineForText2Image,
        StableDiffusionPipeline,
        CLIPTextModel,
        CLIPTokenizer,
    )


def _draw_avatars() -> None:
    """Draw the first ones that are asked for: a thousand take as long as a refusal may."""
    from probekit.data import load_data

    data = load_data("avatars", 32)
    data.images(data.split("test")[:1])


def _state(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder, with size and time of change."""
    return {
        str(path.relative_to(folder)): ((found := path.lstat()).st_size * path.is_file(), found.st_mtime_ns * path.is_file())
        for path in folder.rglob("*")
    }


class _Child:
    """A case that is being run in its own folder and process group."""

    def __init__(self, case: Case, there: Path, *, own_process: bool) -> None:
        self.case, self.there, self.limit = case, there, SECONDS
        self.folder = Path(tempfile.mkdtemp(dir=there.parent))
        self.before = _state(there)
        self.started, self.queued, self.most, self.late = time.monotonic(), 0.0, 0, ""
        arguments = [argument.replace(THERE, str(there)) for argument in case.arguments]
        self.out, self.err = (there.parent / f"{self.folder.name}.{name}" for name in ("out", "err"))
        if own_process:
            command = [sys.executable, "-c", "from probekit.cli import main; main()", *arguments]
            with self.out.open("wb") as out, self.err.open("wb") as err:
                process = subprocess.Popen(command, cwd=self.folder, stdout=out, stderr=err, start_new_session=True)
            self.pid = process.pid
        elif (pid := os.fork()) == 0:
            self._be(arguments)
        else:
            self.pid = pid

    def _be(self, arguments: Sequence[str]) -> None:
        code = 70
        try:
            os.setsid()
            for number, file in ((1, self.out), (2, self.err)):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os.chdir(self.folder)
            sys.argv = ["probekit", *arguments]
            from probekit.cli import main

            try:
                main()
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
            except BaseException:
                import traceback

                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)

    def poll(self) -> Answer | None:
        """The answer, once it is over; what takes too long or too much is ended."""
        with contextlib.suppress(OSError, ValueError, IndexError):  # other work on this machine is not the command's
            self.queued = int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[1]) / 1e9
        pid, status, used = os.wait4(self.pid, os.WNOHANG)
        seconds = time.monotonic() - self.started - self.queued
        if pid:
            return self._answer(os.waitstatus_to_exitcode(status), seconds, max(self.most, used.ru_maxrss * 1024))
        with contextlib.suppress(OSError, ValueError, IndexError):
            self.most = max(self.most, int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * resource.getpagesize())
        if not self.late and (seconds > self.limit or self.most > BYTES):
            self.late = f"takes more than {self.limit:g} s" if seconds > self.limit else "takes more than 4 GB"
            with contextlib.suppress(OSError):
                os.killpg(self.pid, signal.SIGKILL)
        return None

    def _answer(self, code: int, seconds: float, most: int) -> Answer:
        said = self.err.read_bytes().decode(errors="replace")
        printed = self.out.read_bytes().decode(errors="replace")
        wrong = [self.late] if self.late else []
        if code != 2 and not self.late:
            wrong.append(f"exit code {code}")
        if not self.late and (said.count("\n") != 1 or not said.startswith("probekit: ") or len(said) > LINE):
            wrong.append(f"{said.count(chr(10))} lines of {len(said)} characters")
        if printed.strip():
            wrong.append(f"says {printed.strip()[:80]!r} beside it")
        now = _state(self.there)
        if any(now.get(path) != kept for path, kept in self.before.items()):
            wrong.append("results that were there are changed")
        for path in sorted(now.keys() - self.before.keys(), reverse=True):  # a new run's folder, without results
            (self.there / path).rmdir() if (self.there / path).is_dir() else (self.there / path).unlink()
        if left := sorted(path for path in _state(self.folder) if path.partition("/")[0] != "runs"):
            wrong.append(f"leaves {left[0]}")
        shutil.rmtree(self.folder)
        self.out.unlink()
        self.err.unlink()
        return Answer(self.case, code, seconds, most, said, "; ".join(wrong))


def run(cases: Sequence[Case], there: Path, jobs: int, *, own_process: bool = False, limit: float = SECONDS) -> list[Answer]:
    """The answers to all cases, in order; `jobs` at a time, each with results of its own that must stay."""
    slots = [there.parent / f"slot-{number}" / "there" for number in range(jobs)]
    for slot in slots:
        shutil.copytree(there, slot, symlinks=True, dirs_exist_ok=True)
    answers: dict[Case, Answer] = {}
    waiting, running = list(reversed(cases)), dict[Path, _Child]()
    while waiting or running:
        for slot in slots:
            if slot not in running and waiting:
                running[slot] = _Child(waiting.pop(), slot, own_process=own_process)
                running[slot].limit = limit
            if slot in running and (answer := running[slot].poll()) is not None:
                answers[answer.case] = answer
                del running[slot]
                if answer.wrong:
                    _tell(answer)
                if "changed" in answer.wrong:
                    shutil.rmtree(slot)
                    shutil.copytree(there, slot, symlinks=True)
        time.sleep(0.01)
    return [answers[case] for case in cases]


def chosen(files: Files, seed: int, count: int) -> list[Case]:
    """So many cases, drawn by the seed: three in five are special ones, of each group its share, the rest options in turn."""
    drawn = random.Random(seed)
    groups: dict[str, list[Case]] = {}
    for name, arguments in files.cases():
        groups.setdefault(name.partition(":")[0], []).append(Case(name, tuple(arguments)))
    share = min(1.0, 0.6 * count / sum(map(len, groups.values())))
    special = [case for group in groups.values() for case in drawn.sample(group, math.ceil(share * len(group)))]
    by_option: dict[str, list[Case]] = {}
    for case in option_cases(files):
        by_option.setdefault(" ".join(case.name.split()[:4]), []).append(case)
    pools = [drawn.sample(pool, len(pool)) for pool in by_option.values()]
    in_turn: list[Case] = []
    while any(pools):
        drawn.shuffle(pools)
        in_turn += [pool.pop() for pool in pools if pool]
    return [*special, *in_turn][:count]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the harness; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="Cases whose name matches this pattern.")
    parser.add_argument("--all", action="store_true", help="Every case that there is.")
    options = parser.parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="probekit-inputs-") as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        warm()
        files = Files.made(folder / "files")
        _draw_avatars()
        drawn = chosen(files, options.seed, 10**9 if options.all else options.count)
        cases = [case for case in drawn if re.search(options.only, case.name)]
        answers = run(cases, files.there, options.jobs)
        sample = random.Random(options.seed).sample(cases, min(PROCESSES, len(cases))) if not options.only else []
        # in a process of its own the imports count, which take the most of it
        sample = [case for case in sample if not any("\0" in argument for argument in case.arguments)]
        apart = run(sample, files.there, options.jobs, own_process=True, limit=3 * SECONDS)
    return _told([*answers, *apart], len(apart), time.monotonic() - started)


def _told(answers: Sequence[Answer], apart: int, seconds: float) -> int:
    """Print what came out; the exit code."""
    groups: dict[str, int] = {}
    here = answers[: len(answers) - apart]
    for answer in here:
        groups[answer.case.group] = groups.get(answer.case.group, 0) + 1
    print(", ".join(f"{group} {count}" for group, count in groups.items()))
    slowest, largest = max(here, key=lambda a: a.seconds), max(here, key=lambda a: a.bytes)
    print(
        f"{len(here)} bad inputs: {sum(not a.wrong for a in here)} refused in one line, with exit code 2, nothing changed; "
        f"slowest {slowest.seconds:.1f} s ({slowest.case.name}), largest {largest.bytes / 2**30:.2f} GiB ({largest.case.name})"
    )
    if apart:
        alone = answers[-apart:]
        print(
            f"{apart} of them in a process of their own: {sum(not a.wrong for a in alone)} refused, "
            f"slowest {max(a.seconds for a in alone):.1f} s, imports included"
        )
    print(f"{seconds:.0f} s in all")
    return int(any(answer.wrong for answer in answers))


def _tell(answer: Answer) -> None:
    print(f"WRONG {answer.case.name}\n  {answer.wrong}\n  {' '.join(answer.case.arguments)[:300]!r}")
    print("  " + "\n  ".join(answer.said.strip()[-600:].splitlines()[-6:]), flush=True)


def test_500_bad_inputs_are_refused_in_one_line_each() -> None:
    # in a process of its own, without the tests' checks of shapes and threads
    command = [sys.executable, "-m", "tests.hardening.inputs", "--seed", os.environ.get("HARDEN_SEED", "0"), "--jobs", "1"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    told = Path("build/hardening/inputs.txt")
    told.parent.mkdir(parents=True, exist_ok=True)
    told.write_text(done.stdout)
    assert done.returncode == 0, done.stdout


if __name__ == "__main__":
    sys.exit(main())
