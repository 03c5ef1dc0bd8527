"""Calibration: does a measure of roles find the ones that were planted? On planted-sd, whose truth is known."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from probekit.experiments.inject_sweep import check_steps, make_windows, rows_at_a_time
from probekit.hooks.errors import ProbekitError
from probekit.runs.experiment import Bench, Experiment, Findings, Unit, Work, names

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from probekit import hooks
    from probekit.data.scenes import Scene
    from probekit.models import Model
    from probekit.runs.folder import Run

MODEL = "planted-sd"
MEASURES = ("outputs", "text", "layers")
"""What is swapped: a cross-attention's output, the text that it is given, or the whole layer that it stands in."""


@dataclass(frozen=True)
class AttributePair:
    """Captions that differ in one attribute, an unrelated donor for the null, and the number of the noise of all three."""

    name: str
    attribute: str
    original: str
    edit: str
    unrelated: str
    noise: int


@dataclass(frozen=True, kw_only=True)
class InjectCalibrate(Experiment):
    """Find planted-sd's roles by injection and hold them against the plan that it was trained by."""

    name: ClassVar[str] = "inject-calibrate"

    pairs: Annotated[int, typer.Option(min=1, max=1000, help="Controlled pairs for each attribute of a scene.")] = 8
    measure: Annotated[
        str,
        typer.Option(help="What is swapped, separated by commas: cross-attentions' outputs, their text, or whole layers."),
    ] = "outputs"
    threshold: Annotated[
        float, typer.Option(min=0.01, max=1, help="How far the transfer of a role stands above that of an unrelated donor.")
    ] = 0.5
    steps: Annotated[str, typer.Option(help="Steps to inject at: all, 0-9, 0,3,5, 0%-50% or t1000-200.")] = "all"
    num_steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 20
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the noise and of the pairs.")] = 0
    batch_size: Annotated[int | None, typer.Option(min=3, help="Rows at a time. [default: by the model's size]")] = field(
        default=None, compare=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for measure in self._measures:
            if measure not in MEASURES:
                raise ProbekitError(f"--measure {measure!r}: choose from {', '.join(MEASURES)}")
        _ = self._window  # refuses steps that are none

    @property
    def subject(self) -> str:
        """The model's name."""
        return MODEL

    @functools.cached_property
    def _measures(self) -> list[str]:
        return names(self.measure, "--measure")

    @functools.cached_property
    def _window(self) -> hooks.Steps:
        (window,) = make_windows(self.steps, self.num_steps, 1).values()
        return window

    @functools.cached_property
    def loaded(self) -> Model:
        """The model. Raises ProbekitError where it is not trained yet."""
        from probekit.models import load

        return load(MODEL, device=self.device)

    @functools.cached_property
    def _sites(self) -> list[hooks.Layer]:
        """The cross-attentions, in execution order."""
        from probekit import hooks

        return hooks.select(self.loaded.layers, ["@cross-attention"])

    @functools.cached_property
    def swept_pairs(self) -> list[AttributePair]:
        """The controlled pairs, `pairs` of each attribute."""
        from probekit.data.scenes import VALUES

        return [pair for attribute in VALUES for pair in attribute_pairs(attribute, self.pairs, self.seed)]

    def inputs(self) -> dict[str, Any]:
        """The model's fingerprint, the plan that it was trained by, and the pairs."""
        from probekit.zoo.planted_sd import PLAN

        check_steps(self.loaded.painter.pipeline, {self.steps: self._window}, self.num_steps)
        return {
            "model_digest": self.loaded.digest,
            "planted": {site: list(attributes) for site, attributes in PLAN.items()},
            "swept_pairs": [asdict(pair) for pair in self.swept_pairs],
        }

    def plan(self) -> list[Unit]:
        """A unit a pair: O, and for each measure and site the picture with E's and the one with the unrelated donor's."""
        return [Unit(pair.name, 2 * len(self._measures) * len(self._sites) + 1) for pair in self.swept_pairs]

    def work(self, unit: Unit, bench: Bench) -> Work:
        """A row a measure, site and donor, and the pictures O, E and MEASURE_SITE.

        read: what the scene reader sees of the attribute that the pair differs in. transfer: 1 where that is E's value, else
        0; NaN where the reader does not see in O and E what their captions say, since then nothing can be told. kept: the
        share of the other five attributes that it sees as in O.
        """
        from probekit.data.scenes import VALUES, Scene

        pair = next(pair for pair in self.swept_pairs if pair.name == unit.name)
        places = [(measure, site) for measure in self._measures for site in self._sites]
        rules = [[self._injection(*place, donor)] for donor in range(2) for place in places]
        painter, noise = self.loaded.painter, pair.noise
        call: dict[str, Any] = {
            "num_inference_steps": self.num_steps,
            "batch_size": self.batch_size or rows_at_a_time(self.loaded),
            "on_batch": bench.advance,
        }
        rows_of = [(caption, noise) for caption in (pair.original, pair.edit, pair.unrelated)]
        swept = painter.sweep(rows_of[0], rows_of[1], [[], *rules], others=rows_of[2:], seed=self.seed, **call)

        (o, *made), e = swept.images.cpu(), swept.edit.cpu()
        injected = {"edit": made[: len(places)], "unrelated": made[len(places) :]}
        a, rest = pair.attribute, [other for other in VALUES if other != pair.attribute]
        of_o, of_e = _seen([o, e])
        wanted = getattr(Scene.parse(pair.edit), a)
        told = of_o[a] == getattr(Scene.parse(pair.original), a) and of_e[a] == wanted
        rows = []
        for donor, images in injected.items():
            for (measure, site), seen in zip(places, _seen(images), strict=True):
                at = {"pair": pair.name, "attribute": a, "noise": noise, "measure": measure}
                at |= {"order": site.order, "site": site.name, "donor": donor, "read": seen[a]}
                kept = sum(seen[other] == of_o[other] for other in rest) / len(rest)
                rows.append(at | {"transfer": float(seen[a] == wanted) if told else float("nan"), "kept": kept})
        pictures = {"O": o, "E": e}
        pictures |= {f"{m}_{site.name}": image for (m, site), image in zip(places, injected["edit"], strict=True)}
        return Work(rows, pictures)

    def _injection(self, measure: str, site: hooks.Layer, donor: int) -> hooks.Injection:
        from probekit import hooks

        if measure == "layers":
            assert site.inside is not None
            return hooks.Injection(site.inside, hooks.Row(donor), self._window)
        return hooks.Injection(site.name, hooks.Row(donor), self._window, stream="text" if measure == "text" else None)

    def findings(self, run: Run, rows: pd.DataFrame) -> Findings:
        """The roles found, and how they agree with the plan."""
        from probekit.report.calibration import findings

        return findings(run, rows)


def attribute_pairs(attribute: str, count: int, seed: int) -> list[AttributePair]:
    """`count` pairs of scenes that differ in one attribute alone; the seed chooses them.

    The unrelated donor has E's value in nothing: its attributes are neither O's nor E's; its size, of which there are two, is
    O's in pairs of sizes.
    """
    import torch

    from probekit.data.scenes import VALUES, all_scenes

    scenes, pairs = all_scenes(), []
    number = list(VALUES).index(attribute)
    generator = torch.Generator().manual_seed(seed * 101 + number)

    def drawn() -> Scene:
        return scenes[int(torch.randint(len(scenes), (), generator=generator))]

    for i in range(count):
        original, value = drawn(), getattr(drawn(), attribute)
        taken = {getattr(original, a) for a in ({"colour", "ground"} if attribute in ("colour", "ground") else {attribute})}
        while value in taken:
            value = getattr(drawn(), attribute)
        edit, unrelated = replace(original, **{attribute: value}), drawn()
        while not _unrelated(unrelated, original, edit, attribute):
            unrelated = drawn()
        noise = number * 1009 + i
        pairs.append(AttributePair(f"{attribute}-{i:02d}", attribute, original.caption, edit.caption, unrelated.caption, noise))
    return pairs


def _unrelated(scene: Scene, original: Scene, edit: Scene, attribute: str) -> bool:
    from probekit.data.scenes import VALUES

    if attribute == "size" and scene.size != original.size:
        return False
    return all(getattr(scene, a) not in (getattr(original, a), getattr(edit, a)) for a in VALUES if a != "size")


def _seen(images: Sequence[Tensor]) -> list[dict[str, str]]:
    """What the scene reader sees in pictures (3, h, w): the value of every attribute."""
    import torch

    from probekit.data.scenes import VALUES
    from probekit.metrics.readers import scene_reader

    read = scene_reader().read(torch.stack(tuple(images)).float())
    return [{a: values[int(read[a][i])] for a, values in VALUES.items()} for i in range(len(images))]
