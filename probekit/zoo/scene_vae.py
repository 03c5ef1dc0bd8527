"""The KL autoencoder of scenes, 3x64x64 <-> 4x16x16: mini-sd's and mini-sd3's image space."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probekit.data.scenes import all_scenes, render, sample_scenes
from probekit.zoo.training import Schedule, train

SCHEDULE = Schedule(steps=4000, learning_rate=2e-3, ema=0.998, bfloat16=True)
BATCH = 16


def build() -> nn.Module:
    """An untrained AutoencoderKL with two downsamplings."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


def loss(vae: nn.Module, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    """Mean absolute error of pixels, doubled at edges, plus 2e-4 times the code's KL divergence a dimension."""
    scenes = sample_scenes(BATCH, generator)
    images = render(scenes, generator).to(next(vae.parameters()).dtype)
    posterior = vae.encode(images).latent_dist  # type: ignore[operator]
    noise = torch.randn(posterior.mean.shape, generator=generator).to(images.dtype)
    decoded = vae.decode(posterior.mean + posterior.std * noise).sample.float()  # type: ignore[operator]
    error = (decoded - images.float()).abs()
    kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
    l1, edges = error.mean(), sum(_slope_error(decoded, images.float(), axis) for axis in (2, 3))
    return l1 + edges + 2e-4 * kl, {"l1": l1.item(), "kl": kl.item()}


def _slope_error(decoded: Tensor, images: Tensor, axis: int) -> Tensor:
    return F.l1_loss(decoded.diff(dim=axis), images.diff(dim=axis))


def train_and_save(folder: Path, checkpoints: Path, *, seed: int = 0) -> None:
    """Train and write a diffusers folder; the codes' standard deviation becomes its `scaling_factor`."""
    torch.manual_seed(seed)
    vae = train(build(), loss, SCHEDULE, checkpoint=checkpoints / "scene-vae.pt", seed=seed, title="scene-vae")
    generator = torch.Generator().manual_seed(seed)
    pool = all_scenes()
    chosen = [pool[i] for i in torch.randint(len(pool), (512,), generator=generator).tolist()]
    with torch.no_grad():
        codes = vae.encode(render(chosen, generator)).latent_dist.mean  # type: ignore[operator]
    vae.register_to_config(scaling_factor=1 / codes.std().item())  # type: ignore[operator]
    vae.half().save_pretrained(folder)  # type: ignore[operator]
