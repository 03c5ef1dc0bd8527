"""Latent diffusion (Rombach et al. 2022): a U-Net on a VQ-VAE's grid, as CompVis/ldm-celebahq-256, or a DiT with classes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from probekit.errors import ProbekitError
from probekit.latents import LatentSpace
from probekit.models import hub, vqvae
from probekit.models.model import Model
from probekit.sampling import Diffusion, denoisers, invert, sample
from probekit.sampling.schedule import reversible


def ldm(vq: Any, unet: Any, scheduler: Any, name: str, *, steps: int = 50) -> Model:
    """A `VQModel` and a `UNet2DModel` on its grid, as diffusers' `LDMPipeline` holds them.

    Its spaces are the VQ-VAE's, `grid` and `quantized`, and `inverted`, the grid's latent after `steps` inversion steps. The
    U-Net sees the grid times the VQ-VAE's `scaling_factor`. For images of another size there is the VQ-VAE alone. Raises
    ProbekitError where the two do not fit together.
    """
    config = unet.config
    if not isinstance(config.sample_size, int):
        raise ProbekitError(f"model {name!r}: its U-Net's sample_size is {config.sample_size}, one number is needed")
    if unet.class_embedding is not None:
        raise ProbekitError(f"model {name!r}: its U-Net is class-conditional; an unconditional one is needed")
    of_vq = vqvae.model(vq, name, config.sample_size * 2 ** (len(vq.config.block_out_channels) - 1))
    shape = of_vq.space("grid").shape
    if (config.in_channels, config.out_channels) != (shape[0], shape[0]):
        channels = f"takes {config.in_channels} and gives {config.out_channels} channels"
        raise ProbekitError(f"model {name!r}: its U-Net {channels}, a grid has {shape[0]}")
    scale = vq.config.scaling_factor
    predict = denoisers.unconditional(unet)
    # the VQ-VAE in the U-Net's company counts for the fingerprint
    both = nn.ModuleDict({"vqvae": vq, "unet": unet})
    made = _model(
        name, both, of_vq.image_size, shape, scheduler, steps, lambda rows: predict,
        lambda images: vq.encode(images.to(vq.device, vq.dtype)).latents * scale,
        lambda states: vq.decode(states.to(vq.device, vq.dtype) / scale).sample, of_vq.spaces,
    )  # fmt: skip
    return dataclasses.replace(made, at_size=of_vq.at_size)


def dit(
    transformer: Any, vae: Any, scheduler: Any, name: str, *, label: int | None = None, guidance: float = 1.0, steps: int = 50
) -> Model:
    """A `DiTTransformer2DModel` on a KL VAE's code, as diffusers' `DiTPipeline` holds them (Peebles and Xie 2023).

    label: the class of all images, by its number; without one it is the empty class, and there is no guidance. Its one space is
    `inverted`. Raises ProbekitError for a class that is not there, and for guidance without a class.
    """
    classes = transformer.config.num_embeds_ada_norm
    if label is not None and not 0 <= label < classes:
        raise ProbekitError(f"--label {label}: model {name!r} has classes 0 to {classes - 1}")
    if label is None and guidance != 1:
        raise ProbekitError(f"--guidance {guidance:g}: model {name!r} needs a --label to be guided to")
    size, channels = transformer.config.sample_size, transformer.config.in_channels
    number, scale = classes if label is None else label, vae.config.scaling_factor

    def predict(rows: int) -> Any:
        return denoisers.class_conditional(transformer, torch.full((rows,), number), guidance)

    return _model(
        name, nn.ModuleDict({"vae": vae, "transformer": transformer}), size * 2 ** (len(vae.config.block_out_channels) - 1),
        (channels, size, size), scheduler, steps, predict,
        lambda images: vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mean * scale,
        lambda states: vae.decode(states.to(vae.device, vae.dtype) / scale).sample, {},
    )  # fmt: skip


def _model(
    name: str, network: nn.Module, size: int, shape: tuple[int, ...], scheduler: Any, steps: int, predict: Any, encoder: Any,
    decoder: Any, spaces: dict[str, LatentSpace],
) -> Model:  # fmt: skip
    scheduler = reversible({"_class_name": type(scheduler).__name__, **scheduler.config})
    diffusion = Diffusion(name, size, shape, scheduler, predict, encoder, decoder)

    def inverted(images: Tensor, generator: torch.Generator) -> Tensor:
        return invert(predict(len(images)), diffusion.encode(images), diffusion.schedule(steps)).end

    def sampled(latents: Tensor) -> Tensor:
        return diffusion.decode(sample(predict(len(latents)), latents, diffusion.schedule(steps)).end)

    def prior(n: int, generator: torch.Generator) -> Tensor:
        return torch.stack([torch.randn(shape, generator=generator) for _ in range(n)])

    space = LatentSpace(name, "inverted", shape, f"the latent of {steps} inversion steps", inverted, sampled, prior)
    return Model(name, "ldm", size, network, spaces | {"inverted": space}, diffusion=diffusion)


def load_folder(path: str | Path, name: str, *, label: int | None = None, guidance: float = 1.0) -> Model:
    """Load what `LDMPipeline` or `DiTPipeline` saved, or a hub id (`CompVis/ldm-celebahq-256`, `facebook/DiT-XL-2-256`).

    Raises ProbekitError, in one line, for what is neither and for weights that are damaged or incomplete.
    """
    import diffusers

    hub.hush()
    place = hub.place(path, name)
    try:
        index = diffusers.DiffusionPipeline.load_config(place)
        config = diffusers.DDIMScheduler.load_config(place, subfolder="scheduler")
    except Exception as error:  # diffusers, json and the hub raise a dozen kinds
        reason = " ".join(str(error).split())[:160]
        raise ProbekitError(f"model {name!r}: is no latent diffusion model ({reason})") from error
    try:
        scheduler = reversible(config)
    except ProbekitError as error:
        raise ProbekitError(f"model {name!r}: {error}") from error
    if index.get("_class_name") == "DiTPipeline":
        transformer = hub.load_part(diffusers.DiTTransformer2DModel, place, "transformer", name)
        vae = hub.load_part(diffusers.AutoencoderKL, place, "vae", name)
        return dit(transformer, vae, scheduler, name, label=label, guidance=guidance)
    vq = hub.load_part(diffusers.VQModel, place, "vqvae", name)
    # the first models' files name no factor, as CompVis/ldm-celebahq-256's, and have none; diffusers' default is not theirs
    stored = diffusers.VQModel.load_config(place, subfolder="vqvae")
    vq.register_to_config(scaling_factor=stored.get("scaling_factor", 1.0))
    unet = hub.load_part(diffusers.UNet2DModel, place, "unet", name)
    return ldm(vq, unet, scheduler, name)
