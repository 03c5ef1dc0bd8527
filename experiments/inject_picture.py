"""One custom injection: chosen layers of E into O, together or each by itself, by an operation of the package or a script."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from probekit.experiments.inject_sweep import (
    OWN,
    Pair,
    Starts,
    check_inversion,
    check_steps,
    general_descriptors_of,
    make_windows,
    naming,
    starts_of,
)
from probekit.experiments.loading import Dtype, Offload, Variant
from probekit.hooks.errors import ProbekitError
from probekit.runs.experiment import Bench, Experiment, Findings, Unit, Work

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from probekit import hooks
    from probekit.metrics.descriptors import Descriptor
    from probekit.models import Model
    from probekit.models.swap import OnStep, Swap
    from probekit.runs.folder import Run

OPERATIONS = ("replace", "blend", "add", "bypass")
_MOST = 2**32 - 1


@dataclass(frozen=True)
class Asked:
    """What one picture is asked: the steps, by their label, and the layers."""

    window: str
    steps: hooks.Steps
    layers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Picture(Experiment):
    """What both commands take."""

    prompt_original: Annotated[str, typer.Option(help="The prompt of O, the picture that is changed.")]
    prompt_edit: Annotated[str, typer.Option(help="The prompt of E, the picture that layers are taken from.")]
    image_original: Annotated[
        Path | None, typer.Option(help="A picture for O, inverted under --prompt-original, its caption.")
    ] = None
    image_edit: Annotated[Path | None, typer.Option(help="A picture for E, inverted under --prompt-edit.")] = None
    inversion: Annotated[
        str | None, typer.Option(help="How pictures are inverted: fixed-point or plain. [default: fixed-point]")
    ] = None
    noise: Annotated[int, typer.Option(min=0, max=_MOST, help="The number of the noise that O starts from.")] = 0
    noise_edit: Annotated[int | None, typer.Option(min=0, max=_MOST, help="The number of E's noise. [default: O's noise]")] = (
        None
    )
    layers: Annotated[list[str], typer.Option("--layers", help="Layer names, globs or groups such as @mid; repeat for more.")]
    model: Annotated[str, typer.Option(help="A bundled model, a local diffusers folder or a hub id.")] = "mini-sd"
    steps: Annotated[str, typer.Option(help="Steps to inject at: all, 0-9, 0,3,5, 0%-50% or t1000-200.")] = "all"
    stream: Annotated[
        str | None, typer.Option("--stream", help="main, skip, both, image or text. [default: the layer's own]")
    ] = None
    words: Annotated[
        str | None,
        typer.Option(help="Only the tokens of these words of --prompt-edit, where a layer has the caption's."),
    ] = None
    mask: Annotated[
        str | None, typer.Option(help="Only inside: a grid of bits as 2x2:8, its rows from the top as hexadecimal digits.")
    ] = None
    apart: Annotated[bool, typer.Option("--apart", help="Each layer by itself, a picture a layer.")] = False
    windows: Annotated[int | None, typer.Option(min=2, max=100, help="With --apart: in so many parts of the steps, too.")] = (
        None
    )
    num_steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 20
    guidance: Annotated[
        float | None,
        typer.Option(help="Guidance scale. [default: 3 for mini-sd, else the pipeline's own; 1, none, with given pictures]"),
    ] = None
    seed: Annotated[int, typer.Option(min=0, max=_MOST, help="Seed of the noise.")] = 0
    dtype: Dtype = "auto"
    variant: Variant = None
    offload: Offload = field(default="none", compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.layers:
            raise ProbekitError("--layers: name at least one")
        check_inversion(self.inversion, bool(self.image_original or self.image_edit))
        if self.windows is not None and not self.apart:
            raise ProbekitError(f"--windows {self.windows}: goes with --apart")
        if self.mask is not None:
            read_mask(self.mask)
        _ = self.windows_by_label  # refuses steps and windows that are none

    # --- what is asked ----------------------------------------------------------------------------------------------------

    @property
    def subject(self) -> str:
        """The model's name."""
        return Path(self.model).name

    @functools.cached_property
    def windows_by_label(self) -> dict[str, hooks.Steps]:
        """The steps asked for, by the label that they have in the results, and with `windows` their equal parts."""
        return make_windows(self.steps, self.num_steps, self.windows or 1)

    @functools.cached_property
    def _pair(self) -> Pair:
        images = [None if file is None else str(file) for file in (self.image_original, self.image_edit)]
        return Pair(OWN, OWN, self.prompt_original, self.prompt_edit, "", self.noise, *images)

    @functools.cached_property
    def loaded(self) -> Model:
        """The model, for given pictures sampled so that it can be inverted. Raises ProbekitError as `load` and `invertible`."""
        from probekit.models import load
        from probekit.models.given import invertible

        model = load(self.model, device=self.device, dtype=self.dtype, variant=self.variant, offload=self.offload)
        for side, (file, _) in self._pair.images.items():
            with naming(f"--image-{side} {file!r}", file):
                return invertible(model)
        return model

    @functools.cached_property
    def chosen(self) -> list[hooks.Layer]:
        """The layers, in execution order. Raises ProbekitError for layers and streams that the model does not have."""
        from probekit import hooks

        chosen = hooks.select(self.loaded.layers, self.layers)
        for la in chosen:
            la.stream(self.stream)
        return chosen

    @property
    def guidance_scale(self) -> float | None:
        """The one asked for, else with given pictures none, else the bundled model's, else None: the pipeline's own."""
        from probekit.models.given import GUIDANCE

        if self.guidance is None and self._pair.images:
            return GUIDANCE
        return self.loaded.painter.defaults.get("guidance_scale") if self.guidance is None else self.guidance

    @functools.cached_property
    def _starts(self) -> Starts:
        """What O and E start from. Raises ProbekitError as `starts_of`."""
        from probekit.models import given

        how: dict[str, Any] = {
            "seed": self.seed,
            "steps": self.num_steps,
            "guidance": self.guidance_scale,
            "method": self.inversion,
        }
        starts = starts_of(self.loaded, self._pair, **how)
        if self.noise_edit is None or self.image_edit is not None:
            return starts
        edit = given.numbered(self.loaded, self.noise_edit, self.seed) if starts.given else self.noise_edit
        return dataclasses.replace(starts, edit=edit)

    @functools.cached_property
    def swap(self) -> Swap:
        """O, E, and O with layers of E. Raises ProbekitError for steps and pictures that the model cannot have."""
        model, starts = self.loaded, self._starts
        check_steps(model.pipeline, self.windows_by_label, self.num_steps)
        options: dict[str, Any] = {"num_inference_steps": self.num_steps}
        if self.guidance_scale is not None:
            options["guidance_scale"] = self.guidance_scale
        return model.swap((self.prompt_original, starts.original), (self.prompt_edit, starts.edit), seed=self.seed, **options)

    @functools.cached_property
    def asked(self) -> dict[str, Asked]:
        """What each picture is asked, by its unit."""
        from probekit.report.injection import picture_name
        from probekit.report.picture import TOGETHER

        names = [la.name for la in self.chosen]
        if not self.apart:
            ((window, steps),) = self.windows_by_label.items()
            return {TOGETHER: Asked(window, steps, tuple(names))}
        return {
            picture_name(window, name): Asked(window, steps, (name,))
            for window, steps in self.windows_by_label.items()
            for name in names
        }

    @abstractmethod
    def _operation(self) -> hooks.Operation: ...

    @property
    def _source(self) -> hooks.Source:
        from probekit import hooks

        return hooks.Row(0)

    def rule(self, asked: Asked) -> list[hooks.Injection]:
        """The injections of one picture. Raises ProbekitError for words that the caption does not have."""
        from probekit import hooks

        source, operation = self._source, self._operation()
        mask = None if self.mask is None else read_mask(self.mask)
        tokens = None if self.words is None else self._tokens(self.words)
        return [hooks.Injection(name, source, asked.steps, operation, self.stream, mask, tokens) for name in asked.layers]

    def _tokens(self, words: str) -> tuple[int, ...]:
        spoken = self.loaded.painter.words(self.prompt_edit)
        if not spoken:
            raise ProbekitError(
                f"--words {words!r}: where the words of model {self.loaded.name!r}'s captions stand is not known"
            )
        if odd := [word for word in words.split() if word not in dict(spoken)]:
            raise ProbekitError(f"--words {odd[0]!r}: --prompt-edit has the words {' '.join(word for word, _ in spoken)}")
        return tuple(sorted({token for word, at in spoken if word in words.split() for token in at}))

    # --- the experiment ---------------------------------------------------------------------------------------------------

    def inputs(self) -> dict[str, Any]:
        """The model's fingerprint, the layers and windows, and what options left open; with given pictures their files' too."""
        from probekit.models.given import read
        from probekit.report.network import carry_text

        model = self.loaded
        digests = {}
        for side, (file, _) in self._pair.images.items():
            with naming(f"--image-{side} {file!r}", file):
                _, digests[file] = read(file, model.diffusion.image_size)
        told: dict[str, Any] = {"picture_digests": digests} if digests else {}
        if carrying := carry_text(self.chosen):  # as the network is drawn by it
            told["carry_text"] = carrying
        check_steps(model.pipeline, self.windows_by_label, self.num_steps)
        for asked in self.asked.values():
            self.rule(asked)  # refuses what cannot be asked
        return told | {
            "model_digest": model.digest,
            "chosen": [la.name for la in self.chosen],
            "swept_windows": list(self.windows_by_label),
            "guidance_scale": self.guidance_scale,
            "precision": str(model.pipeline.dtype).removeprefix("torch."),
            "descriptors": [descriptor.name for descriptor in general_descriptors_of(model.name)],
            "scenes": self._of_scenes,
        }

    @property
    def _of_scenes(self) -> bool:
        from probekit.bundled import PIPELINES

        return self.loaded.name in PIPELINES

    def plan(self) -> list[Unit]:
        """A unit a picture."""
        return [Unit(name) for name in self.asked]

    def work(self, unit: Unit, bench: Bench) -> Work:
        """O, E and O with layers of E, and what came over (`rows_of`)."""
        if self.apart:
            self.swap.take([(la.name, self.stream) for la in self.chosen])
        return self.answer(unit.name)

    def answer(self, unit: str, on_step: OnStep | None = None) -> Work:
        """The pictures and rows of a unit. on_step: as of `Swap.__call__`.

        Rows: one a descriptor, and of scenes one an attribute that the reader reads: descriptor, attribute (empty for what is
        of the whole picture), transfer, damage; of an attribute also the values seen in O (`original`), E (`edit`) and the
        picture (`seen`), whose distances are 0 or 1.
        """
        from probekit.report.picture import TOGETHER

        asked = self.asked[unit]
        image = self.swap(self.rule(asked), on_step)
        o, e = self.swap.original, self.swap.edit
        of: dict[str, Any] = {"window": asked.window, "layer": asked.layers[0] if self.apart else TOGETHER}
        of |= self._starts.errors({"original": o, "edit": e})
        rows = [of | row for row in (*self._read(image), *self._measured(image))]
        return Work(rows, {"O": o, "E": e, "result": image})

    def _read(self, image: Tensor) -> list[dict[str, Any]]:
        """What the reader of scenes reads; nothing of other models' pictures."""
        import torch

        from probekit.data.scenes import VALUES
        from probekit.metrics.readers import scene_reader
        from probekit.metrics.roles import damage, transfer

        if not self._of_scenes:
            return []
        rows = []
        three = torch.stack([self.swap.original, self.swap.edit, image]).float().cpu()
        for attribute, values in scene_reader().read(three).items():
            original, edit, seen = (VALUES[attribute][index] for index in values.tolist())
            distances = float(seen != original), float(seen != edit), float(original != edit)
            told = {"original": original, "edit": edit, "seen": seen}
            scores = {"transfer": transfer(*distances), "damage": damage(*distances)}
            rows.append({"descriptor": "reader", "attribute": attribute} | told | scores)
        return rows

    def _measured(self, image: Tensor) -> list[dict[str, Any]]:
        """What the descriptors of whole pictures measure."""
        from probekit.metrics.roles import damage, transfer

        rows = []
        for descriptor, seen_o, seen_e, between in self._seen:
            (seen,) = descriptor.features(image[None])
            distances = descriptor.distance(seen_o, seen), descriptor.distance(seen_e, seen), between
            scores = {"transfer": transfer(*distances), "damage": damage(*distances)}
            none = dict.fromkeys(("attribute", "original", "edit", "seen"), "")
            rows.append({"descriptor": descriptor.name} | none | scores)
        return rows

    @functools.cached_property
    def _seen(self) -> list[tuple[Descriptor, Any, Any, float]]:
        """Each descriptor, what it sees of O and of E, and how far these are apart."""
        found = []
        for descriptor in general_descriptors_of(self.loaded.name):
            seen_o, seen_e = (descriptor.features(end[None])[0] for end in (self.swap.original, self.swap.edit))
            found.append((descriptor, seen_o, seen_e, descriptor.distance(seen_o, seen_e)))
        return found

    def findings(self, run: Run, rows: pd.DataFrame) -> Findings:
        """What came over."""
        from probekit.report.picture import findings

        return findings(run, rows)


def read_mask(text: str) -> Tensor:
    """The mask (h, w) of zeros and ones that `16x16:…` spells: height, width, and its bits row by row as hexadecimal digits.

    The bits are filled up with zeros to whole digits. Raises ProbekitError for what is no such text, and for an empty mask.
    """
    import torch

    match = re.fullmatch(r"([1-9]\d{0,2})x([1-9]\d{0,2}):([0-9a-fA-F]+)", text)
    height, width = (int(match[1]), int(match[2])) if match else (0, 0)
    digits = match[3] if match else ""
    if match is None or len(digits) != -(-height * width // 4):
        raise ProbekitError(f"--mask {text[:60]!r}: write height x width and a bit a cell as hexadecimal digits, such as 2x2:8")
    bits = "".join(f"{int(digit, 16):04b}" for digit in digits)[: height * width]
    if "1" not in bits:
        raise ProbekitError(f"--mask {text[:60]!r}: nothing lies inside it")
    return torch.tensor([float(bit) for bit in bits]).reshape(height, width)


@dataclass(frozen=True, kw_only=True)
class InjectImage(_Picture):
    """One custom injection: the chosen layers of E, together, into O."""

    name: ClassVar[str] = "inject-image"

    operation: Annotated[str, typer.Option(help="replace, blend, add, or bypass: the layers are left out.")] = "replace"
    weight: Annotated[float | None, typer.Option(help="Weight of blend, or scale of add. [default: 1]")] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.operation not in OPERATIONS:
            raise ProbekitError(f"--operation {self.operation!r}: choose from {', '.join(OPERATIONS)}")
        if self.operation in ("replace", "bypass") and self.weight is not None:
            raise ProbekitError(f"--weight {self.weight:g}: {self.operation} has none; it is for --operation blend or add")

    @property
    def _source(self) -> hooks.Source:
        from probekit import hooks

        return hooks.Nothing() if self.operation == "bypass" else hooks.Row(0)

    def _operation(self) -> hooks.Operation:
        from probekit import hooks

        weight = 1.0 if self.weight is None else self.weight
        made: dict[str, Callable[[], hooks.Operation]] = {
            "blend": lambda: hooks.blend(weight),
            "add": lambda: hooks.add(weight),
        }
        return made[self.operation]() if self.operation in made else hooks.replace


@dataclass(frozen=True, kw_only=True)
class InjectScript(_Picture):
    """One injection with a function of your own, called at every chosen layer and step."""

    name: ClassVar[str] = "inject-script"

    file: Annotated[Path, typer.Argument(help="A Python file that defines operation(target, source, context) -> tensor.")]

    def inputs(self) -> dict[str, Any]:
        """As of `inject image`, and the file's fingerprint."""
        operation = self._operation()  # refuses a file that is none
        digest = hashlib.sha256(self.file.read_bytes()).hexdigest()[:12]
        return {"script_digest": digest, "operation": getattr(operation, "__name__", "operation")} | super().inputs()

    def _operation(self) -> hooks.Operation:
        """The file's function. Raises ProbekitError where the file or its function fails."""
        from probekit import own_code

        said = f"script {str(self.file)!r}"
        operation = own_code.run(said, self.file).get("operation")
        if not callable(operation):
            raise ProbekitError(f"{said}: must define operation(target, source, context) -> tensor")

        def called(target: Tensor, source: Tensor, context: hooks.Context) -> Tensor:
            with own_code.called(f"{said} at {context.layer}"):
                return operation(target, source, context)

        return called
