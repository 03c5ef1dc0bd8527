"""One custom injection: chosen layers of E, together, into O; with an operation of the package's or of the user's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from probekit import checked
from probekit.experiments.loading import Dtype, Offload, Variant
from probekit.hooks.errors import ProbekitError
from probekit.runs.experiment import Options

if TYPE_CHECKING:
    from torch import Tensor

    from probekit import hooks

OPERATIONS = ("replace", "blend", "add")


@dataclass(frozen=True, kw_only=True)
class _Picture(Options):
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
    layers: Annotated[list[str], typer.Option(help="Layer names, globs or groups such as @mid; repeat for more.")]
    model: Annotated[str, typer.Option(help="A bundled model, a local diffusers folder or a hub id.")] = "mini-sd"
    steps: Annotated[str, typer.Option(help="Steps to inject at: all, 0-9, 0,3,5, 0%-50% or t1000-200.")] = "all"
    stream: Annotated[str | None, typer.Option(help="main, skip, both, image or text. [default: the layer's own]")] = None
    num_steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 20
    guidance: Annotated[
        float | None,
        typer.Option(help="Guidance scale. [default: 3 for mini-sd, else the pipeline's own; 1, none, with given pictures]"),
    ] = None
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the noise.")] = 0
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto"
    dtype: Dtype = "auto"
    variant: Variant = None
    offload: Offload = "none"
    out: Annotated[Path, typer.Option(help="The picture to write: O, E and the result, side by side.")] = Path("injected.png")

    def __post_init__(self) -> None:
        super().__post_init__()
        from probekit.experiments.inject_sweep import check_inversion, make_windows

        if not self.layers:
            raise ProbekitError("--layers: name at least one")
        if self.out.suffix.lower() != ".png":
            raise ProbekitError(f"--out {str(self.out)!r}: name a .png file")
        check_inversion(self.inversion, bool(self.image_original or self.image_edit))
        make_windows(self.steps, self.num_steps, 1)  # refuses steps that are none

    def _write(self, operation: hooks.Operation) -> str:
        """Make and write the picture; returns what was injected and where it is."""
        import torch

        from probekit import hooks
        from probekit.experiments.inject_sweep import OWN, Pair, check_steps, naming, starts_of
        from probekit.files import writing
        from probekit.images import save_png
        from probekit.models import load
        from probekit.models.given import GUIDANCE, invertible, read
        from probekit.report.injection import given

        out, when = checked.file_to_write(f"--out {str(self.out)!r}", self.out), hooks.Steps.parse(self.steps)
        loaded = load(self.model, device=self.device, dtype=self.dtype, variant=self.variant, offload=self.offload)
        images = [None if file is None else str(file) for file in (self.image_original, self.image_edit)]
        pair = Pair(OWN, OWN, self.prompt_original, self.prompt_edit, "", 0, *images)
        guidance = self.guidance
        for side, (file, _) in pair.images.items():
            with naming(f"--image-{side} {file!r}", file):
                loaded = invertible(loaded)
                read(file, loaded.diffusion.image_size)
            guidance = GUIDANCE if guidance is None else guidance
        painter = loaded.painter
        chosen = hooks.select(loaded.layers, self.layers)
        rule = [hooks.Injection(la.name, steps=when, stream=self.stream, operation=operation) for la in chosen]
        options: dict[str, Any] = {"num_inference_steps": self.num_steps}
        if guidance is not None:
            options["guidance_scale"] = guidance
        check_steps(painter.pipeline, {self.steps: when}, self.num_steps)
        starts = starts_of(loaded, pair, seed=self.seed, steps=self.num_steps, guidance=guidance, method=self.inversion)
        original, edit = (self.prompt_original, starts.original), (self.prompt_edit, starts.edit)
        swept = painter.sweep(original, edit, [[], rule], seed=self.seed, **options)
        with writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            save_png(torch.cat([swept.images[0], swept.edit, swept.images[1]], dim=2), out)
        errors = starts.errors({"original": swept.images[0], "edit": swept.edit})
        lines = [", ".join(la.name for la in chosen), f"O, E and the result: {out}"]
        if pair.images:
            files = {side: file for side, (file, _) in pair.images.items()}
            lines.append(given.says(given.made_again("the result", files, errors)))
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class InjectImage(_Picture):
    """One custom injection: the chosen layers of E, together, into O."""

    operation: Annotated[str, typer.Option(help="replace, blend or add.")] = "replace"
    weight: Annotated[float | None, typer.Option(help="Weight of blend, or scale of add. [default: 1]")] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.operation not in OPERATIONS:
            raise ProbekitError(f"--operation {self.operation!r}: choose from {', '.join(OPERATIONS)}")
        if self.operation == "replace" and self.weight is not None:
            raise ProbekitError(f"--weight {self.weight:g}: replace has none; it is for --operation blend or add")

    def run(self) -> str:
        """Write the picture; returns what was done. Raises ProbekitError for what cannot be injected."""
        from probekit import hooks

        weight = 1.0 if self.weight is None else self.weight
        operations = dict(zip(OPERATIONS, (hooks.replace, hooks.blend(weight), hooks.add(weight)), strict=True))
        return self._write(operations[self.operation])


@dataclass(frozen=True, kw_only=True)
class InjectScript(_Picture):
    """One injection with a function of your own, called at every chosen layer and step."""

    file: Annotated[Path, typer.Argument(help="A Python file that defines operation(target, source, context) -> tensor.")]

    def run(self) -> str:
        """Write the picture; returns what was done. Raises ProbekitError where the file or its function fails."""
        from probekit import own_code

        said = f"script {str(self.file)!r}"
        operation = own_code.run(said, self.file).get("operation")
        if not callable(operation):
            raise ProbekitError(f"{said}: must define operation(target, source, context) -> tensor")

        def called(target: Tensor, source: Tensor, context: hooks.Context) -> Tensor:
            with own_code.called(f"{said} at {context.layer}"):
                return operation(target, source, context)

        return self._write(called)
