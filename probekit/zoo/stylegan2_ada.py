"""StyleGAN2-ADA's training on a CPU: the two losses, the two lazy regularisers, style mixing, and adaptive augmentation.

After Karras et al., "Analyzing and Improving the Image Quality of StyleGAN" (2020), and "Training Generative Adversarial
Networks with Limited Data" (2020), whose stylegan2-ada-pytorch (`training/loss.py`, `training/augment.py`) it follows. The
convolutions run in bfloat16, twice as fast on CPUs with instructions for it; weights, styles and losses stay float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from probekit.models.families.stylegan2 import Discriminator, Generator

Images = Float[Tensor, "n 3 h w"]

_MIXING = 0.9  # the share of batches whose images have two ws each
_R1_EVERY = 16
_R1 = 1.0
_PATHS_EVERY, _PATHS, _PATHS_DECAY = 16, 2.0, 0.01
_ADA_EVERY, _ADA_TARGET = 4, 0.6
_ADA_IMAGES = 500_000  # p gets from 0 to 1 in as many, stylegan2-ada's default


class Adversaries(nn.Module):
    """A StyleGAN2 generator and its discriminator, trained at once, and what their training remembers.

    image_size, channels: as the two networks have them; latents: the size of z and of w.
    Buffers: `seen`, the batches so far; `paths`, the mean length of paths; `p`, the augmentations' probability; `signs`, the
    sum over the batches since p last changed of the mean sign of real images' logits. With them in its checkpoint a training
    goes on after a kill as if there had been none.
    """

    seen: Tensor
    paths: Tensor
    p: Tensor
    signs: Tensor

    def __init__(self, image_size: int, channels: Sequence[int], latents: int) -> None:
        super().__init__()
        self.generator = Generator(latents, latents, image_size, mapping_layers=4, channels=channels)
        self.discriminator = Discriminator(image_size, channels)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        for name in ("paths", "p", "signs"):
            self.register_buffer(name, torch.zeros(()))
        self.to(memory_format=torch.channels_last)


def loss(network: Adversaries, images: Images, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    """The non-saturating losses of both networks on one batch, and each regulariser when its batch has come.

    Both networks learn from the same generated images, which the discriminator judges once.

    R1's gamma is 1. stylegan2-ada's configuration for 32x32 has 0.01, for 100 million images; in the few of this recipe the
    discriminator was then too sure too soon: with 0.05 all faces had one smear in their middle. Path lengths are penalised
    every 16th batch too, where the reference has every 4th: on a CPU they cost as much as a batch.
    """
    judge, p = network.discriminator, float(network.p)
    half = torch.autocast("cpu", torch.bfloat16)
    seen = int(network.seen)
    penalise = seen % _R1_EVERY == 0
    ws = _mixed_ws(network.generator, len(images), generator)
    images = augment(images.contiguous(memory_format=torch.channels_last), p, generator).requires_grad_(penalise)
    with half:
        made = network.generator.synthesis(ws, "random", generator).float()
    shown = made.detach().requires_grad_()
    augmented = augment(shown, p, generator)
    with half:
        real, fake = judge(images).float(), judge(augmented).float()
    of_generator = F.softplus(-fake).mean()
    (push,) = torch.autograd.grad(of_generator, shown, retain_graph=True)
    towards = (made * push).sum()  # with the gradient of the generator's loss, and no other number
    of_generator = of_generator.detach() + towards - towards.detach()
    of_judge = F.softplus(-real).mean() + F.softplus(fake).mean()
    if penalise:
        # the gradient by what the discriminator sees, which is that by the image but for what augmentation turns and scales
        (slope,) = torch.autograd.grad(real.sum(), images, create_graph=True)
        of_judge = of_judge + _R1_EVERY * _R1 / 2 * slope.square().sum((1, 2, 3)).mean()
    if seen % _PATHS_EVERY == 0:
        of_generator = of_generator + _PATHS_EVERY * _PATHS * _path_penalty(network, max(1, len(images) // 2), generator)
    network.signs += real.detach().sign().mean()
    network.seen += 1
    numbers = {"generator": of_generator.item(), "real": real.mean().item(), "fake": fake.mean().item()}
    if int(network.seen) % _ADA_EVERY == 0:
        step = _ADA_EVERY * len(images) / _ADA_IMAGES
        network.p.add_((network.signs / _ADA_EVERY - _ADA_TARGET).sign() * step).clamp_(0, 1)
        network.signs.zero_()
    return of_generator + of_judge, numbers | {"p": float(network.p), "paths": float(network.paths)}


def _mixed_ws(network: Generator, n: int, generator: torch.Generator) -> Float[Tensor, "n num_ws w_dim"]:
    """One w an image for all layers, or, in most batches, another from a layer on that is drawn for the whole batch."""
    ws, others = network.mapping(torch.randn(2 * n, network.z_dim, generator=generator)).chunk(2)
    cutoff = int(torch.randint(1, network.num_ws, (), generator=generator))
    if torch.rand((), generator=generator) >= _MIXING:
        return ws
    return torch.cat([ws[:, :cutoff], others[:, cutoff:]], 1)


def _path_penalty(network: Adversaries, n: int, generator: torch.Generator) -> Tensor:
    """How far the lengths of J_w^T y are from their mean so far (Karras et al. 2020, equation 4), which moves towards them."""
    ws = _mixed_ws(network.generator, n, generator)
    with torch.autocast("cpu", torch.bfloat16):
        made = network.generator.synthesis(ws, "random", generator).float()
    y = torch.randn(made.shape, generator=generator) / math.sqrt(made[0, 0].numel())
    (slope,) = torch.autograd.grad((made * y).sum(), ws, create_graph=True)
    lengths = slope.square().sum(2).mean(1).sqrt()
    network.paths.lerp_(lengths.detach().mean(), _PATHS_DECAY)
    return (lengths - network.paths).square().mean()


# --- augmentation ------------------------------------------------------------------------------------------------------


def augment(images: Images, p: float, generator: torch.Generator) -> Images:
    """Each of stylegan2-ada's pixel blitting, geometric and colour transformations on each image with probability p.

    Its pipeline `bgc` with its strengths, but one bilinear warp with reflected borders in place of a low-passed one.
    p: in [0, 1]; with 0 the images come back as they are. Differentiable once in the images.
    """
    if p == 0:
        return images
    warp, colour = _warp(len(images), images.shape[-1], p, generator), _colour(len(images), p, generator)
    grid = F.affine_grid(warp[:, :2], list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    mixed = torch.einsum("nij,njhw->nihw", colour[:, :3, :3], moved) + colour[:, :3, 3, None, None]
    return mixed.contiguous(memory_format=torch.channels_last)


def _warp(n: int, size: int, p: float, generator: torch.Generator) -> Float[Tensor, "n 3 3"]:
    """From places in the augmented image to places in the image, in coordinates from -1 to 1."""

    def maybe(values: Tensor, chance: float = p) -> Tensor:
        return torch.where(torch.rand(n, generator=generator) < chance, values, 0.0)

    def normal() -> Tensor:
        return torch.randn(n, generator=generator)

    def uniform() -> Tensor:
        return 2 * torch.rand(n, generator=generator) - 1

    flip = 1 - 2 * maybe(torch.randint(2, (n,), generator=generator).float())
    quarters = maybe(torch.randint(4, (n,), generator=generator).float()) * (math.pi / 2)
    shift = torch.stack([maybe((uniform() * 0.125 * size).round()) * (2 / size) for _ in range(2)])
    scale, aniso = torch.exp2(maybe(normal() * 0.2)), torch.exp2(maybe(normal() * 0.2))
    once = 1 - math.sqrt(1 - p)  # rotated before or after the stretch: one of the two with probability p
    before, after = maybe(uniform() * math.pi, once), maybe(uniform() * math.pi, once)
    fraction = torch.stack([maybe(normal() * 0.125) * 2 for _ in range(2)])
    blit = _placed(_scaled(flip, torch.ones(n)) @ _turned(quarters), shift)
    return blit @ _placed(_turned(before) @ _scaled(scale * aniso, scale / aniso) @ _turned(after), fraction)


def _turned(angle: Float[Tensor, "n"]) -> Float[Tensor, "n 3 3"]:
    turned = torch.eye(3).repeat(len(angle), 1, 1)
    turned[:, 0, 0] = turned[:, 1, 1] = angle.cos()
    turned[:, 1, 0] = angle.sin()
    turned[:, 0, 1] = -angle.sin()
    return turned


def _scaled(x: Float[Tensor, "n"], y: Float[Tensor, "n"]) -> Float[Tensor, "n 3 3"]:
    return torch.diag_embed(torch.stack([x, y, torch.ones_like(x)], 1))


def _placed(linear: Float[Tensor, "n 3 3"], shift: Float[Tensor, "2 n"]) -> Float[Tensor, "n 3 3"]:
    return torch.cat([linear[:, :, :2], F.pad(shift.T, (0, 1), value=1.0)[:, :, None]], 2)


def _colour(n: int, p: float, generator: torch.Generator) -> Float[Tensor, "n 4 4"]:
    """On (red, green, blue, 1): brightness and contrast, then luma flip, hue and saturation about the axis of greys."""

    def maybe(values: Tensor) -> Tensor:
        return torch.where(torch.rand(n, generator=generator) < p, values, 0.0)

    brightness = maybe(torch.randn(n, generator=generator) * 0.2)
    contrast = torch.exp2(maybe(torch.randn(n, generator=generator) * 0.5))
    flip = maybe(torch.randint(2, (n,), generator=generator).float())
    hue = maybe((2 * torch.rand(n, generator=generator) - 1) * math.pi)
    saturation = torch.exp2(maybe(torch.randn(n, generator=generator)))

    axis = torch.full((3,), 3**-0.5)
    grey = torch.outer(axis, axis)
    cross = torch.linalg.cross(axis.expand(3, 3), torch.eye(3)).T
    # Rodrigues' formula, of which only the part across the axis is made more or less vivid
    vivid = hue.cos()[:, None, None] * (torch.eye(3) - grey) + hue.sin()[:, None, None] * cross
    linear = (1 - 2 * flip)[:, None, None] * grey + saturation[:, None, None] * vivid
    made = torch.eye(4).repeat(n, 1, 1)
    made[:, :3, :3] = linear * contrast[:, None, None]
    made[:, :3, 3] = (linear @ torch.ones(3)) * (brightness * contrast)[:, None]
    return made
