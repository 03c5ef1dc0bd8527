"""Glow: a normalizing flow, whose latents hold an image without loss.

Kingma and Dhariwal, Glow: Generative Flow with Invertible 1x1 Convolutions (2018), in the form of rosinality's glow-pytorch:
the same arithmetic under the same state-dict names. It sees pixels in [-0.5, 0.5]; the spaces of `as_model` and `nll` convert.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from probekit.hooks.errors import ProbekitError
from probekit.latents import LatentSpace
from probekit.latents.space import Images
from probekit.models.formats import Format
from probekit.models.model import Model, fixed
from probekit.models.saved import rebuilt

TEMPERATURE = 0.7  # of samples: rosinality's --temp


class ActNorm(nn.Module):
    """One shift and one scale a channel, set by the first batch so that it leaves with mean 0 and variance 1 (section 3.1)."""

    initialized: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))

    def forward(self, x: Float[Tensor, "n c h w"]) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, ""]]:
        """The output, and log |det| of an image's Jacobian."""
        if not self.initialized:
            with torch.no_grad():
                self.loc.copy_(-x.mean((0, 2, 3), keepdim=True))
                self.scale.copy_(1 / (x.std((0, 2, 3), keepdim=True) + 1e-6))
                self.initialized.fill_(1)
        return self.scale * (x + self.loc), _pixels(x) * self.scale.abs().log().sum()

    def reverse(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """The input that gives x."""
        return x / self.scale - self.loc


class InvConv2d(nn.Module):
    """An invertible 1x1 convolution (section 3.2), a rotation at first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(channels, channels)).Q[:, :, None, None])

    def forward(self, x: Float[Tensor, "n c h w"]) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, ""]]:
        """The output, and log |det| of an image's Jacobian."""
        logdet = torch.linalg.slogdet(self.weight[:, :, 0, 0].double()).logabsdet
        return F.conv2d(x, self.weight), _pixels(x) * logdet.to(x.dtype)

    def reverse(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """The input that gives x."""
        return _invert(self.weight[:, :, 0, 0], x)


class InvConv2dLU(nn.Module):
    """The same with its weight kept as P L U, so that the determinant is the product of U's diagonal (equations 10 and 11)."""

    w_p: Tensor
    u_mask: Tensor
    l_mask: Tensor
    s_sign: Tensor
    l_eye: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        permutation, lower, upper = torch.linalg.lu(torch.linalg.qr(torch.randn(channels, channels)).Q)
        diagonal = upper.diagonal()
        above = torch.ones(channels, channels).triu(1)
        self.register_buffer("w_p", permutation)
        self.register_buffer("u_mask", above)
        self.register_buffer("l_mask", above.T.contiguous())
        self.register_buffer("s_sign", diagonal.sign())
        self.register_buffer("l_eye", torch.eye(channels))
        self.w_l = nn.Parameter(lower)
        self.w_s = nn.Parameter(diagonal.abs().log())
        self.w_u = nn.Parameter(upper.triu(1))

    def _weight(self) -> Float[Tensor, "c c"]:
        lower = self.w_l * self.l_mask + self.l_eye
        upper = self.w_u * self.u_mask + torch.diag(self.s_sign * self.w_s.exp())
        return self.w_p @ lower @ upper

    def forward(self, x: Float[Tensor, "n c h w"]) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, ""]]:
        """The output, and log |det| of an image's Jacobian."""
        return F.conv2d(x, self._weight()[:, :, None, None]), _pixels(x) * self.w_s.sum()

    def reverse(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """The input that gives x."""
        return _invert(self._weight(), x)


def _pixels(x: Float[Tensor, "n c h w"]) -> int:
    return x.shape[2] * x.shape[3]


def _invert(weight: Float[Tensor, "c c"], x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """Undo a 1x1 convolution. An inverse taken in double precision halves the error of a way there and back."""
    return F.conv2d(x, torch.linalg.inv(weight.double()).to(x.dtype)[:, :, None, None])


class ZeroConv2d(nn.Module):
    """A 3x3 convolution that gives 0 at first, with a learned scale; its border is padded with 1, so that it sees the edge."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 3)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(cast(Tensor, self.conv.bias))
        self.scale = nn.Parameter(torch.zeros(1, channels_out, 1, 1))

    def forward(self, x: Float[Tensor, "n a h w"]) -> Float[Tensor, "n b h w"]:
        """The scaled convolution."""
        return self.conv(F.pad(x, (1, 1, 1, 1), value=1.0)) * (3 * self.scale).exp()


class AffineCoupling(nn.Module):
    """Half of the channels says how the other half is shifted and, where affine, scaled by a sigmoid (section 3.3)."""

    def __init__(self, channels: int, width: int, affine: bool) -> None:
        super().__init__()
        self.affine = affine
        self.net = nn.Sequential(
            nn.Conv2d(channels // 2, width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 1),
            nn.ReLU(inplace=True),
            ZeroConv2d(width, channels if affine else channels // 2),
        )
        for layer in (cast(nn.Conv2d, self.net[0]), cast(nn.Conv2d, self.net[2])):
            nn.init.normal_(layer.weight, std=0.05)
            nn.init.zeros_(cast(Tensor, layer.bias))

    def _scale_and_shift(self, kept: Float[Tensor, "n c h w"]) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n c h w"]]:
        """The scale's logarithm and the shift; 2 is added so that the layer begins near the identity."""
        raw, shift = self.net(kept).chunk(2, 1)
        return F.logsigmoid(raw + 2), shift

    def forward(self, x: Float[Tensor, "n c h w"]) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n"]]:
        """The output, and log |det| of every image's Jacobian."""
        kept, changed = x.chunk(2, 1)
        if not self.affine:
            return torch.cat([kept, changed + self.net(kept)], 1), x.new_zeros(len(x))
        log_scale, shift = self._scale_and_shift(kept)
        return torch.cat([kept, (changed + shift) * log_scale.exp()], 1), log_scale.flatten(1).sum(1)

    def reverse(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """The input that gives x."""
        kept, changed = x.chunk(2, 1)
        if not self.affine:
            return torch.cat([kept, changed - self.net(kept)], 1)
        log_scale, shift = self._scale_and_shift(kept)
        return torch.cat([kept, changed / log_scale.exp() - shift], 1)


class Flow(nn.Module):
    """One step of flow: ActNorm, 1x1 convolution, coupling (figure 2a)."""

    def __init__(self, channels: int, width: int, affine: bool, lu: bool) -> None:
        super().__init__()
        self.actnorm = ActNorm(channels)
        self.invconv = InvConv2dLU(channels) if lu else InvConv2d(channels)
        self.coupling = AffineCoupling(channels, width, affine)

    def forward(self, x: Float[Tensor, "n c h w"]) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n"]]:
        """The output, and log |det| of every image's Jacobian."""
        x, of_actnorm = self.actnorm(x)
        x, of_invconv = self.invconv(x)
        x, of_coupling = self.coupling(x)
        return x, of_coupling + of_actnorm + of_invconv

    def reverse(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """The input that gives x."""
        return self.actnorm.reverse(self.invconv.reverse(self.coupling.reverse(x)))


class Level(NamedTuple):
    """What a block makes of its input: what the next block gets, its own latents, and their part in the likelihood.

    z: the latents; eps: the same, normalised by the block's prior; log_p: log density of z under that prior; logdet: log |det|
    of the block's Jacobian, in nats an image.
    """

    rest: Float[Tensor, "n r h w"]
    z: Float[Tensor, "n c h w"]
    eps: Float[Tensor, "n c h w"]
    log_p: Float[Tensor, "n"]
    logdet: Float[Tensor, "n"]


class Block(nn.Module):
    """One level (figure 2b): squeeze 2x2 pixels to channels, the flows, and unless it is the last one split off half as z.

    The prior of z is a Gaussian that the other half predicts; in the last block, which has none, zeros do.
    """

    def __init__(self, channels: int, flows: int, split: bool, width: int, affine: bool, lu: bool) -> None:
        super().__init__()
        self.split = split
        self.flows = nn.ModuleList(Flow(4 * channels, width, affine, lu) for _ in range(flows))
        self.prior = ZeroConv2d(2 * channels, 4 * channels) if split else ZeroConv2d(4 * channels, 8 * channels)

    def _gaussian(self, rest: Float[Tensor, "n r h w"]) -> tuple[Float[Tensor, "m c h w"], Float[Tensor, "m c h w"]]:
        """Mean and log standard deviation of z; in the last block one for all images, and `rest` gives the shape only."""
        mean, log_sd = self.prior(rest if self.split else torch.zeros_like(rest[:1])).chunk(2, 1)
        return mean, log_sd

    def forward(self, x: Float[Tensor, "n c h w"]) -> Level:
        """The level of x."""
        x = F.pixel_unshuffle(x, 2)
        logdet = x.new_zeros(len(x))
        for flow in self.flows:
            x, change = flow(x)
            logdet = logdet + change
        rest, z = x.chunk(2, 1) if self.split else (x, x)
        mean, log_sd = self._gaussian(rest)
        eps = (z - mean) * (-log_sd).exp()
        log_p = -0.5 * math.log(2 * math.pi) - log_sd - 0.5 * eps**2
        return Level(rest, z, eps, log_p.flatten(1).sum(1), logdet)

    def reverse(
        self, rest: Float[Tensor, "n r h w"] | None, latents: Float[Tensor, "n c h w"], reconstruct: bool
    ) -> tuple[Float[Tensor, "n c2 2*h 2*w"], Float[Tensor, "n c h w"]]:
        """The block's input and its z, from what the next block gave back (None in the last) and z or, unless told, eps."""
        if reconstruct:
            z = latents
        else:
            mean, log_sd = self._gaussian(latents if rest is None else rest)
            z = mean + log_sd.exp() * latents
        x = z if rest is None else torch.cat([rest, z], 1)
        for flow in reversed(cast(Sequence[Flow], self.flows)):
            x = flow.reverse(x)
        return F.pixel_shuffle(x, 2), z


class Glow(nn.Module):
    """The flow: `blocks` levels of `flows` steps. Heights and widths must be multiples of 2**blocks.

    affine: couplings scale too, rather than shift only; lu: 1x1 convolutions as P L U, where the last block's are so in any
    case, as in rosinality; width: hidden channels of the couplings' networks. Weights start from torch's global seed, and the
    first batch that goes forward, in whatever mode, sets every ActNorm.
    """

    def __init__(self, in_channels: int, flows: int, blocks: int, affine: bool, lu: bool, width: int = 512) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.blocks = nn.ModuleList()
        for level in range(blocks):
            split = level < blocks - 1
            self.blocks.append(Block(in_channels * 2**level, flows, split, width, affine, lu or not split))

    def latent_shapes(self, image_size: int) -> list[tuple[int, int, int]]:
        """The shape of every level's z for square images. Raises ProbekitError for a size the levels cannot halve."""
        n = len(self.blocks)
        if image_size < 1 or image_size % 2**n:
            raise ProbekitError(f"image size {image_size}: a Glow of {n} blocks takes multiples of {2**n}")
        shapes = [(self.in_channels * 2 ** (i + 1), image_size // 2 ** (i + 1), image_size // 2 ** (i + 1)) for i in range(n)]
        channels, height, width = shapes.pop()
        return [*shapes, (2 * channels, height, width)]

    def levels(self, images: Float[Tensor, "n c h w"]) -> list[Level]:
        """What every block makes of images in [-0.5, 0.5]."""
        levels: list[Level] = []
        for block in self.blocks:
            levels.append(block(levels[-1].rest if levels else images))
        return levels

    def forward(self, images: Float[Tensor, "n c h w"]) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"], list[Tensor]]:
        """log p(z) and log |det dz/dx| in nats an image, and the z of every level, for images in [-0.5, 0.5].

        Their sum is the images' log likelihood. Where couplings are additive rosinality gives log |det| as one number, here
        it is repeated for every image.
        """
        levels = self.levels(images)
        log_p = torch.stack([level.log_p for level in levels]).sum(0)
        logdet = torch.stack([level.logdet for level in levels]).sum(0)
        return log_p, logdet, [level.z for level in levels]

    def reverse(self, z_list: Sequence[Tensor], reconstruct: bool = False) -> Float[Tensor, "n c h w"]:
        """Images in [-0.5, 0.5] from the z of every level if `reconstruct`, else from eps: z normalised by the priors."""
        return self._descend(z_list, reconstruct)[0]

    def z_of(self, eps: Sequence[Tensor]) -> list[Tensor]:
        """The z of every level for which `reverse(z, reconstruct=True)` gives what `reverse(eps)` does."""
        return self._descend(eps, reconstruct=False)[1]

    def _descend(self, latents: Sequence[Tensor], reconstruct: bool) -> tuple[Tensor, list[Tensor]]:
        x: Tensor | None = None
        zs: list[Tensor] = []
        for block, given in zip(reversed(cast(Sequence[Block], self.blocks)), reversed(latents), strict=True):
            x, z = block.reverse(x, given, reconstruct)
            zs.insert(0, z)
        assert x is not None
        return x, zs


def nll(glow: Glow, images: Images, generator: torch.Generator, bits: int = 5) -> Float[Tensor, ""]:
    """The training objective: mean negative log likelihood in bits per dimension, of images in [-1, 1].

    Pixels are rounded down to `bits` bits, 1 to 8, and uniform noise from the generator fills each bin (rosinality's train.py).
    """
    bins = 2**bits
    # rounded first: 255 (x + 1) / 2 may fall just short of the whole number it stands for
    pixels = ((images + 1) * 127.5).round().clamp(0, 255)
    noise = torch.rand(images.shape, generator=generator, device=generator.device).to(images)
    log_p, logdet, _ = glow(((pixels / 2 ** (8 - bits)).floor() + noise) / bins - 0.5)
    dimensions = images[0].numel()
    return (math.log(bins) * dimensions - log_p - logdet).mean() / (math.log(2) * dimensions)


FIRST = "blocks.0.flows.0."


def config_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of the Glow that a state dict is of. Raises ProbekitError where it is of none."""
    try:
        channels = state[f"{FIRST}actnorm.loc"].shape[1]
        width = state[f"{FIRST}coupling.net.0.weight"].shape[0]
        out = state[f"{FIRST}coupling.net.4.conv.weight"].shape[0]
    except KeyError as error:
        raise ProbekitError(f"state dict: is no Glow, it has no {error.args[0]}") from error
    except IndexError as error:
        raise ProbekitError("state dict: is no Glow, a weight of its first flow has too few dimensions") from error
    if channels < 4 or channels % 4 or width < 1:
        raise ProbekitError(f"state dict: is no Glow, its first flow has {channels} channels and a coupling of width {width}")
    flows = len({key.split(".")[3] for key in state if key.startswith("blocks.0.flows.")})
    blocks = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    if flows * blocks > len(state):
        raise ProbekitError(f"state dict: is no Glow, {len(state)} tensors are too few for {blocks} blocks of {flows} flows")
    return {
        "in_channels": channels // 4,
        "flows": flows,
        "blocks": blocks,
        "affine": out == channels,
        "lu": f"{FIRST}invconv.weight" not in state,
        "width": width,
    }


def as_model(network: Glow, name: str, image_size: int) -> Model:
    """The model with its spaces: `z`, the latents of all levels flattened and joined (All Roads), and `eps`, `z` normalised.

    Both hold an image of 3 * h * w pixels in as many values, first level first. eps = (z - mean) / sd by the learned priors, so
    that under the model it is standard normal. Both sample at temperature 0.7, the same images for the same generator. What
    latents decode to is clipped to [-1, 1], and grey where the inverse overflows, as a flow's may for latents that no image has
    (Behrmann et al. 2021).

    Raises ProbekitError for a network not of RGB images or not initialised, and for an image size that it cannot take.
    """
    if network.in_channels != 3:
        raise ProbekitError(f"model {name!r}: a Glow of {network.in_channels} channels, images have 3")
    if not all(buffer.item() for key, buffer in network.named_buffers() if key.endswith("actnorm.initialized")):
        raise ProbekitError(f"model {name!r}: its ActNorm layers are not initialised; let a batch of images through it")
    shapes = network.latent_shapes(image_size)
    sizes = [math.prod(shape) for shape in shapes]
    place = next(network.parameters())

    def levels(images: Tensor) -> list[Level]:
        size = tuple(images.shape[1:])
        if size != (3, image_size, image_size):
            raise ProbekitError(f"model {name!r}: images of shape {size}, it takes {(3, image_size, image_size)}")
        return network.levels(images.to(place) / 2)

    def join(latents: Iterable[Tensor]) -> Tensor:
        return torch.cat([level.flatten(1) for level in latents], 1).cpu()

    def part(latents: Tensor) -> list[Tensor]:
        parts = torch.split(latents.to(place), sizes, dim=1)
        return [level.reshape(len(level), *shape) for level, shape in zip(parts, shapes, strict=True)]

    def decode(latents: Tensor, reconstruct: bool) -> Tensor:
        return (network.reverse(part(latents), reconstruct) * 2).nan_to_num(nan=0.0).clamp(-1, 1).cpu()

    def sample(n: int, generator: torch.Generator) -> Tensor:
        return TEMPERATURE * torch.randn(n, sum(sizes), generator=generator, device=generator.device).cpu()

    spaces = [
        LatentSpace(
            "z",
            (sum(sizes),),
            "the latents of all levels, joined",
            encoder=lambda images, generator: join(level.z for level in levels(images)),
            decoder=lambda latents: decode(latents, reconstruct=True),
            sampler=lambda n, generator: join(network.z_of(part(sample(n, generator)))),
        ),
        LatentSpace(
            "eps",
            (sum(sizes),),
            "the latents of all levels, each normalised by its learned prior, joined",
            encoder=lambda images, generator: join(level.eps for level in levels(images)),
            decoder=lambda latents: decode(latents, reconstruct=False),
            sampler=sample,
        ),
    ]
    return Model(name, "glow", image_size, network, fixed(*spaces))


FORMATS = (
    Format(
        "a Glow that probekit saved",
        lambda place: place.saved_as("glow"),
        lambda place: as_model(rebuilt(place, Glow, config_of), place.name, place.image_size),
    ),
)
