"""The papers' own diffusion checkpoints as diffusers `UNet2DModel`s, number for number.

Two code bases train nearly all unconditional pixel models: ddim (ermongroup/ddim, models/diffusion.py, the U-Net of Ho et al.
2020) and OpenAI's improved-diffusion and guided-diffusion (unet.py; Nichol and Dhariwal 2021, Dhariwal and Nichol 2021).
Sizes are read from names and shapes. What leaves no trace in a file is taken as in the published models: the number of
attention heads, the image's size and the noise schedule.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from probekit.hooks.errors import ProbekitError
from probekit.models.families import pixels
from probekit.models.formats import Format
from probekit.models.model import Model
from probekit.models.papers.checkpoint import allow, tensors

# image sizes of the published models by their channel multipliers
_IMAGE_SIZES = {
    (1, 2, 2, 2): 32,
    (1, 2, 2, 2, 4): 64,
    (1, 2, 3, 4): 64,
    (1, 1, 2, 3, 4): 128,
    (1, 1, 2, 2, 4, 4): 256,
    (0.5, 1, 1, 2, 2, 4, 4): 512,
}
_ERMON, _OPENAI = "ddim checkpoint", "OpenAI diffusion checkpoint"

# a module's name in diffusers and in the two code bases
_ERMON_TOP = {
    "conv_in": "conv_in",
    "time_embedding.linear_1": "temb.dense.0",
    "time_embedding.linear_2": "temb.dense.1",
    "conv_norm_out": "norm_out",
    "conv_out": "conv_out",
}
_ERMON_PARTS = {
    "norm1": "norm1",
    "conv1": "conv1",
    "time_emb_proj": "temb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "conv": "conv",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_OPENAI_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_OPENAI_PARTS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
    "group_norm": "norm",
    "to_q": "qkv",
    "to_k": "qkv",
    "to_v": "qkv",
    "to_out.0": "proj_out",
}
_PLACE = re.compile(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


def is_ermon(content: Any) -> bool:
    """Whether what `checkpoint.read` returned is a model of ermongroup/ddim: its list of states, or a plain state dict."""
    return {"temb.dense.0.weight", "conv_in.weight"} <= _ermon_state(content).keys()


def is_openai(content: Any) -> bool:
    """Whether what `checkpoint.read` returned is a U-Net of improved-diffusion or guided-diffusion, of any kind."""
    return {"time_embed.0.weight", "input_blocks.0.0.weight"} <= _openai_state(content).keys()


def from_ermon(content: Any, image_size: int | None = None) -> Any:
    """The `UNet2DModel` in a ddim `.ckpt`, in float32, from what `checkpoint.read` returned.

    content: [model state, optimizer, epoch, step, EMA state], of which the EMA is taken where there is one, or a state dict.
    image_size: height and width in pixels, by default that of the published model with these channel multipliers, else 64.

    Raises ProbekitError, naming the first tensor that is missing, has another shape or has no place.
    """
    state = _ermon_state(content)
    levels, blocks = _count(state, "down.{}.block.0.conv1.weight"), _count(state, "down.0.block.{}.conv1.weight")
    widths = [_size(_ERMON, state, f"down.{level}.block.0.conv1.weight", 0) for level in range(max(levels, 1))]
    attended = [f"down.{level}.attn.0.norm.weight" in state for level in range(levels)]
    if not any(".downsample." in key or ".upsample." in key for key in state):
        _pool_by_convolution(state, widths)
    unet = _unet(
        _ERMON,
        state,
        _image_size(widths, widths[0], image_size),
        in_channels=_size(_ERMON, state, "conv_in.weight", 1),
        out_channels=_size(_ERMON, state, "conv_out.weight", 0),
        freq_shift=1,
        flip_sin_to_cos=False,
        down_block_types=tuple("AttnDownBlock2D" if here else "DownBlock2D" for here in attended),
        up_block_types=tuple("AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attended)),
        block_out_channels=tuple(widths),
        layers_per_block=blocks,
        downsample_padding=0,  # diffusers then pads right and below, as ddim does
        attention_head_dim=None,  # one head
        norm_eps=1e-6,
        time_embedding_dim=_size(_ERMON, state, "temb.dense.0.weight", 0),
    )

    def place(key: str) -> str:
        module, _, leaf = key.rpartition(".")
        if (found := _PLACE.fullmatch(module)) is None:
            return f"{_ERMON_TOP[module]}.{leaf}"
        side, level, kind, index, part = found.groups()
        part = f"{_ERMON_PARTS[part]}.{leaf}"
        if side is None:
            return f"mid.{'block' if kind == 'resnets' else 'attn'}_{int(index) + 1}.{part}"
        level = int(level) if side == "down" else levels - 1 - int(level)
        if kind in ("downsamplers", "upsamplers"):
            return f"{side}.{level}.{side}sample.{part}"
        return f"{side}.{level}.{'block' if kind == 'resnets' else 'attn'}.{index}.{part}"

    return _fill(unet, state, place, _ERMON)


def from_openai(
    content: Any,
    image_size: int | None = None,
    *,
    heads: int | None = None,
    head_channels: int | None = None,
    new_attention_order: bool = False,
) -> Any:
    """The `UNet2DModel` in a `.pt` of improved-diffusion or guided-diffusion, in float32, from what `checkpoint.read` returned.

    image_size: as for `from_ermon`. heads (num_heads) or head_channels (num_head_channels): of all attention; by default as in
    the published models: 64 channels a head for guided-diffusion, which is known by its resampling resnets (resblock_updown);
    4 heads for improved-diffusion, and 1 for its LSUN models, which are known by lacking use_scale_shift_norm.
    new_attention_order: the training's use_new_attention_order.

    diffusers' config knows channels a head only: where heads are given and levels with attention differ in width, the number is
    set on the attention modules and not in the config, and `save_pretrained` would lose it.

    Raises ProbekitError for class-conditional models, heads that do not divide the channels, and as `from_ermon` does.
    """
    state = _openai_state(content)
    if "label_emb.weight" in state:
        raise ProbekitError(f"{_OPENAI}: is class-conditional (it has 'label_emb.weight'); an unconditional one is needed")
    if heads is not None and head_channels is not None:
        raise ProbekitError(f"heads {heads}, head_channels {head_channels}: give one of the two")
    per_level, levels = _layout(state)
    starts = [1 + level * per_level for level in range(levels)]
    widths = [_size(_OPENAI, state, f"input_blocks.{start}.0.out_layers.3.weight", 0) for start in starts]
    attended = [f"input_blocks.{start}.1.qkv.weight" in state for start in starts]
    guided, shifted = _resamples_by_resnet(state), _shifts_and_scales(state)
    if heads is None and head_channels is None:
        heads, head_channels = (None, 64) if guided else (4 if shifted else 1, None)
    width = _size(_OPENAI, state, "time_embed.0.weight", 1)
    attention_widths = [here for here, yes in zip(widths, attended, strict=True) if yes] + widths[-1:]
    option, divisor = ("heads", heads) if heads is not None else ("head_channels", head_channels)
    for channels in attention_widths:
        if divisor is None or divisor < 1 or channels % divisor:
            raise ProbekitError(f"{option} {divisor}: does not divide the {channels} channels of an attention; give another")
    if heads is not None and len(set(attention_widths)) == 1:
        head_channels = widths[-1] // heads
    resampler = "Resnet{}sampleBlock2D" if guided else "{}Block2D"
    kinds = ["Attn{}Block2D" if here else resampler for here in attended]
    unet = _unet(
        _OPENAI,
        state,
        _image_size(widths, width, image_size),
        in_channels=_size(_OPENAI, state, "input_blocks.0.0.weight", 1),
        out_channels=_size(_OPENAI, state, "out.2.weight", 0),
        down_block_types=tuple(kind.format("Down") for kind in kinds),
        up_block_types=tuple(kind.format("Up") for kind in reversed(kinds)),
        block_out_channels=tuple(widths),
        layers_per_block=per_level - 1,
        downsample_type="resnet" if guided else "conv",
        upsample_type="resnet" if guided else "conv",
        attention_head_dim=head_channels,  # None: one head, until the number is set below
        attn_norm_num_groups=32,  # diffusers leaves the middle's norm out under scale and shift
        resnet_time_scale_shift="scale_shift" if shifted else "default",
        time_embedding_dim=_size(_OPENAI, state, "time_embed.0.weight", 0),
    )
    if head_channels is None:
        from diffusers.models.attention_processor import Attention

        for module in unet.modules():
            if isinstance(module, Attention):
                module.heads = heads
                module.scale = (module.inner_dim // heads) ** -0.5
    if width != widths[0]:  # a first multiplier other than 1: the embedding keeps the width before it
        from diffusers.models.embeddings import TimestepEmbedding, Timesteps

        unet.time_proj = Timesteps(width, True, 0)
        unet.time_embedding = TimestepEmbedding(width, unet.config.time_embedding_dim)

    def place(key: str) -> str:
        module, _, leaf = key.rpartition(".")
        if (found := _PLACE.fullmatch(module)) is None:
            return f"{_OPENAI_TOP[module]}.{leaf}"
        side, level, kind, index, part = found.groups()
        if side is None:
            return f"middle_block.{2 * int(index) if kind == 'resnets' else 1}.{_OPENAI_PARTS[part]}.{leaf}"
        if side == "down":
            block = starts[int(level)] + (per_level - 1 if kind == "downsamplers" else int(index))
        else:
            block = int(level) * per_level + (per_level - 1 if kind == "upsamplers" else int(index))
        # what shares a block stands in it in this order: resnet, attention where the level has one, upsampler
        attention = attended[int(level) if side == "down" else levels - 1 - int(level)]
        position = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 1 + attention}[kind]
        part = ("op" if side == "down" else "conv") if part == "conv" else _OPENAI_PARTS[part]
        return f"{'input' if side == 'down' else 'output'}_blocks.{block}.{position}.{part}.{leaf}"

    def split(key: str, value: Tensor, channels: int) -> Tensor:
        """The rows of q, k or v; the legacy order is (head, qkv, channel), the new one (qkv, head, channel)."""
        which = re.search(r"\.to_([qkv])\.", key)
        if which is None or value.shape[:1] != (3 * channels,):
            return value
        count = 1 if new_attention_order else channels // head_channels if head_channels else heads or 1
        rows = value.reshape(count, 3, channels // count, *value.shape[1:])
        return rows[:, "qkv".index(which[1])].reshape(channels, *value.shape[1:])

    return _fill(unet, state, place, _OPENAI, split)


def published_scheduler(content: Any) -> Any:
    """The `DDIMScheduler` with the noise that the published models of a checkpoint's code base were trained with.

    Linear betas from 1e-4 to 0.02 in 1000 steps, but for improved-diffusion's models with use_scale_shift_norm (ImageNet-64 and
    CIFAR-10) the cosine schedule in 4000 steps. The networks count timesteps to 1000 all the same (rescale_timesteps): of 4000
    they are told a fourth. content: what `from_ermon` or `from_openai` takes.
    """
    from diffusers import DDIMScheduler

    state = _openai_state(content)
    if not is_openai(content) or _resamples_by_resnet(state) or not _shifts_and_scales(state):
        return DDIMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, clip_sample=False)
    return DDIMScheduler(num_train_timesteps=4000, beta_schedule="squaredcos_cap_v2", clip_sample=False)


def _ermon_state(content: Any) -> dict[str, Tensor]:
    if isinstance(content, list):
        states = [tensors(item) for item in (*content[4:5], *content[:1]) if isinstance(item, Mapping)]
        return next((state for state in states if state), {})
    return tensors(content) if isinstance(content, Mapping) else {}


def _openai_state(content: Any) -> dict[str, Tensor]:
    return tensors(content) if isinstance(content, Mapping) else {}


def _layout(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """Blocks a level in the decoder, one more than resnets a level in the encoder, and the number of levels.

    A resnet that resamples has the names of any other in the encoder; in the decoder it comes second or third in its block.
    """
    blocks = _count(state, "output_blocks.{}.0.in_layers.0.weight")
    ends = [block for block in range(blocks) if _upsampler(state, block)]
    per_level = ends[0] + 1 if ends else blocks
    if per_level < 2:
        raise ProbekitError(f"{_OPENAI}: lacks tensor 'output_blocks.{blocks}.0.in_layers.0.weight'")
    return per_level, len(ends) + 1


def _upsampler(state: Mapping[str, Tensor], block: int) -> str | None:
    kinds = {"conv": "conv.weight", "resnet": "in_layers.0.weight"}
    found = (kind for kind, part in kinds.items() for at in (1, 2) if f"output_blocks.{block}.{at}.{part}" in state)
    return next(found, None)


def _resamples_by_resnet(state: Mapping[str, Tensor]) -> bool:
    blocks = _count(state, "output_blocks.{}.0.in_layers.0.weight")
    return any(_upsampler(state, block) == "resnet" for block in range(blocks))


def _shifts_and_scales(state: Mapping[str, Tensor]) -> bool:
    rows = _size(_OPENAI, state, "middle_block.0.emb_layers.1.weight", 0)
    return rows == 2 * _size(_OPENAI, state, "middle_block.0.out_layers.3.weight", 0)


def _count(state: Mapping[str, Tensor], name: str) -> int:
    count = 0
    while name.format(count) in state:
        count += 1
    return count


def _size(kind: str, state: Mapping[str, Tensor], key: str, axis: int) -> int:
    if key not in state:
        raise ProbekitError(f"{kind}: lacks tensor {key!r}")
    if state[key].ndim <= axis or not state[key].shape[axis]:
        raise ProbekitError(f"{kind}: tensor {key!r} has shape {tuple(state[key].shape)}, which no layer of it can have")
    return state[key].shape[axis]


def _image_size(widths: list[int], width: int, image_size: int | None) -> int:
    size = _IMAGE_SIZES.get(tuple(w // width for w in widths), 64) if image_size is None else image_size
    if size < 1 or size % (scale := 2 ** (len(widths) - 1)):
        raise ProbekitError(f"image_size {size}: this network needs a multiple of {scale}")
    return size


def _pool_by_convolution(state: dict[str, Tensor], widths: list[int]) -> None:
    """ddim's resamp_with_conv=False, average pooling and bare nearest neighbours, as the convolutions that do the same."""
    if max(widths) ** 2 > sum(value.numel() for value in state.values()):
        raise ProbekitError(f"{_ERMON}: its sizes make no U-Net (a level of {max(widths)} channels)")
    for level in range(len(widths)):
        pool, keep = torch.zeros(2, widths[level], widths[level], 3, 3)
        one = torch.eye(widths[level])
        pool[:, :, :2, :2] = one[:, :, None, None] / 4
        keep[:, :, 1, 1] = one
        if level < len(widths) - 1:
            state |= {f"down.{level}.downsample.conv.weight": pool}
            state |= {f"down.{level}.downsample.conv.bias": torch.zeros(widths[level])}
        if level > 0:
            state |= {f"up.{level}.upsample.conv.weight": keep}
            state |= {f"up.{level}.upsample.conv.bias": torch.zeros(widths[level])}


def _unet(kind: str, state: Mapping[str, Tensor], image_size: int, **config: Any) -> Any:
    from diffusers import UNet2DModel

    try:
        return allow(lambda: UNet2DModel(sample_size=image_size, **config), state)
    except ProbekitError as error:  # such as channels that do not come in 32 groups
        raise ProbekitError(f"{kind}: {error}") from error


def _fill(
    unet: Any,
    state: Mapping[str, Tensor],
    place: Callable[[str], str],
    kind: str,
    split: Callable[[str, Tensor, int], Tensor] = lambda key, value, rows: value,
) -> Any:
    """Load the tensors under diffusers' names. place: the file's name for ours; split: which of its rows are ours."""
    renamed: dict[str, Tensor] = {}
    used = set()
    for key, slot in unet.state_dict().items():
        name = place(key)
        if name not in state:
            raise ProbekitError(f"{kind}: lacks tensor {name!r}")
        value = split(key, state[name].float(), slot.shape[0])
        if slot.ndim == 2 and value.ndim > 2:  # attention's 1x1 convolutions are linear layers here
            value = value.flatten(1)
        if value.shape != slot.shape:
            raise ProbekitError(f"{kind}: tensor {name!r} has shape {tuple(state[name].shape)}, which does not fit the others")
        renamed[key] = value
        used.add(name)
    if left := [name for name in state if name not in used]:
        raise ProbekitError(f"{kind}: tensor {left[0]!r} has no place in a U-Net of this kind")
    unet.load_state_dict(renamed, strict=True)
    return unet.float().eval()


def as_model(content: Any, name: str) -> Model:
    """The model in a file of either, its timesteps told as the network learned them."""
    scheduler = published_scheduler(content)
    unet = from_ermon(content) if is_ermon(content) else from_openai(content)
    return pixels.as_model(unet, scheduler, name, told=1000 / scheduler.config.num_train_timesteps)


FORMATS = (
    Format(
        "`.ckpt` of ermongroup's ddim, `.pt` of OpenAI's improved and guided diffusion",
        lambda place: place.is_file and (is_ermon(place.content) or is_openai(place.content)),
        lambda place: as_model(place.content, place.name),
    ),
)
