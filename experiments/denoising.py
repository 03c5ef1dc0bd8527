"""What the experiments on noise and samples share: their options, the model, and its samples from numbered noises."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from probekit.hooks.errors import ProbekitError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from probekit.runs import Run
    from probekit.sampling import Denoiser, Diffusion

MODEL = "avatar-ddpm"
ModelName = Annotated[str, typer.Option("--model", help="A bundled model, a folder, a hub id, or one of the papers' files.")]
Prompt = Annotated[str | None, typer.Option(help="The caption of a text-to-image model's images.")]
Label = Annotated[int | None, typer.Option(min=0, help="The class of a DiT's images, by its number.")]
Guidance = Annotated[float, typer.Option(min=0, help="Classifier-free guidance; 1 is none, and inversion likes none.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16; text-to-image models only.")]
BatchSize = Annotated[int, typer.Option(min=1, max=64, help="How many pictures go through the model at a time.")]


@dataclass(frozen=True, eq=False)
class Denoising:
    """A model that takes part, and the options that say which one it is."""

    diffusion: Diffusion
    options: dict[str, Any]
    batch_size: int

    def walk(self, states: Tensor, way: Callable[[Denoiser, Tensor], Tensor]) -> Tensor:
        """`way` from states to states, `batch_size` rows at a time; on the CPU."""
        import torch

        parts = torch.split(states, self.batch_size)
        return torch.cat([way(self.diffusion.denoiser(len(part)), part).cpu() for part in parts])


def load(
    model: str, device: str, dtype: str, prompt: str | None = None, label: int | None = None, guidance: float = 1.0,
    batch_size: int = 32,
) -> Denoising:  # fmt: skip
    """The model, ready to sample. Raises ProbekitError as `probekit.models.load_diffusion`."""
    from probekit.models import Model, load_diffusion

    loaded, diffusion = load_diffusion(model, device=device, dtype=dtype, prompt=prompt, label=label, guidance=guidance)
    network: Any = loaded.network if isinstance(loaded, Model) else loaded.denoiser
    precision = str(next(network.parameters()).dtype).removeprefix("torch.")
    options = {"model": model, "model_digest": loaded.digest, "dtype": precision, "prompt": prompt, "label": label,
               "guidance": guidance}  # fmt: skip
    return Denoising(diffusion, options, batch_size)


def samples(
    opened: Run, name: str, denoising: Denoising, steps: int, n: int, seed: int, on_block: Callable[[int], None]
) -> np.ndarray:
    """What noises 0 … n - 1 of a seed become in `steps` steps, (n, *shape), kept among the run's states under that name."""
    from probekit.sampling import sample

    diffusion, schedule = denoising.diffusion, denoising.diffusion.schedule(steps)

    def make(rows: range) -> Tensor:
        noise = diffusion.noise(rows, seed)
        return denoising.walk(noise, lambda denoiser, part: sample(denoiser, part, schedule).end)

    return opened.states(name, n, diffusion.shape, make, on_block)


def step_counts(text: str) -> list[int]:
    """`--steps 10,100` as numbers. Raises ProbekitError for what is none."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 1 <= len(part) <= 5 and int(part) > 0 for part in parts):
        raise ProbekitError(f"--steps {text!r}: write numbers of steps, as 10,100")
    return sorted({int(part) for part in parts})


def as_picture(states: Tensor) -> Tensor:
    """States of unit variance as pictures (n, 3, h, w) in [-1, 1], which are three standard deviations: the first channels.

    Fewer channels are repeated; tokens (n, tokens, c), Flux's, are laid out as a square.
    """
    if states.ndim == 3:
        side = math.isqrt(states.shape[1])
        states = states[:, : side * side].mT.reshape(len(states), -1, side, side)
    return (states[:, [min(channel, states.shape[1] - 1) for channel in range(3)]] / 3).clamp(-1, 1)
