"""StyleGAN2 as NVIDIA's stylegan2-ada-pytorch has it: the networks, their latent spaces, and its `.pkl` files.

After Karras et al., "Analyzing and Improving the Image Quality of StyleGAN" (2020), and "Training Generative Adversarial
Networks with Limited Data" (2020), whose `training/networks.py` the state-dict names and the arithmetic follow, at float32
throughout. The architectures are its defaults: 'skip' for the generator, 'resnet' for the discriminator.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from probekit.hooks.errors import ProbekitError
from probekit.latents import LatentSpace
from probekit.latents.space import Images
from probekit.models.formats import Format
from probekit.models.model import Model
from probekit.models.saved import rebuilt

Noise = Literal["const", "none", "random"]
Ws = Float[Tensor, "n num_ws w_dim"]
Maps = Float[Tensor, "n c h w"]
Resized = Float[Tensor, "n c2 h2 w2"]

MAPPING_RATE = 0.01  # the mapping network learns at a hundredth of the rate
_W_AVG_DECAY = 0.995
CLAMP = 256.0  # what stylegan2-ada's train.py always sets


def _low_pass() -> Float[Tensor, "4 4"]:
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    return torch.outer(taps, taps) / taps.sum() ** 2


def _blur(x: Maps, taps: Float[Tensor, "4 4"], padding: int) -> Resized:
    return F.conv2d(x, taps.expand(x.shape[1], 1, -1, -1), padding=padding, groups=x.shape[1])


def _double(images: Images, taps: Float[Tensor, "4 4"]) -> Float[Tensor, "n 3 2*h 2*w"]:
    """upfirdn2d with up=2: zeros between the pixels, then the low-pass filter, of gain 4 to keep the brightness."""
    channels = images.shape[1]
    return F.conv_transpose2d(images, 4 * taps.expand(channels, 1, -1, -1), stride=2, padding=1, groups=channels)


def _lrelu(x: Tensor, gain: float = 1.0) -> Tensor:
    """Leaky ReLU that keeps the variance: slope 0.2, gain sqrt(2)."""
    return F.leaky_relu(x, 0.2) * (2**0.5 * gain)


def _clamp(x: Tensor, limit: float | None) -> Tensor:
    return x if limit is None else x.clamp(-limit, limit)


def _check_sizes(image_size: int, channels: Sequence[int]) -> list[int]:
    """The resolutions from 4 to image_size, one for each entry of channels."""
    if image_size < 8 or image_size & (image_size - 1):
        raise ProbekitError(f"image_size {image_size}: StyleGAN2 needs a power of two from 8 up")
    resolutions = [2**i for i in range(2, image_size.bit_length())]
    if len(channels) != len(resolutions):
        raise ProbekitError(f"channels {list(channels)}: image_size {image_size} needs {len(resolutions)}, one for 4, 8, …")
    return resolutions


class _Linear(nn.Module):
    """A linear layer with equalized learning rate: weights of variance 1, scaled when used."""

    def __init__(self, inputs: int, outputs: int, *, bias: float = 0.0, rate: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / rate)
        self.bias = nn.Parameter(torch.full((outputs,), bias))
        self.weight_gain, self.bias_gain = rate / inputs**0.5, rate

    def forward(self, x: Float[Tensor, "n i"]) -> Float[Tensor, "n o"]:
        return F.linear(x, self.weight * self.weight_gain, self.bias * self.bias_gain)


class MappingNetwork(nn.Module):
    """z to w: z at unit second moment, then linear layers with leaky ReLU. `w_avg` follows the mean of w in training mode."""

    w_avg: Tensor

    def __init__(self, z_dim: int, w_dim: int, num_ws: int, layers: int) -> None:
        super().__init__()
        self.z_dim, self.num_ws = z_dim, num_ws
        for i in range(layers):
            self.add_module(f"fc{i}", _Linear(w_dim if i else z_dim, w_dim, rate=MAPPING_RATE))
        self.register_buffer("w_avg", torch.zeros(w_dim))

    def forward(self, z: Float[Tensor, "n z_dim"], truncation: float = 1.0) -> Ws:
        """One w for all layers. truncation: psi, 1 leaves w as it is, 0 gives the mean w."""
        w = z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt()
        for layer in self.children():
            w = _lrelu(layer(w))
        if self.training:
            self.w_avg.copy_(w.detach().mean(0).lerp(self.w_avg, _W_AVG_DECAY))
        if truncation != 1:
            w = self.w_avg.lerp(w, truncation)
        return w.unsqueeze(1).repeat(1, self.num_ws, 1)


class _Layer(nn.Module):
    """A modulated, demodulated 3x3 convolution with noise, which doubles the resolution when `up`.

    The style scales the input and the demodulation the output, which equals scaling the weights and needs no grouped
    convolution over the batch, slow on a CPU.
    """

    noise_const: Tensor
    resample_filter: Tensor

    def __init__(self, inputs: int, outputs: int, w_dim: int, size: int, clamp: float | None, *, up: bool = False) -> None:
        super().__init__()
        self.size, self.clamp, self.up = size, clamp, up
        self.affine = _Linear(w_dim, inputs, bias=1.0)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.register_buffer("noise_const", torch.randn(size, size))
        self.register_buffer("resample_filter", _low_pass())

    def forward(self, x: Maps, w: Float[Tensor, "n w_dim"], noise: Noise, generator: torch.Generator | None) -> Resized:
        style = self.affine(w)
        norm = style.square() @ self.weight.square().sum((2, 3)).T
        x = x * style[:, :, None, None]
        if self.up:
            x = F.conv_transpose2d(x, self.weight.transpose(0, 1), stride=2)
            x = _blur(x, 4 * self.resample_filter, padding=1)
        else:
            x = F.conv2d(x, self.weight, padding=1)
        x = x * (norm + 1e-8).rsqrt()[:, :, None, None]
        if noise == "const":
            x = x + self.noise_const * self.noise_strength
        elif generator is not None and noise == "random":
            drawn = torch.randn(len(x), 1, self.size, self.size, generator=generator, device=generator.device)
            x = x + drawn.to(x.device) * self.noise_strength
        return _clamp(_lrelu(x + self.bias[:, None, None]), self.clamp)


class _ToRGB(nn.Module):
    """A modulated 1x1 convolution to three channels, not demodulated."""

    def __init__(self, inputs: int, w_dim: int, clamp: float | None) -> None:
        super().__init__()
        self.clamp, self.gain = clamp, inputs**-0.5
        self.affine = _Linear(w_dim, inputs, bias=1.0)
        self.weight = nn.Parameter(torch.randn(3, inputs, 1, 1))
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x: Maps, w: Float[Tensor, "n w_dim"]) -> Images:
        style = self.affine(w) * self.gain
        return _clamp(F.conv2d(x * style[:, :, None, None], self.weight, self.bias), self.clamp)


class _SynthesisBlock(nn.Module):
    """One resolution of the generator. inputs: None for the first, which starts from a learned constant."""

    resample_filter: Tensor

    def __init__(self, inputs: int | None, outputs: int, w_dim: int, size: int, clamp: float | None) -> None:
        super().__init__()
        self.register_buffer("resample_filter", _low_pass())
        if inputs is None:
            self.const = nn.Parameter(torch.randn(outputs, size, size))
        else:
            self.conv0 = _Layer(inputs, outputs, w_dim, size, clamp, up=True)
        self.conv1 = _Layer(outputs, outputs, w_dim, size, clamp)
        self.torgb = _ToRGB(outputs, w_dim, clamp)

    def forward(
        self, x: Maps | None, image: Images | None, ws: Iterator[Tensor], noise: Noise, generator: torch.Generator | None
    ) -> tuple[Resized, Float[Tensor, "n 3 h2 w2"]]:
        if x is None or image is None:
            w = next(ws)
            x = self.conv1(self.const.expand(len(w), -1, -1, -1), w, noise, generator)
            return x, self.torgb(x, next(ws))
        x = self.conv1(self.conv0(x, next(ws), noise, generator), next(ws), noise, generator)
        return x, _double(image, self.resample_filter) + self.torgb(x, next(ws))


class SynthesisNetwork(nn.Module):
    """w to images: a block a resolution, whose images add up."""

    def __init__(self, w_dim: int, image_size: int, channels: Sequence[int], clamp: float | None) -> None:
        super().__init__()
        resolutions = _check_sizes(image_size, channels)
        self.num_ws = 2 * len(resolutions)
        for inputs, outputs, size in zip((None, *channels[:-1]), channels, resolutions, strict=True):
            self.add_module(f"b{size}", _SynthesisBlock(inputs, outputs, w_dim, size, clamp))

    def forward(self, ws: Ws, noise: Noise = "const", generator: torch.Generator | None = None) -> Images:
        """Images, about [-1, 1] but not clipped to it.

        noise: `const` adds each layer's own fixed noise, `random` fresh noise from the generator, `none` adds none.
        Raises ProbekitError for another mode, and for `random` without a generator.
        """
        if noise not in get_args(Noise):
            raise ProbekitError(f"noise {noise!r}: choose {', '.join(get_args(Noise))}")
        if noise == "random" and generator is None:
            raise ProbekitError("noise 'random': needs a torch.Generator to draw from; give one, or choose const or none")
        x = image = None
        for i, block in enumerate(self.children()):
            # a block's to-RGB shares its w with the first convolution of the next block
            at = max(2 * i - 1, 0)
            x, image = block(x, image, iter(ws[:, at : at + 3].unbind(1)), noise, generator)
        assert image is not None
        return image


class Generator(nn.Module):
    """StyleGAN2's generator, unconditional, of RGB images.

    z_dim, w_dim: sizes of z and w; image_size: a power of two from 8 up; mapping_layers: of the mapping network;
    channels: of the feature maps at 4, 8, … image_size; conv_clamp: bound of every convolution's output, None for none;
    c_dim: of the class label, 0 only. Raises ProbekitError for sizes that do not fit together, and for a label.
    """

    def __init__(
        self,
        z_dim: int,
        w_dim: int,
        image_size: int,
        mapping_layers: int,
        channels: Sequence[int],
        conv_clamp: float | None = CLAMP,
        c_dim: int = 0,
    ) -> None:
        super().__init__()
        if c_dim:
            raise ProbekitError(f"c_dim {c_dim}: a conditional StyleGAN2 is not supported, only one without class labels")
        self.z_dim, self.w_dim, self.image_size = z_dim, w_dim, image_size
        self.synthesis = SynthesisNetwork(w_dim, image_size, channels, conv_clamp)
        self.num_ws = self.synthesis.num_ws
        self.mapping = MappingNetwork(z_dim, w_dim, self.num_ws, mapping_layers)

    def forward(
        self,
        z: Float[Tensor, "n z_dim"],
        truncation: float = 1.0,
        noise: Noise = "const",
        generator: torch.Generator | None = None,
    ) -> Images:
        """`mapping`, then `synthesis`."""
        return self.synthesis(self.mapping(z, truncation), noise, generator)


class _Conv(nn.Module):
    """A convolution with equalized learning rate, which low-passes and halves the resolution when `down`."""

    resample_filter: Tensor

    def __init__(self, inputs: int, outputs: int, kernel: int, *, down: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.down, self.kernel, self.weight_gain = down, kernel, (inputs * kernel**2) ** -0.5
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.register_buffer("resample_filter", _low_pass())

    def forward(self, x: Maps) -> Resized:
        weight = self.weight * self.weight_gain
        if not self.down:
            return F.conv2d(x, weight, self.bias, padding=self.kernel // 2)
        # the convolution skips, not the blur: torch is slow on CPUs with the backward pass of depthwise convolutions that skip
        return F.conv2d(_blur(x, self.resample_filter, padding=self.kernel // 2 + 1), weight, self.bias, stride=2)


class _DiscriminatorBlock(nn.Module):
    """One resolution of the discriminator: two convolutions beside a 1x1 shortcut, their sum at variance 1."""

    resample_filter: Tensor

    def __init__(self, inputs: int, outputs: int, *, first: bool) -> None:
        super().__init__()
        self.register_buffer("resample_filter", _low_pass())
        self.fromrgb = _Conv(3, inputs, 1) if first else None
        self.conv0 = _Conv(inputs, inputs, 3)
        self.conv1 = _Conv(inputs, outputs, 3, down=True)
        self.skip = _Conv(inputs, outputs, 1, down=True, bias=False)

    def forward(self, x: Maps) -> Resized:
        if self.fromrgb is not None:
            x = _lrelu(self.fromrgb(x))
        return self.skip(x) * 0.5**0.5 + _lrelu(self.conv1(_lrelu(self.conv0(x))), 0.5**0.5)


class _Epilogue(nn.Module):
    """The end of the discriminator: the minibatch's standard deviation as one more map, then down to one number."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _Conv(channels + 1, channels, 3)
        self.fc = _Linear(channels * 16, channels)
        self.out = _Linear(channels, 1)

    def forward(self, x: Maps) -> Float[Tensor, "n 1"]:
        # groups of 4 images; where the batch has no such groups, of the next smaller size that divides it
        group = next(size for size in (4, 3, 2, 1) if len(x) % size == 0)
        grouped = x.reshape(group, -1, *x.shape[1:])
        deviation = ((grouped - grouped.mean(0)).square().mean(0) + 1e-8).sqrt().mean((1, 2, 3))
        x = torch.cat([x, deviation.repeat(group)[:, None, None, None].expand(-1, 1, *x.shape[2:])], 1)
        return self.out(_lrelu(self.fc(_lrelu(self.conv(x)).flatten(1))))


class Discriminator(nn.Module):
    """StyleGAN2's residual discriminator: one number an image, high for real ones. No clamp: it trains at float32.

    image_size, channels: as the generator's.
    """

    def __init__(self, image_size: int, channels: Sequence[int]) -> None:
        super().__init__()
        sizes = list(zip(_check_sizes(image_size, channels), channels, strict=True))[::-1]
        for (size, inputs), (_, outputs) in itertools.pairwise(sizes):
            self.add_module(f"b{size}", _DiscriminatorBlock(inputs, outputs, first=size == image_size))
        self.b4 = _Epilogue(channels[0])

    def forward(self, images: Images) -> Float[Tensor, "n 1"]:
        """Logits, one an image."""
        x = images
        for block in self.children():
            x = block(x)
        return x


def config_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """`Generator`'s arguments, read from the names and shapes of its state dict.

    conv_clamp leaves no trace in tensors: it is 256 here, as stylegan2-ada's train.py sets it. Raises ProbekitError for
    weights that are no StyleGAN2 generator's, for a conditional one, and for one whose images are not RGB.
    """
    if any(key.startswith("mapping.embed.") for key in state):
        raise ProbekitError("StyleGAN2 weights: mapping.embed belongs to a conditional model; only models without labels load")
    sizes = sorted(int(m[1]) for key in state if (m := re.fullmatch(r"synthesis\.b(\d{1,5})\.conv1\.weight", key)))
    if len(sizes) < 2 or sizes != [4 * 2**i for i in range(len(sizes))]:
        raise ProbekitError(
            f"StyleGAN2 weights: blocks of resolution {sizes or 'none'}; a generator has 4, 8, … up to its size"
        )
    colours = _shape(state, "synthesis.b4.torgb.weight", 4)[0]
    if colours != 3:
        raise ProbekitError(f"StyleGAN2 weights: images of {colours} channels; only RGB, 3 channels, is supported")
    w_dim, z_dim = _shape(state, "mapping.fc0.weight", 2)
    return {
        "z_dim": z_dim,
        "w_dim": w_dim,
        "image_size": sizes[-1],
        "mapping_layers": sum(re.fullmatch(r"mapping\.fc\d+\.weight", key) is not None for key in state),
        "channels": [_shape(state, f"synthesis.b{size}.conv1.weight", 4)[0] for size in sizes],
        "conv_clamp": CLAMP,
        "c_dim": 0,
    }


def _shape(state: Mapping[str, Any], key: str, dimensions: int) -> tuple[int, ...]:
    value = state.get(key)
    if not isinstance(value, Tensor) or value.ndim != dimensions:
        raise ProbekitError(f"StyleGAN2 weights: {key} is missing, or no tensor of {dimensions} dimensions")
    return tuple(value.shape)


def as_model(network: Generator, name: str) -> Model:
    """The spaces `w`, `z` and `w+` of a generator, which is put into evaluation mode. None can encode.

    truncation: psi, from 0 to 1, by which what `w` and `w+` draw, and what `z` becomes, is drawn to the mean w (the truncation
    trick, Karras et al. 2019); 1 leaves it. Noise is 'const', so that a latent means one image. Images are clipped to [-1, 1].
    A space raises ProbekitError for another truncation.
    """
    network.eval()

    def map_z(z: Tensor, truncation: float) -> Tensor:
        return network.mapping(z.to(network.mapping.w_avg), truncation)

    def draw_z(n: int, generator: torch.Generator) -> Tensor:
        return _draw(network, n, generator).cpu()

    def images_of(ws: Tensor) -> Tensor:
        return network.synthesis(ws.to(network.mapping.w_avg)).clamp(-1, 1).cpu()

    def checked(truncation: float) -> dict[str, float]:
        if not 0 <= truncation <= 1:
            raise ProbekitError(f"truncation {truncation:g}: choose 0 to 1")
        return {"truncation": truncation}

    def w(truncation: float = 1.0) -> LatentSpace:
        return LatentSpace(
            "w",
            (network.w_dim,),
            "the style, one for all layers",
            decoder=lambda w: images_of(w.unsqueeze(1).expand(-1, network.num_ws, -1)),
            sampler=lambda n, g: map_z(draw_z(n, g), truncation)[:, 0].cpu(),
            parameters=checked(truncation),
        )

    def z(truncation: float = 1.0) -> LatentSpace:
        return LatentSpace(
            "z",
            (network.z_dim,),
            "normal noise, the mapping network's input",
            decoder=lambda z: images_of(map_z(z, truncation)),
            sampler=draw_z,
            parameters=checked(truncation),
        )

    def each(truncation: float = 1.0) -> LatentSpace:
        return LatentSpace(
            "w+",
            (network.num_ws, network.w_dim),
            "the styles, one for each layer",
            decoder=images_of,
            sampler=lambda n, g: map_z(draw_z(n, g), truncation).cpu(),
            parameters=checked(truncation),
        )

    return Model(name, "stylegan2", network.image_size, network, {"w": w, "z": z, "w+": each})


@torch.no_grad()
def samples(
    network: Generator, n: int, generator: torch.Generator, *, truncation: float = 1.0, noise: Noise = "const"
) -> Images:
    """Images of n normal z, clipped to [-1, 1], on the CPU. The generator gives the z, then the noise where it is `random`.

    truncation: psi, 1 for none and 0 for the mean image. Raises ProbekitError for an unknown noise mode.
    """
    z = _draw(network, n, generator).to(network.mapping.w_avg.device)
    return network(z, truncation, noise, generator).clamp(-1, 1).cpu()


def _draw(network: Generator, n: int, generator: torch.Generator) -> Float[Tensor, "n z_dim"]:
    return torch.randn(n, network.z_dim, generator=generator, device=generator.device)


FORMATS = (
    Format(
        "a StyleGAN2 generator that probekit saved, or a state dict of one",
        lambda place: place.saved_as("stylegan2") or (place.is_file and is_state(place.content)),
        lambda place: as_model(rebuilt(place, Generator, config_of), place.name),
    ),
)


def is_state(content: Any) -> bool:
    """Whether the content of a file is a generator's state dict."""
    return isinstance(content, Mapping) and "synthesis.b4.const" in content and "mapping.w_avg" in content
