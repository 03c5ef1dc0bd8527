"""One custom injection: chosen layers of E, together, into O; with an operation of the package's or of the user's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
    layers: Annotated[list[str], typer.Option(help="Layer names, globs or groups such as @mid; repeat for more.")]
    model: Annotated[str, typer.Option(help="A bundled model, a local diffusers folder or a hub id.")] = "mini-sd"
    steps: Annotated[str, typer.Option(help="Steps to inject at: all, 0-9, 0,3,5, 0%-50% or t1000-200.")] = "all"
    stream: Annotated[str | None, typer.Option(help="main, skip, both, image or text. [default: the layer's own]")] = None
    num_steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 20
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale. [default: 3 for mini-sd, else the pipeline's own]")
    ] = None
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the noise.")] = 0
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto"
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto"
    out: Annotated[Path, typer.Option(help="The picture to write: O, E and the result, side by side.")] = Path("injected.png")

    def __post_init__(self) -> None:
        super().__post_init__()
        from probekit.experiments.inject_sweep import make_windows

        if not self.layers:
            raise ProbekitError("--layers: name at least one")
        if Path(self.out).suffix.lower() != ".png":
            raise ProbekitError(f"--out {str(self.out)!r}: name a .png file")
        make_windows(self.steps, self.num_steps, 1)  # refuses steps that are none

    def _write(self, operation: hooks.Operation) -> str:
        """Make and write the picture; returns what was injected and where it is."""
        import torch

        from probekit import hooks
        from probekit.experiments.inject_sweep import check_steps
        from probekit.files import writing
        from probekit.images import save_png
        from probekit.models import load

        out, when = Path(self.out), hooks.Steps.parse(self.steps)
        loaded = load(self.model, device=self.device, dtype=self.dtype)
        painter = loaded.painter
        chosen = hooks.select(loaded.layers, self.layers)
        rule = [hooks.Injection(la.name, steps=when, stream=self.stream, operation=operation) for la in chosen]
        options: dict[str, Any] = {"num_inference_steps": self.num_steps}
        if self.guidance is not None:
            options["guidance_scale"] = self.guidance
        check_steps(painter.pipeline, {self.steps: when}, self.num_steps)
        original, edit = (self.prompt_original, 0), (self.prompt_edit, 0)
        swept = painter.sweep(original, edit, [[], rule], seed=self.seed, **options)
        with writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            save_png(torch.cat([swept.images[0], swept.edit, swept.images[1]], dim=2), out)
        return f"{', '.join(la.name for la in chosen)}\nO, E and the result: {out}"


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
        import runpy

        file = str(self.file)
        try:
            operation = runpy.run_path(file).get("operation")
        except OSError as error:
            raise ProbekitError(f"script {file!r}: cannot be read ({error.strerror})") from error
        except Exception as error:
            raise ProbekitError(f"script {file!r}: {type(error).__name__}: {error}") from error
        if not callable(operation):
            raise ProbekitError(f"script {file!r}: must define operation(target, source, context) -> tensor")

        def guarded(target: Tensor, source: Tensor, context: hooks.Context) -> Tensor:
            try:
                return operation(target, source, context)
            except Exception as error:
                raise ProbekitError(f"script {file!r} at {context.layer}: {type(error).__name__}: {error}") from error

        return self._write(guarded)
