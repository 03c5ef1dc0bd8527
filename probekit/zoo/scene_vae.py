"""The KL autoencoder of scenes, 3x64x64 <-> 4x16x16: the image space of mini-sd."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from probekit.data.scenes import PLACES, Scene, all_scenes, render, sample_scenes
from probekit.files import whole_folder
from probekit.zoo.training import Schedule, train

# most of the training sees quarter-size windows around the objects: four times as fast, and objects fill more of them
WINDOWS = Schedule(steps=3000, learning_rate=1.5e-3, ema=0.998, bfloat16=True)
WHOLE = Schedule(steps=800, learning_rate=6e-4, ema=0.995, bfloat16=True)
BATCH = 16


def build() -> nn.Module:
    """An untrained AutoencoderKL with two downsamplings.

    One normalisation group: with more, a picture of one colour is normalised to nothing and its colour is learned late.
    """
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        sample_size=64,
        mid_block_add_attention=False,
        shift_factor=0.0,  # StableDiffusion3Pipeline takes no none
    )


def loss_of_windows(vae: nn.Module, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    """`loss` on 32x32 windows that hold the object or part of it."""
    scenes = sample_scenes(BATCH, generator)
    return loss(vae, _windows(render(scenes, generator), scenes, generator), generator)


def loss_of_pictures(vae: nn.Module, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    """`loss` on whole pictures."""
    return loss(vae, render(sample_scenes(BATCH, generator), generator), generator)


def loss(vae: nn.Module, images: Float[Tensor, "n 3 h w"], generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    """Squared error, plus 0.3 times the absolute error of pixels and of slopes, plus 1e-5 times the KL a dimension."""
    dtype = next(vae.parameters()).dtype
    posterior = vae.encode(images.to(dtype)).latent_dist  # type: ignore[operator]
    noise = torch.randn(posterior.mean.shape, generator=generator).to(dtype)
    decoded = vae.decode(posterior.mean + posterior.std * noise).sample.float()  # type: ignore[operator]
    error = decoded - images
    kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
    slopes = F.l1_loss(decoded.diff(dim=2), images.diff(dim=2)) + F.l1_loss(decoded.diff(dim=3), images.diff(dim=3))
    squared, absolute = error.square().mean(), error.abs().mean()
    value = squared + 0.3 * (absolute + slopes) + 1e-5 * kl
    return value, {"l1": absolute.item(), "mse": squared.item(), "kl": kl.item()}


def _windows(images: Tensor, scenes: list[Scene], generator: torch.Generator) -> Float[Tensor, "n 3 32 32"]:
    """A 32x32 window of every picture, at a multiple of 4 pixels, around its object where the border allows."""
    centres = torch.tensor([PLACES[s.place] for s in scenes])
    corners = ((centres - 32 * torch.rand(len(scenes), 2, generator=generator)).clamp(0, 32) / 4).round().long() * 4
    return torch.stack([image[:, y : y + 32, x : x + 32] for image, (x, y) in zip(images, corners.tolist(), strict=True)])


def train_and_save(folder: Path, checkpoints: Path, *, seed: int = 0) -> None:
    """Train and write a diffusers folder; the codes' standard deviation becomes its `scaling_factor`."""
    torch.manual_seed(seed)
    vae = build()
    for name, loss_, schedule in (("windows", loss_of_windows, WINDOWS), ("pictures", loss_of_pictures, WHOLE)):
        title = f"scene-vae on {name}"
        vae = train(vae, loss_, schedule, checkpoint=checkpoints / f"scene-vae-{name}.pt", seed=seed, title=title)
    generator = torch.Generator().manual_seed(seed)
    pool = all_scenes()
    chosen = [pool[i] for i in torch.randint(len(pool), (512,), generator=generator).tolist()]
    with torch.no_grad():
        codes = vae.encode(render(chosen, generator)).latent_dist.mean  # type: ignore[operator]
    vae.register_to_config(scaling_factor=1 / codes.std().item())  # type: ignore[operator]
    # whole or not at all: where it is there, mini-sd's recipe does not train it again
    with whole_folder(folder) as partial:
        vae.half().save_pretrained(partial)  # type: ignore[operator]
