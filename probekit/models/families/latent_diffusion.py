"""Latent diffusion (Rombach et al. 2022): a U-Net on a VQ-VAE's grid, as CompVis/ldm-celebahq-256, or a DiT with classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from probekit.bundled import borrowed
from probekit.hooks.errors import ProbekitError
from probekit.models import hub
from probekit.models.families import vqvae
from probekit.models.formats import Format
from probekit.models.model import Condition, Model
from probekit.models.spaces import denoiser_spaces
from probekit.sampling import Denoiser, Diffusion, denoisers
from probekit.sampling.schedule import reversible


def ldm(vq: Any, unet: Any, scheduler: Any, name: str) -> Model:
    """A `VQModel` and a `UNet2DModel` on its grid, as diffusers' `LDMPipeline` holds them.

    Its spaces are the VQ-VAE's, `grid` and `quantized`, and those of a denoiser. The U-Net sees the grid times the VQ-VAE's
    `scaling_factor`. For images of another size there is the VQ-VAE alone. Raises ProbekitError where the two do not fit
    together.
    """
    config = unet.config
    if not isinstance(config.sample_size, int):
        raise ProbekitError(f"model {name!r}: its U-Net's sample_size is {config.sample_size}, one number is needed")
    if unet.class_embedding is not None:
        raise ProbekitError(f"model {name!r}: its U-Net is class-conditional; an unconditional one is needed")
    of_vq = vqvae.as_model(vq, name, config.sample_size * 2 ** (len(vq.config.block_out_channels) - 1))
    shape = of_vq.space("grid").shape
    if (config.in_channels, config.out_channels) != (shape[0], shape[0]):
        channels = f"takes {config.in_channels} and gives {config.out_channels} channels"
        raise ProbekitError(f"model {name!r}: its U-Net {channels}, a grid has {shape[0]}")
    scale = vq.config.scaling_factor
    predict = denoisers.unconditional(unet)
    assert of_vq.image_size is not None
    diffusion = Diffusion(
        name,
        of_vq.image_size,
        shape,
        _reversible(scheduler),
        unet,
        lambda rows: predict,
        lambda images: vq.encode(images.to(vq.device, vq.dtype)).latents * scale,
        lambda states: vq.decode(states.to(vq.device, vq.dtype) / scale).sample,
    )
    # the VQ-VAE in the U-Net's company counts for the fingerprint
    both = nn.ModuleDict({"vqvae": vq, "unet": unet})
    makers = {**of_vq.makers, **denoiser_spaces(diffusion)}
    return Model(name, "ldm", of_vq.image_size, both, makers, process=diffusion, at_size=of_vq.at_size)


def dit(transformer: Any, vae: Any, scheduler: Any, name: str, condition: Condition = Condition()) -> Model:
    """A `DiTTransformer2DModel` on a KL VAE's code, as diffusers' `DiTPipeline` holds them (Peebles and Xie 2023).

    condition: its label is the class of all images, by its number; without one it is the empty class, and there is no guidance.
    Raises ProbekitError for a class that is not there, for guidance without a class, and for a prompt.
    """
    prompt, label = condition.prompt, condition.label
    guidance = 1.0 if condition.guidance is None else condition.guidance
    classes = transformer.config.num_embeds_ada_norm
    if prompt is not None:
        raise ProbekitError(f"--prompt {prompt!r}: model {name!r} takes none")
    if label is not None and not 0 <= label < classes:
        raise ProbekitError(f"--label {label}: model {name!r} has classes 0 to {classes - 1}")
    if label is None and guidance != 1:
        raise ProbekitError(f"--guidance {guidance:g}: model {name!r} needs a --label to be guided to")
    size, channels = transformer.config.sample_size, transformer.config.in_channels
    number, scale = classes if label is None else label, vae.config.scaling_factor

    def predict(rows: int) -> Denoiser:
        return denoisers.class_conditional(transformer, torch.full((rows,), number), guidance)

    pixels = size * 2 ** (len(vae.config.block_out_channels) - 1)
    diffusion = Diffusion(
        name,
        pixels,
        (channels, size, size),
        _reversible(scheduler),
        transformer,
        predict,
        lambda images: vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mean * scale,
        lambda states: vae.decode(states.to(vae.device, vae.dtype) / scale).sample,
        condition={"label": label, "guidance": guidance},
    )
    return Model(
        name,
        "dit",
        pixels,
        nn.ModuleDict({"vae": vae, "transformer": transformer}),
        denoiser_spaces(diffusion),
        process=diffusion,
        on=lambda later: dit(transformer, vae, scheduler, name, condition.then(later)),
    )


def _reversible(scheduler: Any) -> Any:
    return reversible({"_class_name": type(scheduler).__name__, **scheduler.config})


def load_folder(path: str | Path, name: str) -> Model:
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
        return dit(transformer, vae, scheduler, name)
    lent = borrowed(Path(place)).get("vqvae")
    vq_place, vq_part = (place, "vqvae") if lent is None else (str(lent), None)
    vq = hub.load_part(diffusers.VQModel, vq_place, vq_part, name)
    # the first models' files name no factor, as CompVis/ldm-celebahq-256's, and have none; diffusers' default is not theirs
    stored = diffusers.VQModel.load_config(vq_place, subfolder=vq_part)
    vq.register_to_config(scaling_factor=stored.get("scaling_factor", 1.0))
    unet = hub.load_part(diffusers.UNet2DModel, place, "unet", name)
    return ldm(vq, unet, scheduler, name)


FORMATS = (
    Format(
        "a diffusers `LDMPipeline` or `DiTPipeline`",
        lambda place: place.kind in ("LDMPipeline", "DiTPipeline"),
        lambda place: load_folder(place.at, place.name),
    ),
)
