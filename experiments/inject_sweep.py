"""Injection: what happens to a picture when a layer is taken from another one (The Evolving Nature of Latent Spaces, 3.1)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from probekit import checked
from probekit.experiments.loading import Dtype, Offload, Variant
from probekit.hooks.errors import ProbekitError
from probekit.runs.experiment import Bench, Experiment, Findings, Unit, Work

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from probekit import hooks
    from probekit.metrics.descriptors import Descriptor
    from probekit.models import Model
    from probekit.models.given import Given
    from probekit.models.painter import Painter
    from probekit.runs.folder import Run

FACTORS = ("structure", "content", "surface")
OWN = "own"
"""The factor of a user's pair that names none."""

MOST_PAIRS = 2000
"""Of a file."""

APART = 50_021
"""What is added to the number of O's noise for that of E's, where E has a noise of its own."""


@dataclass(frozen=True)
class Pair:
    """Two prompts, the factor they differ in, an unrelated donor for the null, and the number of the noise O is made from.

    Of noise number n, the run's seed makes the same noise in every experiment (`seeds.numbered`). image_original, image_edit:
    files of given pictures, whose captions the prompts then are, and which start from what they are inverted to.
    """

    name: str
    factor: str
    original: str
    edit: str
    unrelated: str
    noise: int
    image_original: str | None = None
    image_edit: str | None = None

    @property
    def images(self) -> dict[str, tuple[str, str]]:
        """The given pictures' files and captions, by `original` and `edit`."""
        both = {"original": (self.image_original, self.original), "edit": (self.image_edit, self.edit)}
        return {side: (file, caption) for side, (file, caption) in both.items() if file is not None}


@dataclass(frozen=True, kw_only=True)
class InjectSweep(Experiment):
    """Inject every layer of E into O, one layer at a time, and measure what each layer carries."""

    name: ClassVar[str] = "inject-sweep"

    model: Annotated[str, typer.Option(help="A bundled model, a local diffusers folder or a hub id.")] = "mini-sd"
    pairs: Annotated[int | None, typer.Option(min=1, max=1000, help="Controlled pairs for each factor. [default: 8]")] = None
    factors: Annotated[
        str | None, typer.Option(help="Factors to vary, separated by commas. [default: structure,content,surface]")
    ] = None
    prompt_original: Annotated[str | None, typer.Option(help="A prompt of your own for O, instead of controlled pairs.")] = None
    prompt_edit: Annotated[str | None, typer.Option(help="A prompt of your own for E.")] = None
    pairs_file: Annotated[
        Path | None,
        typer.Option(
            help="YAML list of pairs: original, edit; if you like factor, unrelated, noise, image_original, image_edit."
        ),
    ] = None
    image_original: Annotated[
        Path | None, typer.Option(help="A picture for O, inverted under --prompt-original, its caption.")
    ] = None
    image_edit: Annotated[Path | None, typer.Option(help="A picture for E, inverted under --prompt-edit.")] = None
    inversion: Annotated[
        str | None, typer.Option(help="How pictures are inverted: fixed-point or plain. [default: fixed-point]")
    ] = None
    layers: Annotated[
        list[str] | None, typer.Option("--layers", help="Layer names, globs or groups such as @resnets; repeat for more.")
    ] = None
    stream: Annotated[
        str | None, typer.Option("--stream", help="main, skip, both, image or text. [default: the layer's own]")
    ] = None
    steps: Annotated[str, typer.Option(help="Steps to inject at: all, 0-9, 0,3,5, 0%-50% or t1000-200.")] = "all"
    num_steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 20
    guidance: Annotated[
        float | None,
        typer.Option(help="Guidance scale. [default: 3 for mini-sd, else the pipeline's own; 1, none, with given pictures]"),
    ] = None
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the noise and of the pairs.")] = 0
    separate_noise: Annotated[bool, typer.Option("--separate-noise", help="Give E a noise of its own.")] = False
    by_time: Annotated[bool, typer.Option("--by-time", help="Cut the steps into windows: a layer x time map.")] = False
    windows: Annotated[int | None, typer.Option(min=2, max=100, help="Windows of --by-time. [default: 4]")] = None
    dtype: Dtype = "auto"
    variant: Variant = None
    offload: Offload = field(default="none", compare=False)
    batch_size: Annotated[int | None, typer.Option(min=3, help="Rows at a time. [default: by the model's size]")] = field(
        default=None, compare=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        images = {"--image-original": self.image_original, "--image-edit": self.image_edit}
        for flag, image in images.items():
            if image is not None and self.pairs_file is not None:
                raise ProbekitError(f"{flag} {str(image)!r}: pairs of --pairs-file name pictures of theirs, as image_original")
            prompt = flag.replace("image", "prompt")
            if image is not None and (self.prompt_original if flag == "--image-original" else self.prompt_edit) is None:
                raise ProbekitError(f"{flag} {str(image)!r}: goes with {prompt}, the caption that it is inverted under")
        if self.separate_noise and None not in images.values():
            raise ProbekitError("--separate-noise: is for prompts; a given picture starts from its own latent")
        check_inversion(self.inversion, self.pairs_file is not None or any(images.values()))
        own = self.prompt_original is not None or self.prompt_edit is not None
        if own and (self.prompt_original is None or self.prompt_edit is None):
            raise ProbekitError("--prompt-original and --prompt-edit go together: give both")
        if own and self.pairs_file is not None:
            raise ProbekitError("--pairs-file: give either the file or --prompt-original and --prompt-edit")
        if (own or self.pairs_file is not None) and (self.pairs is not None or self.factors is not None):
            given = f"--pairs {self.pairs}" if self.pairs is not None else f"--factors {self.factors!r}"
            raise ProbekitError(f"{given}: is for controlled pairs of scenes, not for prompts of your own")
        self._factors()
        if self.windows is not None and not self.by_time:
            raise ProbekitError(f"--windows {self.windows}: goes with --by-time")
        _ = self.swept_windows  # refuses steps and windows that are none

    # --- what is swept ----------------------------------------------------------------------------------------------------

    @property
    def subject(self) -> str:
        """The model's name."""
        return Path(self.model).name

    def _factors(self) -> list[str]:
        """The factors of controlled pairs, each once."""
        factors = [factor.strip() for factor in (self.factors if self.factors is not None else ",".join(FACTORS)).split(",")]
        if odd := [factor for factor in factors if factor not in FACTORS]:
            raise ProbekitError(f"--factors {odd[0]!r}: choose from {', '.join(FACTORS)}")
        return list(dict.fromkeys(factors))

    @functools.cached_property
    def swept_pairs(self) -> list[Pair]:
        """The pairs that the options ask for. Raises ProbekitError for a file that is not in order."""
        if self.pairs_file is not None:
            return read_pairs(Path(self.pairs_file))
        if self.prompt_original is not None and self.prompt_edit is not None:
            images = [None if file is None else str(file) for file in (self.image_original, self.image_edit)]
            return [Pair(f"{OWN}-00", OWN, self.prompt_original, self.prompt_edit, _UNRELATED, 0, *images)]
        return scene_pairs(self._factors(), self.pairs or 8, self.seed)

    @functools.cached_property
    def swept_windows(self) -> dict[str, hooks.Steps]:
        """The steps asked for, by the label they have in the results; with --by-time also equal parts of them."""
        return make_windows(self.steps, self.num_steps, (self.windows or 4) if self.by_time else 1)

    @functools.cached_property
    def loaded(self) -> Model:
        """The model, for given pictures sampled so that it can be inverted. Raises ProbekitError as `load` and `invertible`."""
        if (first := next(self._images(), None)) is None:
            return self._own
        from probekit.models.given import invertible

        where, pair, side = first
        with naming(where, pair.images[side][0]):
            return invertible(self._own)

    @functools.cached_property
    def _own(self) -> Model:
        """The model as it is."""
        from probekit.models import load

        return load(self.model, device=self.device, dtype=self.dtype, variant=self.variant, offload=self.offload)

    @property
    def painter(self) -> Painter:
        """How it makes pictures. Raises ProbekitError for a model that takes no prompts."""
        return self.loaded.painter

    @functools.cached_property
    def swept_layers(self) -> list[hooks.Layer]:
        """The layers, in execution order. Raises ProbekitError for layers and streams that the model does not have."""
        from probekit import hooks

        selected = hooks.select(self.loaded.layers, self.layers or hooks.default_layers(self.loaded.denoiser))
        if self.stream is not None and not self.layers and any(self.stream in la.streams for la in selected):
            selected = hooks.Layers(la for la in selected if self.stream in la.streams)
        for la in selected:
            la.stream(self.stream)  # refuses a stream that the layer does not have
        return selected

    @property
    def guidance_scale(self) -> float | None:
        """The one asked for, else with given pictures none, else the bundled model's, else None: the pipeline's own."""
        if self.guidance is None and any(self._images()):
            from probekit.models.given import GUIDANCE

            return GUIDANCE
        return self.painter.defaults.get("guidance_scale") if self.guidance is None else self.guidance

    def _images(self) -> Iterator[tuple[str, Pair, str]]:
        """Each given picture: what errors call it, its pair, and `original` or `edit`."""
        for number, pair in enumerate(self.swept_pairs, start=1):
            for side, (file, _) in pair.images.items():
                listed = f"--pairs-file {str(self.pairs_file)!r}, pair {number}: image_{side} {file!r}"
                yield listed if self.pairs_file is not None else f"--image-{side} {file!r}", pair, side

    # --- the experiment ---------------------------------------------------------------------------------------------------

    def inputs(self) -> dict[str, Any]:
        """The model's fingerprint, the pairs, and what options left open: layers, windows, guidance, precision, descriptors.

        Of two-stream transformers also which layers carry text, as the network is drawn by it.

        With given pictures also their files' fingerprints, how they are inverted, and the scheduler, where it is not the
        model's own.
        """
        from probekit.report.network import carry_text

        # an input must not be called as an option is: a run's folder tells another config by either name
        pairs = [{key: value for key, value in asdict(pair).items() if value is not None} for pair in self.swept_pairs]
        of_images = self._of_images()
        pipeline = self.painter.pipeline
        check_steps(pipeline, self.swept_windows, self.num_steps)
        return {
            "model_digest": self.loaded.digest,
            "swept_pairs": pairs,
            "swept_layers": [la.name for la in self.swept_layers],
            "swept_windows": list(self.swept_windows),
            "guidance_scale": self.guidance_scale,
            "precision": str(pipeline.dtype).removeprefix("torch."),
            "descriptors": [descriptor.name for descriptor in general_descriptors_of(self.loaded.name)],
            **({"carry_text": carrying} if (carrying := carry_text(self.swept_layers)) else {}),
            **of_images,
        }

    def _of_images(self) -> dict[str, Any]:
        """What given pictures are and are made again by. Raises ProbekitError for what is none, and what cannot be inverted."""
        if not (images := list(self._images())):
            if self.inversion is not None:
                raise ProbekitError(f"--inversion {self.inversion!r}: no pair of --pairs-file names a picture")
            return {}
        from probekit.models.given import METHODS, read

        model, digests = self.loaded, {}
        model.conditioned(guidance=self.guidance_scale).diffusion.schedule(self.num_steps)  # refuses what is none
        for where, pair, side in images:
            file, _ = pair.images[side]
            with naming(where, file):
                _, digests[file] = read(file, model.diffusion.image_size)
        told = {"picture_digests": digests, "inverted_by": self.inversion or METHODS[0]}
        if model is not self._own:
            own, other = (type(each.pipeline.scheduler).__name__ for each in (self._own, model))
            told["sampled_by"] = f"{other} without clipping" if own == other else f"{other} in place of {own}"
        return told

    def plan(self) -> list[Unit]:
        """A unit a pair: O, and for each window and layer the picture with E's and the one with the unrelated donor's."""
        size = 2 * len(self.swept_windows) * len(self.swept_layers) + 1
        return [Unit(pair.name, size) for pair in self.swept_pairs]

    def costs(self) -> str:
        """How many pictures and rows, and the memory that they take."""
        from probekit.models.memory import human

        pairs, rows = self.plan(), self._rows_at_a_time
        memory = {what: human(size) for what, size in self._memory.items()}
        return (
            f"{len(pairs)} pair{'s' * (len(pairs) > 1)} of {pairs[0].size} pictures, at most {rows} at a time; weights take "
            f"{memory['weights']}, a picture about {memory['row']}, {memory['free']} are free"
        )

    @functools.cached_property
    def _memory(self) -> dict[str, int]:
        """Bytes of the weights and of a row, and those that are free beside the weights."""
        from probekit.models import memory

        told = {} if self.guidance_scale is None else {"guidance_scale": self.guidance_scale}
        free = memory.free(self.painter.pipeline._execution_device)
        return {"weights": memory.of_weights(self.painter), "row": memory.of_a_row(self.painter, **told), "free": free}

    @property
    def _rows_at_a_time(self) -> int:
        """Those asked for, else by the size of the model's latents, if memory has room for them."""
        from probekit.models.memory import SHARE

        if self.batch_size is not None:
            return self.batch_size
        fit = int(SHARE * self._memory["free"] / max(self._memory["row"], 1))
        return max(3, min(rows_at_a_time(self.loaded), fit))

    def work(self, unit: Unit, bench: Bench) -> Work:
        """A row a descriptor, donor, window and layer, with its transfer and damage; the pictures O, E, U and WINDOW_LAYER.

        Of a pair with given pictures these as well, and in every row how well they were made again (`Given.errors`), as
        `original_psnr`.
        """
        from probekit import hooks
        from probekit.report.injection import given_name, picture_name

        pair = next(pair for pair in self.swept_pairs if pair.name == unit.name)
        places = [(window, steps, la) for window, steps in self.swept_windows.items() for la in self.swept_layers]
        rules = [[hooks.Injection(la.name, steps=steps, stream=self.stream)] for _, steps, la in places]
        call: dict[str, Any] = {
            "num_inference_steps": self.num_steps,
            "batch_size": self._rows_at_a_time,
            "on_batch": bench.advance,
        }
        if self.guidance_scale is not None:
            call["guidance_scale"] = self.guidance_scale
        starts = starts_of(
            self.loaded,
            pair,
            seed=self.seed,
            steps=self.num_steps,
            guidance=self.guidance_scale,
            method=self.inversion,
            separate=self.separate_noise,
        )
        of_null = [[dataclasses.replace(injection, source=hooks.Row(1)) for injection in rule] for rule in rules]
        swept = self.painter.sweep(
            (pair.original, starts.original),
            (pair.edit, starts.edit),
            [[], *rules, *of_null],
            others=[(pair.unrelated, starts.unrelated)],
            seed=self.seed,
            **call,
        )
        o, e, u = swept.images[0], swept.edit, swept.others[0]
        errors = starts.errors({"original": o, "edit": e})
        donors = dict(zip(("edit", "unrelated"), swept.images[1:].chunk(2), strict=True))
        rows: list[dict[str, Any]] = []
        for descriptor in _descriptors(self.loaded.name, pair):
            for donor, images in donors.items():
                of = {"pair": pair.name, "factor": pair.factor, "noise": pair.noise} | errors
                for (window, _, la), scores in zip(places, score(descriptor, o, e, images), strict=True):
                    at = {"window": window, "order": la.order, "layer": la.name}
                    rows.append(of | at | {"donor": donor, "descriptor": descriptor.name} | scores)
        pictures = {"O": o, "E": e, "U": u} | {given_name(side): given.picture for side, given in starts.given.items()}
        for (window, _, la), image in zip(places, donors["edit"], strict=True):
            pictures[picture_name(window, la.name)] = image
        return Work(rows, pictures)

    def findings(self, run: Run, rows: pd.DataFrame) -> Findings:
        """What each layer carries."""
        from probekit.report.injection import findings

        return findings(run, rows)


# --- what is seen of a picture ------------------------------------------------------------------------------------------


def general_descriptors_of(model: str) -> list[Descriptor]:
    """Those that apply to any picture of the model; of a model of scenes, with the CLIP that knows scenes."""
    from probekit.bundled import PIPELINES, weights
    from probekit.metrics.descriptors import CLIP, general_descriptors

    return general_descriptors(str(weights("scene-clip")) if model in PIPELINES else CLIP)


def _descriptors(model: str, pair: Pair) -> list[Descriptor]:
    """Those that apply: the scene reader to pairs of scenes, on a model of scenes, in what their factor changes."""
    from probekit.bundled import PIPELINES
    from probekit.data.scenes import FACTORS as ATTRIBUTES
    from probekit.data.scenes import Scene
    from probekit.metrics.descriptors import reader_descriptor

    general = general_descriptors_of(model)
    if model not in PIPELINES:
        return general
    try:
        original, edit = vars(Scene.parse(pair.original)), vars(Scene.parse(pair.edit))
    except ProbekitError:
        return general
    differ = [a for a in original if original[a] != edit[a] and a in ATTRIBUTES.get(pair.factor, original)]
    return [reader_descriptor(differ), *general] if differ else general


def score(descriptor: Descriptor, o: Tensor, e: Tensor, images: Tensor) -> list[dict[str, float]]:
    """The distances of each of images (n, 3, h, w) to O and to E (3, h, w), and what follows from them."""
    from probekit.metrics.roles import damage, transfer

    seen_o, seen_e = descriptor.features(o[None])[0], descriptor.features(e[None])[0]
    between = descriptor.distance(seen_o, seen_e)
    scores = []
    for seen in descriptor.features(images):
        to_o, to_e = descriptor.distance(seen_o, seen), descriptor.distance(seen_e, seen)
        told = {"transfer": transfer(to_o, to_e, between), "damage": damage(to_o, to_e, between)}
        scores.append({"to_original": to_o, "to_edit": to_e, "between": between} | told)
    return scores


def rows_at_a_time(model: Model) -> int:
    """Batch rows that a model of this size is given by default: 64 at 16x16 latents, 8 at 64x64, 3 at 128x128."""
    size: Any = getattr(model.denoiser.config, "sample_size", None) or 128
    side = size if isinstance(size, int) else max(size)
    return max(3, min(64, 32_768 // side**2))


# --- given pictures ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Starts:
    """What O, E and the unrelated donor start from, a noise's number or a latent; and the given pictures, by side."""

    original: int | Tensor
    edit: int | Tensor
    unrelated: int | Tensor
    given: Mapping[str, Given] = field(default_factory=dict)

    def errors(self, rebuilt: Mapping[str, Tensor]) -> dict[str, float]:
        """How well the given pictures were made again: `Given.errors`, by `original_psnr`, …; nothing of a pair of prompts."""
        return {
            f"{side}_{name}": value for side, given in self.given.items() for name, value in given.errors(rebuilt[side]).items()
        }


def starts_of(
    model: Model,
    pair: Pair,
    *,
    seed: int,
    steps: int,
    guidance: float | None,
    method: str | None,
    separate: bool = False,
) -> Starts:
    """Invert what is given of a pair, and say what the rest starts from.

    O and E start from the same: a prompt beside a given picture from that one's latent. With `separate` E has a noise of its
    own, and so has a prompt beside a picture. The unrelated donor starts where E does; beside a given E, whose latent
    holds E, from the pair's noise. Raises ProbekitError as `given.invert`.
    """
    apart = pair.noise + APART if separate else pair.noise
    if not pair.images:
        return Starts(pair.noise, apart, apart)
    from probekit.models import given

    how: dict[str, Any] = {
        "steps": steps,
        "guidance": given.GUIDANCE if guidance is None else guidance,
        "method": method or given.METHODS[0],
    }
    found: dict[str, Given] = {}
    for side, (file, caption) in pair.images.items():
        with naming(f"image {file!r}", file):
            picture, _ = given.read(file, model.diffusion.image_size)
            found[side] = given.invert(model, picture, caption, **how)
    shared = None if separate else next(iter(found.values())).latent
    original, edit = (
        found[side].latent if side in found else given.numbered(model, number, seed) if shared is None else shared
        for side, number in (("original", pair.noise), ("edit", apart))
    )
    return Starts(original, edit, given.numbered(model, apart, seed) if "edit" in found else edit, found)


def check_inversion(method: str | None, pictured: bool) -> None:
    """Raises ProbekitError for a method whose way back is not the pipeline's sampling, and for one of nothing."""
    if method is None:
        return
    from probekit.models.given import METHODS

    if method not in METHODS:
        raise ProbekitError(f"--inversion {method!r}: choose {', '.join(METHODS)}, whose way back is the pipeline's own")
    if not pictured:
        raise ProbekitError(f"--inversion {method!r}: is for given pictures; name --image-original or --image-edit")


@contextlib.contextmanager
def naming(where: str, file: str) -> Iterator[None]:
    """Put where a picture was asked for before what a ProbekitError inside says."""
    try:
        yield
    except ProbekitError as error:
        raise ProbekitError(f"{where}: {str(error).removeprefix(f'image {file!r}: ')}") from error


# --- pairs -------------------------------------------------------------------------------------------------------------

_UNRELATED = "a small black cross at the bottom on a striped yellow ground"
"""The null's donor where nothing better is known."""


def scene_pairs(factors: list[str], count: int, seed: int) -> list[Pair]:
    """`count` controlled pairs of scenes for each factor; the seed chooses them.

    The unrelated donor differs from both in every attribute but size, which has two values only.
    """
    import torch

    from probekit.data.scenes import VALUES, all_scenes, controlled_pair

    scenes, pairs = all_scenes(), []
    for factor in factors:
        generator = torch.Generator().manual_seed(seed * 101 + FACTORS.index(factor))
        for i in range(count):
            original, edit = controlled_pair(factor, generator)
            while True:
                other = scenes[int(torch.randint(len(scenes), (), generator=generator))]
                if all(getattr(other, a) not in (getattr(original, a), getattr(edit, a)) for a in VALUES if a != "size"):
                    break
            noise = FACTORS.index(factor) * 1009 + i
            pairs.append(Pair(f"{factor}-{i:02d}", factor, original.caption, edit.caption, other.caption, noise))
    return pairs


def read_pairs(file: Path) -> list[Pair]:
    """Pairs from YAML; pictures are named relative to its folder. Raises ProbekitError that names the entry and the key.

    And as `checked.yaml_value` for the file.
    """
    said = f"--pairs-file {str(file)!r}"
    entries = checked.yaml_value(said, file)
    if not isinstance(entries, list) or not entries:
        raise ProbekitError(f"{said}: must be a list of pairs, each with original and edit")
    if len(entries) > MOST_PAIRS:
        raise ProbekitError(f"{said}: has {len(entries):,} pairs; at most {MOST_PAIRS:,} are read")
    for i, entry in enumerate(entries):
        _check_entry(f"{said}, pair {i + 1}", entry)
    pairs: list[Pair] = []
    for i, entry in enumerate(entries):
        factor = entry.get("factor", OWN)
        name = "".join(c if c.isalnum() else "_" for c in factor) + f"-{i:02d}"
        others = (
            other["edit"] for other in entries if not {other["original"], other["edit"]} & {entry["original"], entry["edit"]}
        )
        unrelated = entry.get("unrelated") or next(others, _UNRELATED)
        images = [str(file.parent / entry[key]) if key in entry else None for key in ("image_original", "image_edit")]
        pairs.append(Pair(name, factor, entry["original"], entry["edit"], unrelated, entry.get("noise", i), *images))
    return pairs


def _check_entry(where: str, entry: Any) -> None:
    """Raise ProbekitError, naming the key, where a pair from a file is not in order."""
    texts = ("original", "edit", "factor", "unrelated", "image_original", "image_edit")
    kinds: dict[str, type] = {**dict.fromkeys(texts, str), "noise": int}
    if not isinstance(entry, dict):
        raise ProbekitError(f"{where}: must have the keys original and edit")
    for key in ("original", "edit"):
        if key not in entry:
            raise ProbekitError(f"{where}: the key {key!r} is missing")
    for key, value in entry.items():
        if key == "seed":
            raise ProbekitError(
                f"{where}: seed {checked.shown(value)}: write noise, the number of the pair's noise; the seed is --seed's"
            )
        if key not in kinds:
            raise ProbekitError(f"{where}: unknown key {checked.shown(key)}; known: {', '.join(kinds)}")
        if key == "noise" and not (type(value) is int and 0 <= value < 2**32):
            raise ProbekitError(f"{where}: noise {checked.shown(value)} must be a whole number from 0 to {2**32 - 1}")
        if not isinstance(value, kinds[key]):
            raise ProbekitError(f"{where}: {key} {checked.shown(value)} must be text")
        if isinstance(value, str):
            (checked.name if key == "factor" else checked.text)(f"{where}: {key} {checked.shown(value)}", value)


# --- steps -------------------------------------------------------------------------------------------------------------


def make_windows(steps: str, num_steps: int, count: int) -> dict[str, hooks.Steps]:
    """The steps asked for, by the label they have in the results; with `count` > 1 also that many equal parts of them."""
    from probekit.hooks import Steps

    chosen = Steps.parse(steps)
    if chosen.timesteps is None:
        chosen.resolve(range(num_steps))
    windows = {steps.strip(): chosen}
    if count > 1:
        if chosen.indices is not None or chosen.timesteps is not None:
            raise ProbekitError(f"--steps {steps!r}: with --by-time, give percents such as 0%-50%, or all")
        start, stop = chosen.fraction or (0.0, 1.0)
        cuts = [start + (stop - start) * k / count for k in range(count + 1)]
        for part in itertools.pairwise(cuts):
            windows[f"{100 * part[0]:.3g}%-{100 * part[1]:.3g}%"] = Steps(fraction=part)
        if any(not any(a <= i / num_steps < b for i in range(num_steps)) for a, b in itertools.pairwise(cuts)):
            raise ProbekitError(f"--windows {count}: some hold no step, there are too few of them in {steps}")
    return windows


def check_steps(pipeline: Any, windows: Mapping[str, hooks.Steps], num_steps: int) -> None:
    """Raise ProbekitError, before anything is written, where a window lies outside a diffusers pipeline's schedule."""
    from probekit.hooks.steps import distinct_timesteps

    trained = pipeline.scheduler.config.get("num_train_timesteps")
    if trained is not None and num_steps > trained:
        raise ProbekitError(f"--num-steps {num_steps}: the model's schedule has {trained} timesteps; choose 1 to {trained}")
    try:
        pipeline.scheduler.set_timesteps(num_steps)
    except (TypeError, ValueError):  # Flux's schedule depends on the picture's size and is known only to the pipeline
        return
    for steps in windows.values():
        steps.resolve(distinct_timesteps(pipeline.scheduler))
