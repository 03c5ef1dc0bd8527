"""VQ-VAEs (van den Oord et al. 2017) in diffusers' format, such as latent diffusion's on CelebA-HQ, which All Roads uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from probekit.hooks.errors import ProbekitError
from probekit.latents import LatentSpace
from probekit.models import hub
from probekit.models.formats import Format
from probekit.models.model import Model, fixed

_COMMITMENT = 0.25  # beta of the paper's equation 3


def as_model(network: Any, name: str, image_size: int | None = None) -> Model:
    """A diffusers `VQModel` with its spaces: `grid`, before quantization, which is All Roads' code, and `quantized`.

    image_size: height and width of the images, where they are not the config's sample_size: the network is convolutional,
    and All Roads gives the one made for 256 pixels images of 64. Decoded images are clamped to [-1, 1].

    Raises ProbekitError for a network of other than three channels, and a size that its grid does not divide.
    """
    config = network.config
    if (config.in_channels, config.out_channels) != (3, 3):
        raise ProbekitError(
            f"model {name!r}: takes {config.in_channels} and gives {config.out_channels} channels, images have 3"
        )
    size = config.sample_size if image_size is None else image_size
    scale = 2 ** (len(config.block_out_channels) - 1)
    if size % scale:
        raise ProbekitError(f"model {name!r}: images of {size} pixels; it takes multiples of {scale}")
    shape = (network.quantize.vq_embed_dim, size // scale, size // scale)

    def grid(images: Tensor) -> Tensor:
        if tuple(images.shape[1:]) != (3, size, size):
            raise ProbekitError(f"images of shape {tuple(images.shape[1:])}: model {name!r} takes {(3, size, size)}")
        return network.encode(images.to(network.device, network.dtype)).latents

    def decode(latents: Tensor) -> Tensor:
        return network.decode(latents.to(network.device, network.dtype)).sample.float().cpu().clamp(-1, 1)

    def decode_quantized(latents: Tensor) -> Tensor:
        # VQModel.decode(force_not_quantize=True), which for some configs takes indices instead
        latents = latents.to(network.device, network.dtype)
        guide = latents if config.norm_type == "spatial" else None
        return network.decoder(network.post_quant_conv(latents), guide).float().cpu().clamp(-1, 1)

    grids = LatentSpace(
        "grid", shape, "the latent grid before quantization", lambda images, _: grid(images).float().cpu(), decode
    )
    quantized = LatentSpace(
        "quantized",
        shape,
        "the latent grid, every vector the nearest of the codebook",
        lambda images, _: _nearest(network, grid(images))[0].float().cpu(),
        decode_quantized,
    )
    return Model(name, "vqvae", size, network, fixed(grids, quantized), at_size=lambda size: as_model(network, name, size))


def load_folder(path: str | Path, name: str) -> Model:
    """Load a folder that `VQModel.save_pretrained` wrote or a hub id, or the part `vqvae` of a whole pipeline.

    Raises ProbekitError, in one line, for what is none of these and for weights that are damaged or incomplete.
    """
    from diffusers import VQModel

    hub.hush()
    place = hub.place(path, name)
    found: list[str] = []
    for part in (None, "vqvae"):
        try:
            kind = VQModel.load_config(place, subfolder=part).get("_class_name")
        except Exception as error:  # diffusers, json and the hub raise a dozen kinds
            found.append(" ".join(str(error).split())[:160])
            continue
        if kind == "VQModel":
            break
        found.append(f"{part or 'it'} holds a {kind}")
    else:
        raise ProbekitError(f"model {name!r}: no VQModel in {str(path)!r} ({found[0]})")
    return as_model(hub.load_part(VQModel, place, part, name), name)


FORMATS = (
    Format("a diffusers `VQModel`", lambda place: place.kind == "VQModel", lambda place: load_folder(place.at, place.name)),
)


def loss(vq: Any, images: Float[Tensor, "n 3 h w"], generator: torch.Generator) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """Squared error, codebook loss and commitment loss: equation 3 of van den Oord et al. 2017, each a mean over values.

    Gradients pass the quantization unchanged from decoder to encoder; the codebook learns by its own term alone. diffusers'
    own `commit_loss` is not used: its quantizer has beta on the codebook's term instead (`legacy=True`), and VQModel offers
    no way to choose. generator: nothing is drawn. Numbers: the terms, and `used`, the share of the codebook in this batch.
    """
    grid = vq.encode(images).latents
    nearest, indices = _nearest(vq, grid)
    straight = grid + (nearest - grid).detach()
    decoded = vq.decoder(vq.post_quant_conv(straight), straight if vq.config.norm_type == "spatial" else None)
    error, codebook, commitment = (
        F.mse_loss(decoded, images),
        F.mse_loss(nearest, grid.detach()),
        F.mse_loss(grid, nearest.detach()),
    )
    value = error + codebook + _COMMITMENT * commitment
    return value, {
        "squared_error": error.item(),
        "codebook": codebook.item(),
        "commitment": commitment.item(),
        "used": len(indices.bincount().nonzero()) / vq.quantize.n_e,
    }


def _nearest(vq: Any, grid: Float[Tensor, "n c h w"]) -> tuple[Float[Tensor, "n c h w"], Tensor]:
    """The codebook's nearest vectors and their indices; VQModel's own quantizer adds and subtracts the grid, which rounds."""
    indices = vq.quantize(grid)[2][2].flatten()
    n, channels, height, width = grid.shape
    return vq.quantize.get_codebook_entry(indices, (n, height, width, channels)), indices
