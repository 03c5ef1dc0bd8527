"""The variational autoencoder of DiffuseVAE (Pandey et al. 2022), whose code All Roads probes and stitches.

Blocks and names are the reference implementation's (kpandey008/DiffuseVAE, main/models/vae.py), which takes its encoder and
decoder from the very deep VAE (Child 2021): residual bottlenecks of four convolutions, average pooling on the way down,
nearest neighbours on the way up, 1x1 convolutions where the width changes, and one vector as the code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from probekit.hooks.errors import ProbekitError
from probekit.latents import LatentSpace
from probekit.models.formats import Format
from probekit.models.model import Model, fixed
from probekit.models.saved import rebuilt


class _ResBlock(nn.Module):
    """A residual bottleneck: 1x1 to half the width, two 3x3 (1x1 where the image is one pixel), 1x1 back, then pooling."""

    def __init__(self, width: int, kernel: int, rate: int) -> None:
        super().__init__()
        middle, self.rate = width // 2, rate
        self.c1 = nn.Conv2d(width, middle, 1)
        self.c2 = nn.Conv2d(middle, middle, kernel, padding="same")
        self.c3 = nn.Conv2d(middle, middle, kernel, padding="same")
        self.c4 = nn.Conv2d(middle, width, 1)
        for convolution in (self.c1, self.c2, self.c3, self.c4):
            nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h2 w2"]:
        change = x
        for convolution in (self.c1, self.c2, self.c3, self.c4):
            change = convolution(F.gelu(change))
        return F.avg_pool2d(x + change, self.rate)


class _Encoder(nn.Module):
    """Images in [0, 1] to the mean and log-variance of q(z|x), as one-pixel images."""

    def __init__(self, plan: list[tuple[str, int, int]], widths: Mapping[int, int]) -> None:
        super().__init__()
        # the reference writes 64 here, which every configuration of it has as its first width
        self.in_conv = nn.Conv2d(3, widths[plan[0][1]], 3, padding=1, bias=False)
        self.block_mod = _blocks(plan, widths)
        self.mu = nn.Conv2d(widths[1], widths[1], 1, bias=False)
        self.logvar = nn.Conv2d(widths[1], widths[1], 1, bias=False)

    def forward(self, x: Float[Tensor, "n 3 h w"]) -> tuple[Float[Tensor, "n c 1 1"], Float[Tensor, "n c 1 1"]]:
        x = self.block_mod(self.in_conv(x))
        return self.mu(x), self.logvar(x)


class _Decoder(nn.Module):
    """A code as a one-pixel image to images in [0, 1]."""

    def __init__(self, plan: list[tuple[str, int, int]], widths: Mapping[int, int], input_size: int) -> None:
        super().__init__()
        self.block_mod = _blocks(plan, widths)
        self.last_conv = nn.Conv2d(widths[input_size], 3, 3, padding=1)

    def forward(self, z: Float[Tensor, "n c 1 1"]) -> Float[Tensor, "n 3 h w"]:
        return torch.sigmoid(self.last_conv(self.block_mod(z)))


class VAE(nn.Module):
    """DiffuseVAE's encoder and decoder. Images are (n, 3, h, w) in [-1, 1], codes (n, latent_dim).

    enc_blocks, dec_blocks: steps in order, each beginning with the height of the image there: `64x3` three residual blocks,
    `64d2` one that ends in pooling by 2, `64u2` nearest-neighbour enlargement by 2, `64t32` a 1x1 convolution from the
    width at 64 to that at 32. enc_channels, dec_channels: the width at every height, `64:64,32:128,…`. input_size: height and
    width of the images. All five spell a network as the reference does (its enc_block_str, …, input_res).

    Raises ProbekitError for strings that cannot be read or do not lead from an image to one vector and back.
    """

    def __init__(self, enc_blocks: str, enc_channels: str, dec_blocks: str, dec_channels: str, input_size: int) -> None:
        super().__init__()
        down, up = read_plan("enc_blocks", enc_blocks, "xdt"), read_plan("dec_blocks", dec_blocks, "xut")
        narrow, wide = _widths("enc_channels", enc_channels), _widths("dec_channels", dec_channels)
        for option, widths, plan in (("enc_channels", narrow, down), ("dec_channels", wide, up)):
            sizes = {1, *(size for _, size, _ in plan), *(number for kind, _, number in plan if kind == "t")}
            if missing := (sizes | ({input_size} if plan is up else set())) - widths.keys():
                raise ProbekitError(f"{option}: no width for {', '.join(map(str, sorted(missing)))} pixels")
        bottom, top = input_size, 1
        for kind, _, number in down:
            bottom = bottom // number if kind == "d" else bottom
        for kind, _, number in up:
            top = top * number if kind == "u" else top
        if bottom != 1:
            raise ProbekitError(f"enc_blocks {enc_blocks!r}: leads from {input_size} pixels to {bottom}, a code needs 1")
        if top != input_size:
            raise ProbekitError(f"dec_blocks {dec_blocks!r}: leads from 1 pixel to {top}, images have {input_size}")
        if narrow[1] != wide[1]:
            raise ProbekitError(
                f"dec_channels {dec_channels!r}: takes codes of {wide[1]} values, the encoder gives {narrow[1]}"
            )
        self.input_size, self.latent_dim = input_size, narrow[1]
        self.enc = _Encoder(down, narrow)
        self.dec = _Decoder(up, wide, input_size)

    def encode(self, images: Float[Tensor, "n 3 h w"]) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
        """Mean and log-variance of q(z|x). Raises ProbekitError for images of another size."""
        if tuple(images.shape[1:]) != (3, self.input_size, self.input_size):
            raise ProbekitError(f"images of shape {tuple(images.shape[1:])}: the VAE takes {(3,) + (self.input_size,) * 2}")
        mean, log_variance = self.enc((images + 1) / 2)
        return mean.flatten(1), log_variance.flatten(1)

    def decode(self, latents: Float[Tensor, "n d"]) -> Float[Tensor, "n 3 h w"]:
        """The mean of p(x|z)."""
        return self.dec(latents[:, :, None, None]) * 2 - 1


def loss(
    vae: VAE, images: Float[Tensor, "n 3 h w"], generator: torch.Generator, beta: float = 1.0
) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """The negative evidence lower bound: squared error plus beta times KL(q(z|x) || N(0, 1)), a mean over images.

    Both terms are sums over an image's or a code's values, the error in units of [0, 1], as in the reference's training_step
    (its beta is called alpha). The reference sums over the batch too; the mean makes the step independent of its size.
    """
    mean, log_variance = vae.encode(images)
    decoded = vae.decode(_draw(mean, log_variance, generator))
    error = ((decoded - images) / 2).square().sum() / len(images)
    divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum() / len(images)
    return error + beta * divergence, {"squared_error": error.item(), "kl": divergence.item()}


def as_model(network: VAE, name: str) -> Model:
    """The VAE with its spaces: `sample`, a draw from q(z|x), which is All Roads' code, and `mean`, the mean of q(z|x)."""
    place = next(network.parameters())

    def encode(images: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = network.encode(images.to(place))
        return mean.float().cpu(), log_variance.float().cpu()

    def decode(latents: Tensor) -> Tensor:
        return network.decode(latents.to(place)).float().cpu()

    def prior(n: int, generator: torch.Generator) -> Tensor:
        return torch.randn(n, network.latent_dim, generator=generator)

    def drawn(images: Tensor, generator: torch.Generator) -> Tensor:
        return _draw(*encode(images), generator)

    spaces = (
        LatentSpace("sample", (network.latent_dim,), "a sample of q(z|x)", drawn, decode, prior),
        LatentSpace("mean", (network.latent_dim,), "the mean of q(z|x)", lambda images, _: encode(images)[0], decode, prior),
    )
    return Model(name, "vae", network.input_size, network, fixed(*spaces))


FORMATS = (
    Format(
        "a VAE that probekit saved",
        lambda place: place.saved_as("vae"),
        lambda place: as_model(rebuilt(place, VAE, config_of), place.name),
    ),
)


def config_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of `VAE`, from the names and shapes of its tensors.

    Names tell residual blocks from transitions, and leave a gap where the decoder enlarges; shapes tell the widths. By how
    much a step enlarges or pools leaves no trace, nor does where the encoder pools: taken are 4 between one pixel and four, 2
    elsewhere, and pooling in the last block before each transition, as in every configuration of the reference.

    Raises ProbekitError for a network that is not built so.
    """
    down, up = _kinds(state, "enc"), _kinds(state, "dec")
    steps = down.count("t")
    if steps < 1 or steps != up.count("t") or not (re.fullmatch("(x+t)+x*", down) and re.fullmatch("(x*ut)+x*", up)):
        raise ProbekitError(
            f"the plan cannot be told from the tensors (encoder {down or 'without blocks'}, decoder {up or 'without blocks'})"
        )
    sizes = [1, *(4 * 2**step for step in range(steps))]
    enc_blocks, dec_blocks = [], []
    for size, below, level in zip(reversed(sizes[1:]), reversed(sizes[:-1]), down.split("t"), strict=False):
        enc_blocks += [f"{size}x{len(level) - 1}"] * (len(level) > 1) + [f"{size}d{size // below}", f"{size}t{below}"]
    for size, above, level in zip(sizes, sizes[1:], up.split("t"), strict=False):
        enlarge = [f"{size}u{above // size}", f"{size}t{above}"]
        dec_blocks += [f"{size}x{len(level) - 1}"] * (len(level) > 1) + enlarge
    for blocks, size, level in ((enc_blocks, 1, down.split("t")[-1]), (dec_blocks, sizes[-1], up.split("t")[-1])):
        blocks += [f"{size}x{len(level)}"] * bool(level)
    enc_widths, dec_widths = _transitions(state, "enc", down), _transitions(state, "dec", up)
    return {
        "enc_blocks": ",".join(enc_blocks),
        "enc_channels": ",".join(f"{size}:{width}" for size, width in zip(reversed(sizes), enc_widths, strict=True)),
        "dec_blocks": ",".join(dec_blocks),
        "dec_channels": ",".join(f"{size}:{width}" for size, width in zip(reversed(sizes), reversed(dec_widths), strict=True)),
        "input_size": sizes[-1],
    }


def _draw(mean: Tensor, log_variance: Tensor, generator: torch.Generator) -> Tensor:
    # drawn where the generator lives, so that a seed means the same noise on every device
    noise = torch.randn(mean.shape, generator=generator, device=generator.device)
    return mean + (0.5 * log_variance).exp() * noise.to(mean)


def read_plan(option: str, blocks: str, kinds: str) -> list[tuple[str, int, int]]:
    """The steps as (kind, height, number): `64x3` is ("x", 64, 3), and `64` alone ("x", 64, 1)."""
    plan = []
    for step in blocks.split(","):
        read = re.fullmatch(r"([1-9]\d*)(?:([xdut])([1-9]\d*))?", step.strip())
        if read is None or (read[2] or "x") not in kinds:
            raise ProbekitError(f"{option} {blocks!r}: {step!r} is none of {', '.join(f'64{kind}2' for kind in kinds)}")
        plan.append((read[2] or "x", int(read[1]), int(read[3] or 1)))
    return plan


def _widths(option: str, channels: str) -> dict[int, int]:
    entries = [re.fullmatch(r"([1-9]\d*):([1-9]\d*)", entry.strip()) for entry in channels.split(",")]
    if not all(entries):
        raise ProbekitError(f"{option} {channels!r}: is no list of heights and widths such as 64:64,32:128")
    return {int(entry[1]): int(entry[2]) for entry in entries if entry}


def _blocks(plan: list[tuple[str, int, int]], widths: Mapping[int, int]) -> nn.Sequential:
    blocks: list[nn.Module] = []
    for kind, size, number in plan:
        if kind == "t":
            blocks.append(nn.Conv2d(widths[size], widths[number], 1, bias=False))
        elif kind == "u":
            blocks.append(nn.Upsample(scale_factor=number, mode="nearest"))
        else:
            repeats, rate = (number, 1) if kind == "x" else (1, number)
            blocks += [_ResBlock(widths[size], 3 if size > 1 else 1, rate) for _ in range(repeats)]
    return nn.Sequential(*blocks)


def _kinds(state: Mapping[str, Tensor], part: str) -> str:
    """The steps' kinds in order, a letter each: x a residual block, t a transition, u what has no tensors."""
    found = {}
    for key in state:
        if read := re.fullmatch(rf"{part}\.block_mod\.(\d+)\.(c1\.)?weight", key):
            found[int(read[1])] = "x" if read[2] else "t"
    if max(found, default=-1) > 4 * len(state):
        raise ProbekitError(f"tensor '{part}.block_mod.{max(found)}.weight' is far beyond the others")
    return "".join(found.get(place, "u") for place in range(max(found, default=-1) + 1))


def _transitions(state: Mapping[str, Tensor], part: str, kinds: str) -> list[int]:
    """The widths before, between and after the transitions."""
    names = [f"{part}.block_mod.{place}.weight" for place, kind in enumerate(kinds) if kind == "t"]
    if flat := [name for name in names if state[name].ndim != 4]:
        raise ProbekitError(f"tensor {flat[0]!r} is of shape {tuple(state[flat[0]].shape)}, a convolution has four sizes")
    weights = [state[name] for name in names]
    return [weights[0].shape[1], *(weight.shape[0] for weight in weights)]
