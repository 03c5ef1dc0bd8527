"""Given pictures: brought to a model's size and inverted under their captions, so that its own pipeline makes them again."""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from probekit.data.folder import read_images
from probekit.hooks.errors import ProbekitError
from probekit.metrics import lpips
from probekit.models.families import text_to_image
from probekit.models.model import Model
from probekit.sampling.inversions import inverted
from probekit.sampling.schedule import reversible

METHODS = ("fixed-point", "newton", "renoise", "plain")
"""Inversions whose way back is the sampling of a pipeline: others have one of their own, and renoised draws part of what
should lead back."""

GUIDANCE = 1.0
"""The guidance scale of inversion and of what is made again, where nobody says: none.

On mini-sd, 20 steps, it is then made again as exactly as the autoencoder can, and the latents are as wide as noise; with
guidance 3 there are steps that have no start (their fixed point is not met), and the latents are 1.8 times as wide.
"""

FAR = 0.1
"""The LPIPS from which on a rebuilt picture is another one.

Of 120 scenes of mini-sd, inverted badly on purpose, the scene reader took 17 of the 18 beyond it for another scene, 12 of the
25 between half of it and it, and 16 of the 77 below that.
"""


@dataclass(frozen=True, eq=False)
class Given:
    """A picture and where a pipeline starts to make it again.

    picture: (3, h, w) in [-1, 1], at the model's size. coded: the same after the autoencoder alone, which is the nearest that
    one made again can come. latent: (1, *shape), in the denoiser's precision, for the pipeline's `latents`.
    """

    picture: Float[Tensor, "3 h w"]
    coded: Float[Tensor, "3 h w"]
    latent: Float[Tensor, "1 ..."]

    def errors(self, rebuilt: Float[Tensor, "3 h w"]) -> dict[str, float]:
        """How far the picture made again is from the given one.

        psnr: 10 log10(2² / mean squared error), in dB. lpips: as `metrics.lpips`. coded_psnr, coded_lpips: the same of what the
        autoencoder alone makes of the given one. spread: the latent's standard deviation; noise has 1.
        """
        both = torch.stack([rebuilt.float().cpu(), self.coded])
        given = self.picture.expand_as(both)
        square = (both.double() - given.double()).square().flatten(1).mean(1)
        psnr = 10 * torch.log10(4 / square.clamp_min(torch.finfo(torch.float64).tiny))
        far = lpips.distances(given.contiguous(), both)
        found = {
            "psnr": psnr[0],
            "lpips": far[0],
            "coded_psnr": psnr[1],
            "coded_lpips": far[1],
            "spread": self.latent.float().std(),
        }
        return {name: float(value) for name, value in found.items()}


def read(file: Path | str, image_size: int) -> tuple[Float[Tensor, "3 h w"], str]:
    """The centre square of a picture, at that size (`data.folder.read_images`), and a fingerprint of its file, 12 hex digits.

    Raises ProbekitError for what is not there or no picture.
    """
    picture = read_images([Path(file)], image_size)[0]
    return picture, hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12]


def invert(
    model: Model,
    picture: Float[Tensor, "3 h w"],
    prompt: str,
    *,
    steps: int,
    guidance: float = GUIDANCE,
    method: str = METHODS[0],
) -> Given:
    """Encode a picture and invert it under its caption: `model`, which is `invertible`, makes it again from the latent.

    steps, guidance: those that it is then sampled with. method: of `METHODS`. Raises ProbekitError for a model whose latents
    are not known, for guidance that it does not take, for a picture of another size, and where the inversion diverges.
    """
    diffusion = model.conditioned(prompt=prompt, guidance=guidance).diffusion
    states = diffusion.encode(picture[None])
    found = inverted(diffusion, method, states, diffusion.schedule(steps), torch.zeros_like(states))
    precision = next(diffusion.network.parameters()).dtype
    return Given(picture, diffusion.decode(states)[0], found.end.float().cpu().to(precision))


def numbered(model: Model, number: int, seed: int) -> Float[Tensor, "1 ..."]:
    """The noise of that number as a latent, for a row beside those of given pictures: all rows have the same arguments."""
    diffusion = model.diffusion
    return diffusion.noise([number], seed).to(next(diffusion.network.parameters()).dtype)


def invertible(model: Model) -> Model:
    """The same text-to-image model, sampled by a scheduler whose steps can be inverted.

    That is its own where that is DDIM's, without clipping, or rectified flow's; else DDIM with the own one's noise levels, if
    the own one draws no noise. Raises ProbekitError for one that does, for one without such levels, and for a model whose
    latents are not known.
    """
    name, pipeline = model.name, model.pipeline
    _ = model.diffusion  # refuses latents that are not known
    own = pipeline.scheduler
    kind = type(own).__name__
    try:
        other = reversible({"_class_name": kind, **own.config})
    except ProbekitError as error:
        raise ProbekitError(f"model {name!r}: {error}") from error
    if type(own) is type(other):
        if _told(own) == _told(other):
            return model
    elif _draws(own):
        raise ProbekitError(
            f"model {name!r}: its {kind} draws noise on the way, so nothing leads to a given picture alone; a model with "
            "another scheduler, such as DDIMScheduler, would do"
        )
    twin = copy.copy(pipeline)  # its parts are the pipeline's own
    twin.scheduler = other
    return text_to_image.as_model(twin, name)


def _told(scheduler: Any) -> Mapping[str, Any]:
    """What of a scheduler's config its class knows."""
    return {key: scheduler.config[key] for key in inspect.signature(type(scheduler)).parameters if key in scheduler.config}


def _draws(scheduler: Any) -> bool:
    """Whether a scheduler with betas adds noise of its own on the way: the second time it then leads elsewhere.

    Which ones do is not to be read off their names (DPM-Solver may, TCD does) nor off one step (ancestral KDPM2 does at every
    other, SA-Solver in the middle).
    """

    def led(seed: int) -> Tensor:
        fresh = type(scheduler).from_config(scheduler.config)
        torch.manual_seed(seed)
        fresh.set_timesteps(12)
        states = [torch.ones(1, 1, 8, 8)]
        for timestep in fresh.timesteps:
            seen = fresh.scale_model_input(states[-1], timestep)
            states.append(fresh.step(torch.zeros_like(seen), timestep, states[-1]).prev_sample)
        return torch.cat(states)

    with torch.random.fork_rng():
        return not torch.allclose(led(0), led(1), equal_nan=True)
