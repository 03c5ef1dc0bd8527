"""Where questions are answered: one at a time, the newest of each tab, on the one model that is loaded."""

from __future__ import annotations

import dataclasses
import functools
import json
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from probekit import hooks
from probekit.bundled import PIPELINES
from probekit.data.scenes import FACTORS, VALUES
from probekit.experiments.inject_picture import InjectImage
from probekit.hooks.errors import ProbekitError
from probekit.images import load_png
from probekit.inspector.preview import Preview, url
from probekit.models import Model, given
from probekit.report import picture as report
from probekit.report.network import drawn, form
from probekit.report.picture import TOGETHER
from probekit.runs.experiment import Work
from probekit.runs.folder import Run

Event = dict[str, Any]
"""A line of an answer, as JSON."""

Say = Callable[[Event], None]

KEPT = 200
"""Answers that can still be saved as runs; older ones can be asked again."""

AT_ONCE = 2**29
"""Bytes up to which every layer of E is captured before anyone asks for it."""

_PAIRS = 4
"""Pairs whose O, E and captured activations are kept."""

_KEYS = {field.name for field in dataclasses.fields(InjectImage)} - {
    *("model", "device", "dtype", "variant", "offload", "apart", "windows")
}
"""The keys of a question: the options of `inject image`."""

_SIDES = ("image_original", "image_edit")

_OF_LAYERS = ("layers", "stream", "operation", "weight", "steps", "words", "mask", "apart", "windows")
"""Those of them in which questions of one pair may differ."""


class Stopped(Exception):
    """What was computed is no longer wanted."""


class Desk:
    """A loaded text-to-image model with what it has made: O and E of the last pairs, and the last answers.

    All of it is computed in one thread, a question after the other. A tab's newer question takes the place of its older one,
    whether that one waits or is being answered.

    folder: a temporary one, for pictures that are given and for runs of Ray. dtype: the precision as it was asked for.
    engine: who sweeps, `local` or `ray[:ADDRESS]`. Raises ProbekitError for a model that takes no prompt.
    """

    def __init__(self, model: Model, folder: Path, dtype: str = "auto", engine: str = "local") -> None:
        self.model, self._folder, self._dtype, self._engine = model, folder, dtype, engine
        self._painter = model.painter
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="desk")
        self._newest: dict[str, object] = {}
        self._pairs: OrderedDict[str, InjectImage] = OrderedDict()
        self._answers: OrderedDict[str, tuple[InjectImage, dict[str, Work]]] = OrderedDict()
        self._given: dict[str, Path] = {}
        self._preview = Preview()
        self._guard = threading.Lock()
        self._number = 0
        self._computing = False

    def close(self) -> None:
        """Stop everything that is computed."""
        self._newest.clear()
        self._worker.shutdown(cancel_futures=True)

    # --- what a page is told first ----------------------------------------------------------------------------------------

    @functools.cached_property
    def about(self) -> dict[str, Any]:
        """The model for a page: its network, what captions are made of, and the question to start with."""
        scenes, own = self.model.name in PIPELINES, self.model.layers
        return {
            "name": self.model.name,
            "form": form(own),
            "layers": drawn(own),
            "default_layers": self._default_layers,
            "values": {name: list(values) for name, values in VALUES.items()} if scenes else None,
            "factors": {name: list(values) for name, values in FACTORS.items()} if scenes else None,
            "colours": report.CAME,
            "question": self.first,
            "inversions": list(given.METHODS) if self._inverts else [],
            "engine": self._engine.partition(":")[0],
        }

    @functools.cached_property
    def _default_layers(self) -> list[str]:
        return [layer.name for layer in hooks.select(self.model.layers, hooks.default_layers(self.model.denoiser))]

    @functools.cached_property
    def first(self) -> dict[str, Any]:
        """The question that a page starts with: two captions, no layer."""
        scenes = self.model.name in PIPELINES
        original, edit = SCENES if scenes else PHOTOGRAPHS
        known = {field.name: field.default for field in dataclasses.fields(InjectImage) if field.name in _KEYS}
        guidance = self._painter.defaults.get("guidance_scale")
        return known | {
            "prompt_original": original,
            "prompt_edit": edit,
            "layers": [],
            "num_steps": 12 if scenes else 20,
            "guidance": guidance,
        }

    @property
    def _inverts(self) -> bool:
        try:
            _ = self._sampled
        except ProbekitError:
            return False
        return True

    @functools.cached_property
    def _sampled(self) -> Model:
        """The model, sampled so that it can be inverted. Raises ProbekitError as `invertible`."""
        return given.invertible(self.model)

    # --- questions --------------------------------------------------------------------------------------------------------

    def question(self, told: Any, **more: Any) -> InjectImage:
        """The question that a page tells, with the O and E that an earlier one of the pair has made.

        more: options that are no part of it. Raises ProbekitError, naming the key, for what is no question.
        """
        if not isinstance(told, dict):
            raise ProbekitError(f"question {str(told)[:60]!r}: must be an object of keys and values")
        if odd := sorted(set(map(str, told)) - _KEYS):
            raise ProbekitError(f"question: unknown key {odd[0]!r}; known: {', '.join(sorted(_KEYS))}")
        asked = self.first | told | more
        for side in _SIDES:
            if (ident := asked[side]) is not None:
                if ident not in self._given:
                    raise ProbekitError(f"{side} {str(ident)[:60]!r}: this picture is not here; give it again")
                asked[side] = self._given[ident]
        made = InjectImage(**asked, model=self.model.name, dtype=self._dtype)
        pictured = made.image_original is not None or made.image_edit is not None
        made.__dict__["loaded"] = self._sampled if pictured else self.model
        key = json.dumps({name: value for name, value in made.options.items() if name not in _OF_LAYERS}, sort_keys=True)
        if (before := self._pairs.get(key)) is not None:
            shared = ("_starts", "swap", "_seen")
            made.__dict__.update({name: before.__dict__[name] for name in shared if name in before.__dict__})
        self._pairs[key] = made
        self._pairs.move_to_end(key)
        while len(self._pairs) > _PAIRS:
            self._pairs.popitem(last=False)
        return made

    def words(self, prompt: str) -> list[dict[str, Any]]:
        """The words of a caption that tokens stand for, and where the first of each stands."""
        return [{"word": word, "at": at[0]} for word, at in self._painter.words(prompt)]

    def give(self, name: str, content: bytes) -> Event:
        """Keep a picture that is given, under a name of its own. Raises ProbekitError for what is no picture."""
        with self._guard:
            self._number += 1
            folder = self._folder / f"given-{self._number}"
        folder.mkdir()
        file = folder / (Path(name.replace("\\", "/")).name.lstrip(".")[:80] or "picture")
        file.write_bytes(content)
        size = self._sampled.diffusion.image_size
        try:
            picture, digest = given.read(file, size)
        except ProbekitError as error:
            file.unlink()
            raise ProbekitError(str(error).replace(str(file), file.name)) from error
        self._given[digest] = file
        return {"id": digest, "url": url(picture), "name": file.name}

    # --- answers ----------------------------------------------------------------------------------------------------------

    def ask(self, tab: str, told: Any) -> Iterator[Event]:
        """The lines that answer a question; with no layers O and E alone."""
        return self._lines(tab, lambda say, check: self._ask(told, say, check))

    def sweep(self, tab: str, told: Any, windows: int = 1) -> Iterator[Event]:
        """The lines that tell of every layer of a pair, one by one; with several windows also at each part of the steps."""
        return self._lines(tab, lambda say, check: self._sweep(told, windows, say, check))

    def stop(self, tab: str) -> None:
        """Stop what is computed for a tab, and what waits for it."""
        self._newest.pop(tab, None)

    def _lines(self, tab: str, answer: Callable[[Say, Callable[[], None]], None]) -> Iterator[Event]:
        ticket = self._newest[tab] = object()
        lines: queue.SimpleQueue[Event | None] = queue.SimpleQueue()

        def check() -> None:
            if self._newest.get(tab) is not ticket:
                raise Stopped

        def work() -> None:
            try:
                check()
                self._computing = True
                answer(lines.put, check)
            except Stopped:
                lines.put({"replaced": True})
            except ProbekitError as error:
                lines.put({"error": " ".join(str(error).split())})
            except Exception as error:  # of torch or diffusers: the page says it, and the server lives on
                lines.put({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"})
            finally:
                self._computing = False
                lines.put(None)

        busy, job = self._computing, self._worker.submit(work)
        try:
            if busy:
                yield {"waiting": True}
            while True:
                try:
                    line = lines.get(timeout=0.1)
                except queue.Empty:
                    if self._newest.get(tab) is not ticket and job.cancel():
                        yield {"replaced": True}
                        return
                    continue
                if line is None:
                    return
                yield line
        finally:  # also where the page has gone
            job.cancel()
            if self._newest.get(tab) is ticket:
                del self._newest[tab]

    def _ends(self, made: InjectImage, check: Callable[[], None]) -> Event:
        """O and E, made where they were not yet, with the layers of E that a page shows first."""
        last: list[Tensor] = []

        def on_step(step: int, state: Tensor | None) -> None:
            check()
            last[:] = [state] if state is not None else []

        original = made.swap.make_original(on_step)
        if last and not self._preview.fitted:
            self._preview.fit(last[0], original[None])
        made.swap.take(self._at_once(made), on_step)
        return {"start": {"O": url(original), "E": url(made.swap.edit), "words": self.words(made.prompt_edit)}}

    def _at_once(self, made: InjectImage) -> list[tuple[str, str | None]]:
        """What of E is captured while it is made: every layer and what it has of the text; where that is much, the tiles'."""
        own = [layer for layer in self.model.layers if layer.name.split(".")[0] not in hooks.TEXT_ENCODERS]
        every = [(la.name, stream) for la in own for stream in (None, *(["text"] if "text" in la.streams else []))]
        if sum(made.swap.size_of(name) for name, _ in every) <= AT_ONCE:
            return every
        return [(name, None) for name in self._default_layers]

    def _ask(self, told: Any, say: Say, check: Callable[[], None]) -> None:
        began = time.perf_counter()
        layers = told.get("layers") if isinstance(told, dict) else None
        made = self.question(told if layers or not isinstance(told, dict) else told | {"layers": self._default_layers})
        if layers:
            made.rule(made.asked[TOGETHER])  # refuses what cannot be asked before anything is made
        say(self._ends(made, check))
        if not layers:
            say({"ready": True})
            return

        def on_step(step: int, state: Tensor | None) -> None:
            check()
            if step >= 0:
                say({"step": step + 1, "of": made.num_steps, "picture": self._preview(state)})

        work = made.answer(TOGETHER, on_step)
        rows = pd.DataFrame(work.rows)
        told = {
            "id": self._keep(made, {TOGETHER: work}),
            "picture": url(work.pictures["result"]),
            "O": url(work.pictures["O"]),
            "E": url(work.pictures["E"]),
            "says": report.says(rows),
            "read": report.read(rows),
            "measures": report.measures(rows),
            "caption": self._caption(made),
            "seconds": round(time.perf_counter() - began, 2),
        }
        say({"answer": told | self._copies(made)})

    def _sweep(self, told: Any, windows: int, say: Say, check: Callable[[], None]) -> None:
        if not isinstance(told, dict):
            raise ProbekitError(f"question {str(told)[:60]!r}: must be an object of keys and values")
        # a stream and words are of chosen layers; the sweep's are others
        pair = {key: value for key, value in told.items() if key not in ("stream", "words", "layers")}
        parts = {"windows": windows} if windows > 1 else {}
        made = self.question(pair, layers=self._default_layers, apart=True, **parts)
        units = made.asked
        say(self._ends(made, check))
        found: dict[str, Work] = {}
        try:
            for unit, work in self._each(made, check):
                found[unit] = work
                rows = pd.DataFrame(work.rows)
                whole = next(one for one in report.measures(rows) if one["name"] == "LPIPS")
                say(
                    {
                        "tile": {
                            "window": units[unit].window,
                            "layer": units[unit].layers[0],
                            "picture": url(work.pictures["result"]),
                            "colour": report.shade(rows),
                            "says": report.says(rows),
                            "came": report.came(rows),
                            "transfer": whole["transfer"],
                        }
                    }
                )
        except Stopped:
            told = {"done": len(found), "of": len(units), "says": f"stopped at {len(found)} of {len(units)}"}
            kept = {"id": self._keep(made, found), **self._copies(made)} if found else {"id": None}
            say({"stopped": told | kept})
            return
        rows = pd.concat([pd.DataFrame(work.rows) for work in found.values()], ignore_index=True)
        says = report.of_layers(rows, list(made.windows_by_label), [layer.name for layer in made.chosen])
        say({"done": {"id": self._keep(made, found), "says": says, **self._copies(made)}})

    def _each(self, made: InjectImage, check: Callable[[], None]) -> Iterator[tuple[str, Work]]:
        """Every unit of a sweep with its work, as it is done."""
        if self._engine != "local":
            yield from self._by_ray(made, check)
            return
        made.swap.take([(layer.name, made.stream) for layer in made.chosen], lambda step, state: check())
        for unit in made.asked:
            yield unit, made.answer(unit, lambda step, state: check())

    def _by_ray(self, made: InjectImage, check: Callable[[], None]) -> Iterator[tuple[str, Work]]:
        """The same command with Ray, in a process of its own, whose units are taken from its folder as they come."""
        with self._guard:
            self._number += 1
            folder = self._folder / f"ray-{self._number}"
        words = [*made.command[1:], "--engine", self._engine, "--out", str(folder)]
        start = [sys.executable, "-c", "from probekit.cli import main; main()", *words]
        with (self._folder / f"{folder.name}.log").open("w+") as log:
            process = subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=log)
            try:
                missing, run = dict.fromkeys(made.asked), None
                while missing:
                    ended = process.poll()
                    if run is None and (folder / "config.json").exists():
                        run = Run.opened(folder)
                    for unit in [unit for unit in missing if run is not None and run.finished(unit)]:
                        assert run is not None
                        pictures = {name: load_png(run.picture(unit, name)) for name in ("O", "E", "result")}
                        yield unit, Work(run.rows([unit]), pictures)
                        del missing[unit]
                    if missing and ended is not None:
                        log.seek(0)
                        said = (log.read().strip().splitlines() or [f"ended with {ended}"])[-1]
                        raise ProbekitError(f"--engine {self._engine}: {said.removeprefix('probekit: ')[:300]}")
                    check()
                    time.sleep(0.1)
            finally:
                if process.poll() is None:
                    process.send_signal(signal.SIGINT)
                    try:
                        process.wait(20)
                    except subprocess.TimeoutExpired:
                        process.kill()

    # --- what is kept -----------------------------------------------------------------------------------------------------

    def _keep(self, made: InjectImage, found: dict[str, Work]) -> str:
        with self._guard:
            self._number += 1
            ident = f"{'s' if made.apart else 'a'}{self._number}"
            self._answers[ident] = (made, found)
            while len(self._answers) > KEPT:
                self._answers.popitem(last=False)
        return ident

    def save(self, ident: str) -> Path:
        """Write an answer as a run that `probekit describe` opens. Raises ProbekitError for one that is not kept."""
        if ident not in self._answers:
            raise ProbekitError(f"answer {ident[:60]!r}: is not kept any longer; ask it again")
        made, found = self._answers[ident]
        inputs = made.inputs()
        run = Run(made.default_folder(inputs), made.name, made.options, inputs, made.command)
        with run.held(shared=False):
            for unit, work in found.items():
                run.write(unit, work)
            if len(found) == len(made.asked):
                made.findings(run, run.collect(list(made.asked))).write()
        return run.folder

    def _copies(self, made: InjectImage) -> dict[str, str]:
        """What gives the same picture elsewhere; pictures that were given are called as they were where they came from."""
        original, edit = (file and Path(file.name) for file in (made.image_original, made.image_edit))
        named = dataclasses.replace(made, image_original=original, image_edit=edit)
        return {"command": shlex.join(named.command), "python": _python(made, named)}

    def _caption(self, made: InjectImage) -> str:
        """A line to go below a saved picture."""
        how = {"replace": "from E", "bypass": "left out", "blend": f"blended in from E by {made.weight or 1:g}"}
        told = how.get(made.operation, f"of E added, times {made.weight or 1:g}")
        where = ", ".join(la.name for la in made.chosen) + (f" ({made.stream})" if made.stream else "")
        when = "" if made.steps == "all" else f", steps {made.steps} of {made.num_steps}"
        only = f", words “{made.words}” only" if made.words else ""
        only += ", inside an area only" if made.mask else ""
        return f"{self.model.name}: O “{made.prompt_original}” with {where} {told}{when}{only}; E “{made.prompt_edit}”"


SCENES = (
    "a small white moon at the right on a dotted green ground",
    "a large red fish at the top left on a striped purple ground",
)
PHOTOGRAPHS = ("a photograph of a cat on a sofa", "a painting of a dog in a forest")


def _python(made: InjectImage, named: InjectImage) -> str:
    """A script that gives the same picture, `picture`; of a sweep, and of pictures that are given, the same run.

    named: the same question, with the names of given pictures.
    """
    if made.apart or made.image_original or made.image_edit:
        defaults = {field.name: field.default for field in dataclasses.fields(named)}
        chosen = {key: value for key, value in named.options.items() if value != defaults[key]}
        arguments = "".join(f"    {key}={value!r},\n" for key, value in chosen.items())
        return f"from probekit.experiments import InjectImage\n\nfindings = InjectImage(\n{arguments}).run()\n"
    edit = made.noise if made.noise_edit is None else made.noise_edit
    told = {"seed": made.seed or None, "num_inference_steps": made.num_steps, "guidance_scale": made.guidance_scale}
    shared = "".join(f", {key}={value!r}" for key, value in told.items() if value is not None)
    weight = 1.0 if made.weight is None else made.weight
    asked = made.asked[TOGETHER]
    parts = []
    if made.operation == "bypass":
        parts.append("source=hooks.Nothing()")
    if made.steps != "all":
        parts.append(f"steps=hooks.Steps.parse({made.steps!r})")
    if made.operation in ("blend", "add"):
        parts.append(f"operation=hooks.{made.operation}({weight!r})")
    if made.stream is not None:
        parts.append(f"stream={made.stream!r}")
    if made.mask is not None:
        parts.append(f"mask=read_mask({made.mask!r})")
    if made.words is not None:
        parts.append(f"tokens={made.rule(asked)[0].tokens!r}")
    more = "".join(f", {part}" for part in parts)
    rule = "".join(f"    hooks.Injection({name!r}{more}),\n" for name in asked.layers)
    load = f"load({made.model!r})" if made.dtype == "auto" else f"load({made.model!r}, dtype={made.dtype!r})"
    reads = "from probekit.experiments.inject_picture import read_mask\n" if made.mask is not None else ""
    return (
        f"from probekit import hooks, load\n{reads}from probekit.images import save_png\n\n"
        f"original = ({made.prompt_original!r}, {made.noise})  # O: its prompt and its noise's number\n"
        f"edit = ({made.prompt_edit!r}, {edit})  # E\n"
        f"swap = {load}.swap(original, edit{shared})\n"
        f'rule = [\n{rule}]\npicture = swap(rule)  # (3, h, w) in [-1, 1]\nsave_png(picture, "picture.png")\n'
    )
