"""What every layer of a denoiser knows of a picture, at every time; and whether what knows a factor also carries it."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from probekit.experiments.loading import Dtype, Variant
from probekit.hooks.errors import ProbekitError
from probekit.runs.experiment import Bench, Experiment, Findings, Unit, Work, whole_numbers

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import torch
    from torch import Tensor

    from probekit import hooks
    from probekit.data.dataset import Dataset
    from probekit.latents.ridge_probes import Reader, Task
    from probekit.models import Model
    from probekit.runs.folder import Run
    from probekit.sampling import Diffusion

NETWORKS = ("trained", "untrained")
WITH, WITHOUT, SAMPLING = "with", "without", "sampling"
"""Conditions: images noised with their caption, and without; and while sampling."""
PIXELS, INPUT = "pixels", "input"
"""What stands beside the layers: the picture's own pixels, and what the network is given."""
EIGHTHS = (7, 5, 3, 1)
"""The default timesteps in eighths of the schedule: the middles of the four windows of `inject sweep --by-time`."""
SHOWN = 4
LARGEST = 64  # pixels of a side; of larger pictures the probe of pixels would not fit in memory
_OF_A_LAYER = 15  # the probes of a layer take the time of so many images


@dataclass(frozen=True, kw_only=True)
class ProbeLayers(Experiment):
    """Read every label off every layer of a denoiser at chosen times, and see which layers know what they do not carry."""

    name: ClassVar[str] = "probe-layers"

    model: Annotated[str, typer.Option(help="A bundled model, a folder, a hub id, or one of the papers' files.")] = "mini-sd"
    data: Annotated[str, typer.Option(help="avatars, scenes, celeba:PATH, folder:PATH or a folder, with labels.")] = "scenes"
    train: Annotated[int, typer.Option(min=20, help="Images that probes are fitted on.")] = 400
    test: Annotated[int, typer.Option(min=10, help="Images that they are tested on.")] = 200
    timesteps: Annotated[
        str | None,
        typer.Option(help="Timesteps of the schedule, separated by commas. [default: 7, 5, 3 and 1 eighths of it]"),
    ] = None
    captions: Annotated[
        str | None,
        typer.Option(help="Whether the network is told the captions: with, without or both. [default: both, where there are]"),
    ] = None
    during: Annotated[str, typer.Option("--while", help="noised (images with noise added) or sampling (from noise).")] = (
        "noised"
    )
    num_steps: Annotated[int | None, typer.Option(min=1, help="Steps of --while sampling. [default: 20]")] = None
    guidance: Annotated[
        float | None, typer.Option(min=1, help="Guidance scale of --while sampling. [default: 3 for bundled models, else 1]")
    ] = None
    layers: Annotated[
        list[str] | None, typer.Option("--layers", help="Layer names, globs or groups such as @resnets; repeat for more.")
    ] = None
    grid: Annotated[int, typer.Option(min=1, max=64, help="Positions a side that a probe reads of a layer's picture.")] = 4
    against: Annotated[
        Path | None, typer.Option(help="The folder of a finished inject sweep of the same model: knows against carries.")
    ] = None
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of noise, bootstrap, control and random weights.")] = 0
    dtype: Dtype = "auto"
    variant: Variant = None
    batch_size: Annotated[int, typer.Option(min=1, max=256, help="How many pictures go through the model at a time.")] = field(
        default=32, compare=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.during not in ("noised", SAMPLING):
            raise ProbekitError(f"--while {self.during!r}: choose noised or sampling")
        for flag, value in (("--num-steps", self.num_steps), ("--guidance", self.guidance)):
            if value is not None and self.during != SAMPLING:
                raise ProbekitError(f"{flag} {value:g}: goes with --while sampling")
        if self.captions not in (None, WITH, WITHOUT, "both"):
            raise ProbekitError(f"--captions {self.captions!r}: choose with, without or both")
        if self.captions is not None and self.during == SAMPLING:
            raise ProbekitError(f"--captions {self.captions!r}: --while sampling pictures are made from their captions")
        if self.timesteps is not None:
            timesteps(self.timesteps)

    # --- what is probed ---------------------------------------------------------------------------------------------------

    @property
    def subject(self) -> str:
        """The model's name."""
        return Path(self.model).name

    @functools.cached_property
    def loaded(self) -> Model:
        """The model. Raises ProbekitError as `probekit.load`."""
        from probekit.models import load

        return load(self.model, device=self.device, dtype=self.dtype, variant=self.variant)

    @functools.cached_property
    def diffusion(self) -> Diffusion:
        """How it goes from noise to images; while sampling, guided. Raises ProbekitError for a model that does not."""
        model = self.loaded
        if self.during == SAMPLING:
            if model.diffusion.captioned is None:
                raise ProbekitError(f"--while sampling: model {model.name!r} takes no captions to say what its pictures show")
            guidance = self.guidance if self.guidance is not None else model.painter.defaults.get("guidance_scale", 1.0)
            model = model.conditioned(guidance=guidance)
        return model.diffusion

    @functools.cached_property
    def images(self) -> Dataset:
        """The data set in the size of the model's images. Raises ProbekitError as `load_data`."""
        from probekit.data import load_data

        return load_data(self.data, self.diffusion.image_size)

    @functools.cached_property
    def numbers(self) -> np.ndarray:
        """The images' numbers, those to fit on first; of the test split, which the models were not trained on, if it is enough.

        Raises ProbekitError where the data set is too small.
        """
        import numpy as np

        index, wanted = self.images.split("test"), self.train + self.test
        if len(index) < wanted:
            index = np.concatenate([self.images.split("train"), index])  # a small data set: what there is
        if len(index) < wanted:
            raise ProbekitError(f"--train {self.train} and --test {self.test}: {self.images.name} has {len(index)} images")
        return np.concatenate([index[: self.train], index[len(index) - self.test :]])

    @functools.cached_property
    def _tasks(self) -> tuple[list[Task], dict[str, str]]:
        from probekit.latents.ridge_probes import tasks

        return tasks(self.images.labels(self.numbers), self.train, self.seed)

    @functools.cached_property
    def reader(self) -> Reader:
        """What reads every label. Raises ProbekitError where there is none to read."""
        from probekit.latents.ridge_probes import Reader

        asked, skipped = self._tasks
        if not asked:
            why = "; ".join(f"{name}: {reason}" for name, reason in skipped.items()) or "it has no labels"
            raise ProbekitError(f"--data {self.data!r}: nothing to probe for ({why})")
        return Reader(asked, self.train, self.seed)

    @functools.cached_property
    def probed_layers(self) -> list[hooks.Layer]:
        """The layers, in execution order. Raises ProbekitError for those that the denoiser does not have."""
        from probekit import hooks

        network = self.diffusion.network
        return hooks.select(hooks.layers(network), self.layers or hooks.default_layers(network))

    @functools.cached_property
    def probed_timesteps(self) -> dict[float, int]:
        """The timesteps, noise first, and while sampling the step of each, else -1. Raises ProbekitError for what is none."""
        trained = int(self.diffusion.scheduler.config.num_train_timesteps)
        text = self.timesteps or ",".join(str(trained * part // 8) for part in EIGHTHS)
        wanted = sorted(timesteps(text), reverse=True)
        if outside := [t for t in wanted if not 0 <= t < trained]:
            raise ProbekitError(f"--timesteps {outside[0]}: the schedule has timesteps 0 to {trained - 1}")
        if self.during != SAMPLING:
            return dict.fromkeys(map(float, wanted), -1)
        told = self.diffusion.schedule(self.num_steps or 20).timesteps
        steps = sorted({min(range(len(told)), key=lambda step: abs(told[step] - t)) for t in wanted})
        return {told[step]: step for step in steps}

    @functools.cached_property
    def conditions(self) -> list[str]:
        """What the network is told. Raises ProbekitError for captions that model or data do not have."""
        if self.during == SAMPLING:
            self.images.captions(self.numbers[:1])
            return [SAMPLING]
        if self.captions == WITHOUT:
            return [WITHOUT]
        if self.diffusion.captioned is None:
            if self.captions is None:
                return [WITHOUT]
            raise ProbekitError(f"--captions {self.captions}: model {self.loaded.name!r} takes none")
        try:
            self.images.captions(self.numbers[:1])
        except ProbekitError as error:
            if self.captions is None:
                return [WITHOUT]
            raise ProbekitError(f"--captions {self.captions}: {error}") from error
        return [WITH] if self.captions == WITH else [WITH, WITHOUT]

    def inputs(self) -> dict[str, Any]:
        """Fingerprints of model and images, what options left open, and of --against what each layer carries."""
        diffusion, (asked, skipped) = self.diffusion, self._tasks
        found = {
            "model_digest": self.loaded.digest,
            "made_of": diffusion.made_of,
            "data_digest": self.images.digest,
            "conditions": self.conditions,
            "probed_layers": [la.name for la in self.probed_layers],
            "probed_timesteps": list(self.probed_timesteps),
            "factors": [task.name for task in self.reader.tasks],
            "skipped": skipped,
        }
        if self.against is not None:
            found["swept"] = swept(self.against, self.loaded.digest, [task.name for task in asked], self._windows)
        return found

    def _windows(self, label: str, num_steps: int) -> list[float]:
        """The probed timesteps that lie in a window of a sweep of that many steps."""
        from probekit import hooks

        told = self.diffusion.schedule(num_steps).timesteps
        inside = hooks.Steps.parse(label).resolve(told)
        return [t for t in self.probed_timesteps if min(range(len(told)), key=lambda i: abs(told[i] - t)) in inside]

    # --- the experiment ---------------------------------------------------------------------------------------------------

    def plan(self) -> list[Unit]:
        """The pixels and the noiseless states; then, trained and untrained, for every condition and time, all layers."""
        n, probes = self.train + self.test, _OF_A_LAYER * (len(self.probed_layers) + 1)
        units = [Unit(PIXELS, n)]
        for network in NETWORKS:
            if self.during == SAMPLING:
                size = n * (self.num_steps or 20) + probes * len(self.probed_timesteps)
                units.append(Unit(f"{network}-{SAMPLING}", size))
            else:
                units += [
                    Unit(f"{network}-{condition}-{t:g}", n + probes, needs=(PIXELS,))
                    for condition in self.conditions
                    for t in self.probed_timesteps
                ]
        return units

    def work(self, unit: Unit, bench: Bench) -> Work:
        """A row a layer, time, set of positions and label, with `Read`'s numbers; `values`: how many the probe is given.

        network: trained or untrained; condition: with, without or sampling. Of the unit `pixels` the rows are those of the
        picture's own pixels, its pictures the first images, its array `states` the images' noiseless states. In every other
        unit the layer `input` is what the network is given, whole as `grid`; a picture of it is given-NUMBER-TIMESTEP.
        """
        if unit.name == PIXELS:
            return self._pixels(bench)
        network, condition, *_ = unit.name.split("-")
        times = [t for t in self.probed_timesteps if unit.name in (f"{network}-{SAMPLING}", f"{network}-{condition}-{t:g}")]
        states = None if condition == SAMPLING else bench.arrays(PIXELS)["states"]
        with contextlib.ExitStack() as stack:
            if network == "untrained":
                from probekit.models.untrained import untrained

                stack.enter_context(untrained(self.diffusion.network, self.seed))
            spool = Spool(Path(stack.enter_context(tempfile.TemporaryDirectory())), self.train + self.test)
            pictures = self._activations(condition, times, states, spool, bench)
            rows = []
            for layer, t, positions, x in spool.each():
                if layer == INPUT and network == "untrained":
                    continue  # the same
                order = next((la.order for la in self.probed_layers if la.name == layer), -1)
                at = {
                    "network": network,
                    "condition": condition,
                    "t": t,
                    "order": order,
                    "layer": layer,
                    "positions": positions,
                }
                rows += [at | told for told in self._read(x)]
                bench.advance(_OF_A_LAYER // 2)
        return Work(rows, {name: picture for name, picture in pictures.items() if network == "trained"})

    def findings(self, run: Run, rows: pd.DataFrame) -> Findings:
        """Which layer knows what, first and best, and when; and which knows what it does not carry."""
        from probekit.report.layer_probes import findings

        return findings(run, rows)

    def _read(self, x: np.ndarray) -> list[dict[str, Any]]:
        numbers = {task.name for task in self.reader.tasks if task.number}
        return [
            {"factor": name, "measure": "r2" if name in numbers else "accuracy", "values": x.shape[1]} | asdict(read)
            for name, read in self.reader.read(x).items()
        ]

    def _pixels(self, bench: Bench) -> Work:
        import torch
        import torch.nn.functional as F

        from probekit.latents.positions import at_positions

        seen, states = [], []
        for part in self._parts():
            pictures = self.images.images(self.numbers[part])
            if self.during != SAMPLING:
                states.append(self.diffusion.encode(pictures))
            seen.append(F.adaptive_avg_pool2d(pictures, min(LARGEST, self.images.image_size)))
            bench.advance(len(pictures))
        pixels, rows = torch.cat(seen), []
        at = {"network": "", "condition": "", "t": float("nan"), "order": -2.0, "layer": PIXELS}
        for positions, x in {"grid": pixels.flatten(1), "mean": at_positions(pixels)["mean"]}.items():
            rows += [at | {"positions": positions} | told for told in self._read(x.numpy())]
        first = self.images.images(self.numbers[:SHOWN])
        arrays = {"states": torch.cat(states).numpy()} if states else {}
        return Work(rows, {f"image-{i}": picture for i, picture in enumerate(first)}, arrays)

    def _parts(self) -> Iterator[slice]:
        n = self.train + self.test
        return (slice(start, min(start + self.batch_size, n)) for start in range(0, n, self.batch_size))

    def _activations(
        self, condition: str, times: Sequence[float], states: np.ndarray | None, spool: Spool, bench: Bench
    ) -> dict[str, Tensor]:
        """Every layer's activations at the times, into the spool; returns pictures of what the network was given."""
        import torch

        from probekit import hooks
        from probekit.latents.positions import at_positions
        from probekit.sampling import sample

        diffusion, pictures = self.diffusion, dict[str, torch.Tensor]()
        schedule = diffusion.schedule(self.num_steps or 20) if condition == SAMPLING else None
        chosen = [la.name for la in self.probed_layers]
        for part in self._parts():
            rows = part.stop - part.start
            noise = diffusion.noise(range(part.start, part.stop), self.seed)
            if condition == WITHOUT:
                denoiser = diffusion.denoiser(rows)
            else:
                assert diffusion.captioned is not None
                denoiser = diffusion.captioned(self.images.captions(self.numbers[part]))
            told = list(schedule.timesteps) if schedule else times
            steps = [self.probed_timesteps[t] for t in times] if schedule else list(range(len(times)))
            capturing = hooks.capture(
                diffusion.network,
                chosen,
                schedule=[t * diffusion.told for t in told],
                rows=rows,
                steps=hooks.Steps(indices=tuple(steps)),
            )
            with torch.no_grad(), capturing as captured:
                if schedule:
                    counted = _counted(denoiser, lambda: bench.advance(rows))  # noqa: B023 (called within this turn)
                    kept = sample(counted, noise.to(diffusion.device), schedule, keep=steps).kept
                    given = [kept[step].float() for step in steps]
                else:
                    assert states is not None
                    clean = torch.from_numpy(states[part.start : part.stop])
                    given = [_noised(diffusion, clean, noise, t) for t in times]
                    for state, t in zip(given, times, strict=True):
                        denoiser(state.to(diffusion.device), t)
                    bench.advance(rows)
            for t, step, state in zip(times, steps, given, strict=True):
                spool.add(INPUT, t, {"grid": state.flatten(1), "mean": _channels(state)})
                for layer in chosen:
                    # under guidance the last branch is the one that is told the caption
                    spool.add(layer, t, at_positions(captured[layer, step][-1].float().cpu(), self.grid))
                if part.start == 0:
                    drawn = diffusion.decode(state[:SHOWN])
                    pictures |= {f"given-{i}-{t:g}": picture for i, picture in enumerate(drawn)}
        return pictures


def timesteps(text: str) -> set[int]:
    """`875,125` as timesteps. Raises ProbekitError for what is none, and for one that stands there twice."""
    found = whole_numbers(text, "--timesteps", "timesteps, as 875,625,375,125")
    if twice := [t for t in found if found.count(t) > 1]:
        raise ProbekitError(f"--timesteps {text!r}: {twice[0]} stands there twice")
    return set(found)


def _noised(diffusion: Diffusion, clean: Tensor, noise: Tensor, t: float) -> Tensor:
    """Noiseless states at the noise level of a timestep of the schedule."""
    from probekit.sampling.schedule import level_at, reversible

    scheduler = diffusion.scheduler
    signal, amount = level_at(reversible({"_class_name": type(scheduler).__name__, **scheduler.config}), int(t))
    return signal * clean + amount * noise


def _channels(state: Tensor) -> Tensor:
    """Each channel's mean over positions, of states that are pictures or tokens."""
    return state.mean(1) if state.ndim == 3 else state.flatten(2).mean(2)


def _counted(denoiser: Callable[..., torch.Tensor], on_call: Callable[[], None]) -> Callable[..., torch.Tensor]:
    def called(states: torch.Tensor, timestep: float) -> torch.Tensor:
        on_call()
        return denoiser(states, timestep)

    return called


class Spool:
    """Activations of all images, a file a layer, time and set of positions: filled batch after batch, read one at a time.

    So memory holds one batch of all layers, or all images of one layer.
    """

    def __init__(self, folder: Path, n: int) -> None:
        self.folder, self.n = folder, n
        self._held: dict[tuple[str, float, str], tuple[Path, int, int]] = {}

    def add(self, layer: str, t: float, activations: dict[str, Tensor]) -> None:
        """The next rows of a layer at a time, (rows, d) by the set of positions; kept as float32."""
        for positions, rows in activations.items():
            path = self.folder / f"{len(self._held)}.raw"
            path, done, width = self._held.get((layer, t, positions), (path, 0, rows.shape[1]))
            with path.open("ab") as file:
                file.write(rows.float().contiguous().numpy().tobytes())
            self._held[layer, t, positions] = (path, done + len(rows), width)

    def each(self) -> Iterator[tuple[str, float, str, np.ndarray]]:
        """Layer, time, positions and the activations (n, d), which are forgotten once the next are asked for."""
        import numpy as np

        for (layer, t, positions), (path, done, width) in self._held.items():
            assert done == self.n
            yield layer, t, positions, np.fromfile(path, dtype=np.float32).reshape(done, width)
            path.unlink()


def swept(folder: Path, digest: str, factors: Sequence[str], within: Callable[[str, int], list[float]]) -> dict[str, Any]:
    """What each layer carries, of a finished sweep's folder: `numbers`, a record a window, layer and factor; as JSON.

    factors: by name the labels that make up each of the sweep's; windows: by label the probed timesteps in it.
    Raises ProbekitError, naming the option, for what is no finished sweep, one of another model, or of other factors.
    """
    from probekit.data.scenes import FACTORS
    from probekit.report.injection import Summary
    from probekit.runs.folder import Run

    flag = f"--against {str(folder)!r}"
    try:
        run = Run.opened(folder)
        if run.config["experiment"] != "inject-sweep":
            raise ProbekitError(f"run {str(folder)!r}: of {run.config['experiment']}, an inject sweep is needed")
        rows = run.results()
    except ProbekitError as error:
        raise ProbekitError(f"{flag}: {str(error).removeprefix(f'run {str(folder)!r}: ')}") from error
    told = run.config["inputs"]
    if told["model_digest"] != digest:
        raise ProbekitError(f"{flag}: is of another model ({told['model_digest']}, the probed one is {digest})")
    summary = Summary.of(told["swept_windows"], rows)
    labels = {factor: [label for label in FACTORS.get(factor, (factor,)) if label in factors] for factor in summary.factors}
    labels = {factor: of for factor, of in labels.items() if of}
    if not labels:
        raise ProbekitError(f"{flag}: varies {', '.join(summary.factors)}, of which the data's labels say nothing")
    windows = {label: within(label, run.config["options"]["num_steps"]) for label in summary.windows}
    kept = ["window", "layer", "factor", "transfer", "low", "high", "null", "null_low", "null_high", "pairs"]
    numbers = summary.main[summary.main.factor.isin(list(labels))][kept].dropna(subset=["transfer"]).fillna(0.0)
    return {
        "factors": labels,
        "windows": {label: times for label, times in windows.items() if times},
        "descriptor": summary.descriptor,
        "numbers": numbers.to_dict("records"),
    }
