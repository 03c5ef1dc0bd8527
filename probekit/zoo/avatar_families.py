"""Generative models of avatars: the five families of All Roads, rectified flow, latent diffusion; and a DDPM of photos."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probekit.bundled import weights
from probekit.data.avatars import IMAGE_SIZE, Avatars
from probekit.data.dataset import Dataset
from probekit.data.photos import Photos
from probekit.models import saved
from probekit.models.families import glow, vae, vqvae
from probekit.progress import progress
from probekit.zoo import lending, stylegan2_ada
from probekit.zoo.measured import Measured
from probekit.zoo.training import Schedule, train

Numbers = dict[str, float]
Images = Float[Tensor, "n 3 h w"]

TRUNCATION = 0.7
"""Under which a GAN is evaluated beside none, as Karras et al. (2019) show its pictures."""


@dataclass(frozen=True)
class Family:
    """One family's recipe.

    keep: after how many steps the weights of that moment are kept beside the final ones. data: what it learns.
    """

    build: Callable[[], nn.Module]
    loss: Callable[[Any, Images, torch.Generator], tuple[Tensor, Numbers]]
    save: Callable[[Any, Path], None]
    schedule: Schedule
    batch: int
    keep: tuple[int, ...] = ()
    data: Callable[[], Dataset] = Avatars


def train_and_save(name: str, folder: Path, checkpoints: Path, *, seed: int = 0) -> None:
    """Train one of `FAMILIES` on the training part of its data and write its weights; snapshots go to `folder`/step-<n>."""
    family = FAMILIES[name]
    data = family.data()
    training = data.split("train")

    def loss(network: nn.Module, generator: torch.Generator) -> tuple[Tensor, Numbers]:
        index = training[torch.randint(len(training), (family.batch,), generator=generator).numpy()]
        return family.loss(network, data.images(index), generator)

    def keep(step: int) -> Callable[[nn.Module], None]:
        return lambda network: family.save(network, folder / f"step-{step:06d}")

    torch.manual_seed(seed)
    network = train(
        family.build(),
        loss,
        family.schedule,
        checkpoint=checkpoints / f"{name}.pt",
        seed=seed,
        title=name,
        snapshots={step: keep(step) for step in family.keep},
    )
    family.save(network, folder)


def evaluate(name: str, n: int, seed: int) -> list[Measured]:
    """How well a bundled model keeps and makes pictures, on n test pictures (at most 10,000) and as many samples.

    Reconstructions are decode(encode(image)) in the first space that does both, `mean` for the VAE and `inverted` for what has
    it. The Fréchet distances are over AlexNet features and depend on n: beside them stands that of training pictures, the
    least there is to reach. LPIPS is taken at 64x64. The reader's accuracy is the share of all attributes that it finds in an
    avatar's reconstruction as they are; by what it sees, samples show a face or none (`show_faces`), and the test pictures, of
    which it misses some. A GAN's samples are measured under truncation, too. Test photos show other parts of the photographs
    than training photos do, so their distance is no least one: samples can be nearer.
    """
    from probekit.metrics import lpips
    from probekit.metrics.distributions import alexnet_features, frechet
    from probekit.metrics.readers import avatar_reader, show_faces
    from probekit.models import load

    model, data = load(name, device="cpu"), FAMILIES[name].data()
    index, training = data.split("test")[:n], data.split("train")
    generator = torch.Generator().manual_seed(seed)
    test = data.images(index)
    drawn = data.images(training[torch.randint(len(training), (len(index),), generator=generator).numpy()])

    def batched(work: Callable[[Tensor], Tensor], items: Tensor, what: str) -> Tensor:
        made = []
        with progress(f"{name}: {what}", len(items)) as advance:
            for part in torch.split(items, 100):
                made.append(work(part))
                advance(len(part))
        return torch.cat(made)

    nan = float("nan")
    both = {s.name: s for s in model.spaces.values() if s.encoder and s.decoder}
    space = both.get("mean") or both.get("inverted") or next(iter(both.values()), None)
    psnr = perceptual = accuracy = of_rebuilt = nan
    reference = alexnet_features(test)
    if space is not None:
        rebuilt = batched(lambda x: space.decode(space.encode(x)), test, "reconstructions")
        error = ((rebuilt - test) / 2).square().mean((1, 2, 3)).clamp_min(1e-12)
        psnr = (-10 * error.log10()).mean().item()
        perceptual = lpips.distances(rebuilt, test).mean().item()
        if isinstance(data, Avatars):
            truth = torch.tensor(data.labels(index).to_numpy())
            accuracy = (avatar_reader().read(rebuilt) == truth).float().mean().item()
        of_rebuilt = frechet(alexnet_features(rebuilt), reference)
    prior = next((s for s in model.spaces.values() if s.sampler and s.decoder), None)
    sampled = {"": prior}
    if prior is not None and "truncation" in prior.parameters:
        sampled[f", truncation {TRUNCATION}"] = model.space(prior.name, truncation=TRUNCATION)
    of_samples = []
    for how, drawing in sampled.items():
        distance = faces = nan
        if drawing is not None:
            samples = batched(drawing.decode, drawing.sample(len(index), generator), f"samples{how}")
            distance = frechet(alexnet_features(samples), reference)
            if isinstance(data, Avatars):
                faces = show_faces(samples).float().mean().item()
        of_samples.append(Measured(f"Fréchet distance of samples{how}", distance, None, "(AlexNet)"))
        of_samples.append(Measured(f"samples that show a face{how}", faces))
    shown = show_faces(test).float().mean().item() if isinstance(data, Avatars) else nan
    return [
        Measured("reconstruction PSNR", psnr, None, "dB"),
        Measured("reconstruction LPIPS", perceptual, None, ""),
        Measured("attributes read off reconstructions", accuracy),
        Measured("Fréchet distance of reconstructions", of_rebuilt, None, "(AlexNet)"),
        *of_samples,
        Measured("test pictures that show a face", shown),
        Measured("Fréchet distance of training pictures", frechet(alexnet_features(drawn), reference), None, "(AlexNet)"),
    ]


# --- VAE ---------------------------------------------------------------------------------------------------------------


def build_vae() -> nn.Module:
    """DiffuseVAE's architecture for 32x32 images, with a code of 128.

    Most of its blocks stand at 4x4: what comes before has one value a channel, and the decoder must first learn where things
    are from the borders of its pictures.
    """
    channels = "32:32,16:64,8:128,4:192,1:128"
    return vae.VAE(
        enc_blocks="32x1,32d2,32t16,16x1,16d2,16t8,8x2,8d2,8t4,4x4,4d4,4t1",
        enc_channels=channels,
        dec_blocks="1u4,1t4,4x4,4u2,4t8,8x2,8u2,8t16,16x1,16u2,16t32,32x1",
        dec_channels=channels,
        input_size=IMAGE_SIZE,
    )


def vae_loss(network: Any, images: Images, generator: torch.Generator) -> tuple[Tensor, Numbers]:
    """DiffuseVAE's objective. beta 0.02 means that pixels have a standard deviation of 0.1; with 1 it is 0.7, and blurs."""
    return vae.loss(network, images.to(next(network.parameters()).dtype), generator, beta=0.02)


# --- VQ-VAE ------------------------------------------------------------------------------------------------------------


def build_vqvae() -> nn.Module:
    """A VQModel with two downsamplings, 3x8x8 codes from a book of 2,048: 11 bits for each 4x4 patch."""
    from diffusers import VQModel

    made = VQModel(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=3,
        num_vq_embeddings=2048,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
    )
    # diffusers starts the codes within 1/256 of each other, where nearly all are never chosen
    nn.init.normal_(made.quantize.embedding.weight)
    return made


def vqvae_loss(network: Any, images: Images, generator: torch.Generator) -> tuple[Tensor, Numbers]:
    """`vqvae.loss`, in the network's precision."""
    return vqvae.loss(network, images.to(network.dtype), generator)


# --- GAN ---------------------------------------------------------------------------------------------------------------


def build_gan() -> nn.Module:
    """A StyleGAN2 with z and w of 64, and its discriminator."""
    return stylegan2_ada.Adversaries(IMAGE_SIZE, channels=(96, 96, 64, 32), latents=64)


# --- flow --------------------------------------------------------------------------------------------------------------


def build_flow() -> nn.Module:
    """A Glow of three levels with affine couplings and LU-decomposed 1x1 convolutions."""
    return glow.Glow(in_channels=3, flows=8, blocks=3, affine=True, lu=True, width=96)


def flow_loss(network: Any, images: Images, generator: torch.Generator) -> tuple[Tensor, Numbers]:
    """Bits per dimension of images with 5 bits a channel."""
    return glow.nll(network, images, generator), {}


# --- diffusion ---------------------------------------------------------------------------------------------------------


def build_ddpm() -> nn.Module:
    """A UNet2DModel of four levels, with attention at 8x8 and 4x4."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=IMAGE_SIZE,
        block_out_channels=(32, 48, 48, 48),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=16,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )


def ddpm_scheduler() -> Any:
    """1,000 steps of the linear schedule of Ho et al. 2020, sampled by DDIM, with velocity for a target (Salimans and Ho 2022).

    At the last timestep an error in predicted noise counts 157 times in the image: after 2,600 steps of learning to predict
    noise, this network painted half of its avatars black or white.
    """
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        clip_sample=False,
        timestep_spacing="leading",
        prediction_type="v_prediction",
    )


def ddpm_loss(network: Any, images: Images, generator: torch.Generator) -> tuple[Tensor, Numbers]:
    """Mean squared error of the predicted velocity at uniformly drawn timesteps."""
    from probekit.models.families import pixels

    return pixels.loss(network, images, generator, ddpm_scheduler())


def rectified_flow_loss(network: Any, images: Images, generator: torch.Generator) -> tuple[Tensor, Numbers]:
    """Mean squared error of the velocity from image to noise at uniformly drawn times (Liu et al. 2023, equation 1)."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from probekit.models.families import pixels

    return pixels.loss(network, images, generator, FlowMatchEulerDiscreteScheduler())


def build_ldm() -> nn.Module:
    """A UNet2DModel on the grid of avatar-vqvae, 3x8x8, with attention throughout."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=IMAGE_SIZE // 4,
        block_out_channels=(64, 80),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=16,
        down_block_types=("AttnDownBlock2D",) * 2,
        up_block_types=("AttnUpBlock2D",) * 2,
    )


@functools.cache
def _vqvae() -> Any:
    from diffusers import VQModel

    from probekit.models import hub

    return hub.load_part(VQModel, str(weights("avatar-vqvae")), None, "avatar-vqvae")


@torch.no_grad()
def _scaled_grid(images: Images) -> Tensor:
    return _vqvae().encode(images).latents * _vqvae().config.scaling_factor


def ldm_loss(network: Any, images: Images, generator: torch.Generator) -> tuple[Tensor, Numbers]:
    """`ddpm_loss` on the grid of the trained VQ-VAE, scaled to a variance of 1 (Rombach et al. 2022, section 3.3)."""
    return ddpm_loss(network, _scaled_grid(images), generator)


# --- files -------------------------------------------------------------------------------------------------------------


def _save_own(family: str) -> Callable[[Any, Path], None]:
    """Half precision, in one safetensors file whose metadata name the family and the image size."""

    return lambda network, folder: saved.save(network, folder, family, IMAGE_SIZE)


def _save_generator(network: Any, folder: Path) -> None:
    _save_own("stylegan2")(network.generator, folder)


def _save_vqvae(network: Any, folder: Path) -> None:
    """With the factor that brings the training images' grid to a standard deviation of 1, for diffusion on it."""
    with torch.no_grad():
        grid = network.float().encode(Avatars().images(range(500))).latents
    network.register_to_config(scaling_factor=round(1 / grid.std().item(), 4))
    network.half().save_pretrained(folder)


def _save_ddpm(network: Any, folder: Path) -> None:
    from diffusers import DDIMPipeline

    DDIMPipeline(network.half(), ddpm_scheduler()).save_pretrained(folder)


def _save_rectified_flow(network: Any, folder: Path) -> None:
    from diffusers import DDPMPipeline, FlowMatchEulerDiscreteScheduler

    DDPMPipeline(network.half(), FlowMatchEulerDiscreteScheduler()).save_pretrained(folder)


def _save_ldm(network: Any, folder: Path) -> None:
    from diffusers import LDMPipeline

    pipeline = LDMPipeline(copy.deepcopy(_vqvae()).half(), network.half(), ddpm_scheduler())
    lending.save(pipeline, folder, {"vqvae": "avatar-vqvae"})


FAMILIES: dict[str, Family] = {
    "avatar-vae": Family(
        build_vae,
        vae_loss,
        _save_own("vae"),
        Schedule(steps=4_000, learning_rate=1.5e-3, weight_decay=0.0, bfloat16=True),
        batch=64,
    ),
    "avatar-vqvae": Family(
        build_vqvae,
        vqvae_loss,
        _save_vqvae,
        Schedule(steps=3_000, learning_rate=2e-3, weight_decay=0.0),
        batch=32,
    ),
    "avatar-gan": Family(
        build_gan,
        stylegan2_ada.loss,
        _save_generator,
        Schedule(steps=60_000, learning_rate=2.5e-3, weight_decay=0.0, ema=0.9995, clip=100.0, betas=(0.0, 0.99), hold=40_000),
        batch=16,
    ),
    "avatar-flow": Family(
        build_flow,
        flow_loss,
        _save_own("glow"),
        Schedule(steps=5_000, learning_rate=1e-3, weight_decay=0.0),
        batch=32,
        keep=(100, 700, 1_500, 3_500),
    ),
    "avatar-ddpm": Family(
        build_ddpm,
        ddpm_loss,
        _save_ddpm,
        Schedule(steps=6_000, learning_rate=1e-3, weight_decay=0.0, bfloat16=True),
        batch=32,
        keep=(100, 400, 1_100, 1_700, 2_600),
    ),
    # avatar-ddpm's network and schedule: what differs between the two are their pictures
    "photo-ddpm": Family(
        build_ddpm,
        ddpm_loss,
        _save_ddpm,
        Schedule(steps=6_000, learning_rate=1e-3, weight_decay=0.0, bfloat16=True),
        batch=32,
        data=Photos,
    ),
    "mini-flow": Family(
        build_ddpm,
        rectified_flow_loss,
        _save_rectified_flow,
        Schedule(steps=4_500, learning_rate=1e-3, weight_decay=0.0, bfloat16=True),
        batch=32,
    ),
    "avatar-ldm": Family(
        build_ldm,
        ldm_loss,
        _save_ldm,
        Schedule(steps=6_000, learning_rate=1e-3, weight_decay=0.0, bfloat16=True),
        batch=64,
    ),
}
