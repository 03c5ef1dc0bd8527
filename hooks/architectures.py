"""The named layers of a denoiser, in execution order, and where each reads and writes the image and the text.

This is the only place that knows what the blocks of diffusers take and return. `BLOCKS` says it of every block, `DENOISERS` of
every denoiser: its stacks in execution order, and how the time it is given belongs to the schedule. What neither names is
refused by name when its layers are asked for; an entry of one's own makes it known.

A layer is named as diffusers spells it (`down_blocks.2.resnets.1`, `transformer_blocks.7`), and so is what lies inside one
(`transformer_blocks.7.attn2`, `….attn2.to_k`; `….attn2:heads=3,5` are two heads of it). It carries one or more streams:

- U-Net encoders write their tensor to the `main` path and to a `skip` connection; `both` (the default) writes both;
- blocks that carry text beside the image have an `image` stream (the default), a `text` stream, and `both`;
- a cross-attention and its keys and values have, beside `main`, the `text` that they are conditioned on;
- everything else has the one stream `main`, or `text` where it holds text alone.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import html
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from .errors import ProbekitError
from .sites import Site, Tokens, attach, bind, read

Kind = Literal[
    "resnet",
    "attention",
    "block",
    "mid",
    "conv",
    "sampler",
    "projection",
    "self-attention",
    "cross-attention",
    "joint-attention",
    "feed-forward",
    "query",
    "key",
    "value",
    "text",
]

GROUPS: dict[str, tuple[Kind, ...]] = {
    "@resnets": ("resnet",),
    "@attentions": ("attention",),
    "@blocks": ("block", "mid"),
    "@mid": ("mid",),
    "@convs": ("conv",),
    "@samplers": ("sampler",),
    "@projections": ("projection",),
    "@all": get_args(Kind)[:7],
    "@self-attention": ("self-attention",),
    "@cross-attention": ("cross-attention",),
    "@joint-attention": ("joint-attention",),
    "@feed-forward": ("feed-forward",),
    "@text-encoder": ("text",),
}
"""Names that select layers by kind; `@all` are all but what lies inside others."""
_INSIDE = get_args(Kind)[7:-1]


@dataclass(frozen=True)
class Stream:
    """The sites a stream writes, and the sites that must keep their value although they share a written tensor.

    bypass: for each written site, the one in the same module's input whose value it has if the layer does nothing; None where
    that is zero, since the output is added to the stream. Without it the layer cannot be left out.
    """

    writes: tuple[Site, ...]
    keeps: tuple[Site, ...] = ()
    bypass: tuple[Site | None, ...] | None = None


class Heads(NamedTuple):
    """Where the values of an attention's heads stand in the last dimension, one head after the other.

    first: the first feature. number: how many heads there are. size: the features of one.
    """

    site: Site
    first: int
    number: int
    size: int


@dataclass(frozen=True)
class Layer:
    """A place in a denoiser whose activation can be captured and swapped; the first of `streams` is the default.

    order: where in the execution it is written: 0, 1, 2, … and, of what lies inside another layer, a fraction before it.
    heads: of an attention and its queries, keys and values, by stream, where its heads are.
    """

    name: str
    order: float
    kind: Kind
    streams: Mapping[str, Stream] = field(repr=False, compare=False)
    inside: str | None = None
    heads: Mapping[str, tuple[Heads, ...]] = field(default_factory=dict, repr=False, compare=False)

    def stream(self, name: str | None = None) -> Stream:
        """The stream of that name, or the default one. Raises ProbekitError when the layer has no such stream."""
        if name is None:
            return next(iter(self.streams.values()))
        if name not in self.streams:
            raise ProbekitError(f"stream {name!r} of layer {self.name}: it has {', '.join(self.streams)}")
        return self.streams[name]

    def only(self, heads: Sequence[int]) -> Layer:
        """Chosen heads of this layer. Raises ProbekitError where it has no heads, or none of that number."""
        if not self.heads:
            raise ProbekitError(f"layer {self.name}: it is no attention whose heads are known")
        streams: dict[str, Stream] = {}
        for name, sites in self.heads.items():
            writes = []
            for site, first, number, size in sites:
                if outside := [head for head in heads if not 0 <= head < number]:
                    raise ProbekitError(f"head {outside[0]} of layer {self.name}: it has heads 0 to {number - 1}")
                ranges = tuple((first + head * size, first + (head + 1) * size) for head in sorted(set(heads)))
                writes.append(replace(site, features=ranges))
            streams[name] = Stream(tuple(writes), bypass=(None,) * len(writes) if self.kind in _ATTENTIONS else None)
        text = ",".join(map(str, sorted(set(heads))))
        return replace(self, name=f"{self.name}:heads={text}", streams=streams, heads={})


class Layers(list[Layer]):
    """Layers in execution order, which a notebook shows as a table; what lies inside another stands below it."""

    def _repr_html_(self) -> str:
        head = "".join(f"<th style='text-align: left'>{heading}</th>" for heading in ("layer", "kind", "streams"))
        cell = "<td style='text-align: left; padding-left: {}em'>{}</td>".format
        rows = "".join(
            f"<tr>{cell(0 if la.inside is None else 2, f'<code>{html.escape(la.name)}</code>')}"
            f"{cell(0, la.kind)}{cell(0, ', '.join(la.streams))}</tr>"
            for la in self
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


_ATTENTIONS = ("self-attention", "cross-attention", "joint-attention")


def layers(model: nn.Module) -> Layers:
    """Every layer of a denoiser in execution order, also those inside others; or of a text encoder.

    Raises ProbekitError for a model or a block in it that is not registered.
    """
    found: list[_Found] = []
    if isinstance(getattr(model, "down_blocks", None), nn.ModuleList):
        found = list(_unet(model))
    elif (denoiser := denoiser_of(model)) is not None:
        found = list(_transformer(model, denoiser))
    elif stack := next((path for path in _TEXT_STACKS if len(_stack(model, path))), None):
        found = list(_text_encoder(model, stack))
    if not found:
        raise ProbekitError(
            f"{type(model).__name__} is no denoiser known here: no U-Net of diffusers' blocks, and none of "
            f"{', '.join(DENOISERS)}; hooks.DENOISERS takes another"
        )
    numbered: list[Layer] = []
    order, within = -1, list[_Found]()
    for one in found:
        if one.inside is not None:
            within.append(one)
            continue
        numbered += [
            Layer(part.name, order + (i + 1) / (len(within) + 1), part.kind, part.streams, part.inside, part.heads)
            for i, part in enumerate(within)
        ]
        order += 1
        numbered.append(Layer(one.name, order, one.kind, one.streams))
        within = []
    return Layers(numbered)


def default_layers(model: nn.Module) -> tuple[str, ...]:
    """What the injection paper swaps: a U-Net's resnets and attentions, a transformer's blocks."""
    return ("@resnets", "@attentions") if hasattr(model, "down_blocks") else ("@blocks",)


def select(available: Sequence[Layer], patterns: Iterable[str]) -> Layers:
    """The layers that match any of the patterns, in execution order.

    A pattern is a name, a glob (`up_blocks.*.attentions.*`) or one of `GROUPS`; with `:heads=3,5` only these heads of what it
    matches. A glob means what lies inside layers (`*.attn2`) only where it matches no layer. Raises ProbekitError for a pattern
    that matches nothing, with the names nearest to it.
    """
    chosen: dict[str, Layer] = {}
    for pattern in patterns:
        wanted, heads = _heads(pattern)
        if wanted.startswith("@"):
            if wanted not in GROUPS:
                raise ProbekitError(f"layer group {wanted!r}: choose from {', '.join(GROUPS)}")
            matches = [la for la in available if la.kind in GROUPS[wanted] and (la.inside is None or la.kind in _INSIDE)]
            if not matches:
                kinds = ", ".join(dict.fromkeys(layer.kind for layer in available))
                raise ProbekitError(f"layer group {wanted!r}: this model has none; it has layers of kind {kinds}")
        else:
            matches = [layer for layer in available if fnmatch.fnmatchcase(layer.name, wanted)]
            if any(layer.inside is None for layer in matches):
                matches = [layer for layer in matches if layer.inside is None]
        if not matches:
            near = difflib.get_close_matches(wanted, [layer.name for layer in available], n=3, cutoff=0.4)
            hint = (
                f"nearest: {', '.join(near)}"
                if near
                else f"there are {', '.join(sorted({la.kind for la in available}))} layers"
            )
            raise ProbekitError(f"no layer {wanted!r} in this model ({hint})")
        for layer in matches:
            found = layer if heads is None else layer.only(heads)
            chosen[found.name] = found
    return Layers(sorted(chosen.values(), key=lambda layer: layer.order))


def _heads(pattern: str) -> tuple[str, list[int] | None]:
    """A pattern without, and the numbers of, its heads."""
    wanted, colon, told = pattern.partition(":")
    if not colon:
        return wanted, None
    if match := re.fullmatch(r"heads=(\d{1,4}(?:,\d{1,4})*)", told):
        return wanted, [int(number) for number in match[1].split(",")]
    raise ProbekitError(f"layer {pattern!r}: after the colon comes heads=3,5")


# --- what a block takes and returns --------------------------------------------------------------------------------------

Form = Literal["image", "text", "image, text", "text, image", "joined"]
"""What comes out: the image's tensor, the text's, both as a tuple, or both as one sequence."""


@dataclass(frozen=True)
class Block:
    """A block's class: what it returns, the arguments that carry the same in, and the parts inside it, in execution order.

    parts: by the name of the submodule, its kind and what it returns. text: the argument that conditions its cross-attentions.
    """

    form: Form = "image"
    image: str = "hidden_states"
    text: str = "encoder_hidden_states"
    parts: Mapping[str, tuple[Kind, Form]] = field(default_factory=dict)


def _parts(form: Form = "image", **kinds: str) -> dict[str, tuple[Kind, Form]]:
    """Parts by what is told of them: `self`, `cross`, `joint` (both as a tuple), `feed` or `feed text`."""
    told: dict[str, tuple[Kind, Form]] = {
        "self": ("self-attention", form),
        "cross": ("cross-attention", form),
        "joint": ("joint-attention", "image, text"),
        "mixed": ("joint-attention", "joined"),
        "feed": ("feed-forward", form),
        "feed text": ("feed-forward", "text"),
    }
    return {name: told[kind] for name, kind in kinds.items()}


_DOUBLE = _parts(attn="joint", ff="feed", ff_context="feed text")
_SINGLE = _parts("joined", attn="mixed")

BLOCKS: dict[str, Block] = {
    "BasicTransformerBlock": Block(parts=_parts(attn1="self", attn2="cross", ff="feed")),
    "HunyuanDiTBlock": Block(parts=_parts(attn1="self", attn2="cross", ff="feed")),
    "SanaTransformerBlock": Block(parts=_parts(attn1="self", attn2="cross", ff="feed")),
    "LuminaNextDiTBlock": Block(parts=_parts(attn1="self", attn2="cross", feed_forward="feed")),
    "PRXBlock": Block(parts=_parts(attention="cross")),
    "Kandinsky5TransformerDecoderBlock": Block(
        image="visual_embed",
        text="text_embed",
        parts=_parts(self_attention="self", cross_attention="cross", feed_forward="feed"),
    ),
    "Kandinsky5TransformerEncoderBlock": Block(
        "text", text="x", parts=_parts("text", self_attention="self", feed_forward="feed")
    ),
    "JointTransformerBlock": Block("text, image", parts=_parts(attn="joint", attn2="self", ff="feed", ff_context="feed text")),
    "FluxTransformerBlock": Block("text, image", parts=_DOUBLE),
    "FluxSingleTransformerBlock": Block("text, image", parts=_SINGLE),
    "Flux2TransformerBlock": Block("text, image", parts=_DOUBLE),
    "Flux2SingleTransformerBlock": Block("joined", parts=_SINGLE),
    "ChromaTransformerBlock": Block("text, image", parts=_DOUBLE),
    "ChromaSingleTransformerBlock": Block("joined", parts=_SINGLE),
    "BriaTransformerBlock": Block("text, image", parts=_DOUBLE),
    "BriaSingleTransformerBlock": Block("text, image", parts=_SINGLE),
    "BriaFiboTransformerBlock": Block("text, image", parts=_DOUBLE),
    "BriaFiboSingleTransformerBlock": Block("joined", parts=_SINGLE),
    "OvisImageTransformerBlock": Block("text, image", parts=_DOUBLE),
    "OvisImageSingleTransformerBlock": Block("text, image", parts=_SINGLE),
    "QwenImageTransformerBlock": Block("text, image", parts=_parts(attn="joint", img_mlp="feed", txt_mlp="feed text")),
    "HunyuanImageTransformerBlock": Block("image, text", parts=_DOUBLE),
    "HunyuanImageSingleTransformerBlock": Block("image, text", parts=_parts(attn="joint")),
    "HunyuanImageIndividualTokenRefinerBlock": Block(
        "text", text="hidden_states", parts=_parts("text", attn="self", ff="feed")
    ),
    # their one feed-forward runs twice, on the image and on the text: no part of its own
    "CogView3PlusTransformerBlock": Block("image, text", parts=_parts(attn1="joint")),
    "CogView4TransformerBlock": Block("image, text", parts=_parts(attn1="joint")),
    "AuraFlowJointTransformerBlock": Block("text, image", parts=_DOUBLE),
    "AuraFlowSingleTransformerBlock": Block("joined", parts=_parts("joined", attn="mixed", ff="feed")),
    "HiDreamImageTransformerBlock": Block("image, text", parts=_parts(attn1="joint", ff_i="feed", ff_t="feed text")),
    "HiDreamImageSingleTransformerBlock": Block("joined", parts=_parts("joined", attn1="mixed", ff_i="feed")),
    "Krea2TransformerBlock": Block("joined", parts=_parts("joined", attn="mixed", ff="feed")),
    "OmniGenBlock": Block("joined", parts=_parts("joined", self_attn="mixed", mlp="feed")),
    "Lumina2TransformerBlock": Block("joined", parts=_parts("joined", attn="mixed", feed_forward="feed")),
    "ZImageTransformerBlock": Block("joined", image="x", parts=_parts("joined", attention="mixed", feed_forward="feed")),
}
"""What each block of diffusers takes and returns, by its class."""

# --- how a denoiser is told what ---------------------------------------------------------------------------------------


def _as_it_is(told: float, config: Any, scheduler: Any) -> float:
    return told


def _of_all(scheduler: Any) -> float:
    """The number of timesteps that a scheduler counts to."""
    return float(getattr(getattr(scheduler, "config", None), "num_train_timesteps", 1000))


def _share(told: float, config: Any, scheduler: Any) -> float:
    return told * _of_all(scheduler)


def _risen(told: float, config: Any, scheduler: Any) -> float:
    return (1 - told) * _of_all(scheduler)


def _sana(told: float, config: Any, scheduler: Any) -> float:
    """Sana's own scale; of SanaSprint, t of sin t / (cos t + sin t) (`SCMScheduler` counts angles)."""
    if type(scheduler).__name__ == "SCMScheduler":
        return math.atan2(told, 1 - told)
    return told / getattr(config, "timestep_scale", 1.0)


def _packed(call: Mapping[str, Any], config: Any) -> Tokens:
    return Tokens(call["hidden_states"].shape[1])


def _patches(call: Mapping[str, Any], config: Any) -> int:
    height, width = call["hidden_states"].shape[-2:]
    return (height // config.patch_size) * (width // config.patch_size)


def _patched(call: Mapping[str, Any], config: Any) -> Tokens:
    return Tokens(_patches(call, config))


def _hidream(call: Mapping[str, Any], config: Any) -> Tokens:
    states = call["hidden_states"]
    if states.ndim == 3:
        return Tokens(states.shape[1], first=True)
    # pictures that are not square are padded to the most tokens that there can be
    most = math.prod(config.max_resolution) // config.patch_size**2
    return Tokens(_patches(call, config) if states.shape[-1] == states.shape[-2] else most, first=True)


def _lumina2(call: Mapping[str, Any], config: Any) -> Tokens:
    """Each row's image follows its own caption at once, without padding between."""
    return Tokens(_patches(call, config), starts=tuple(int(n) for n in call["encoder_attention_mask"].sum(1)))


def _z_image(call: Mapping[str, Any], config: Any) -> Tokens:
    """The image stands first, filled up to a multiple of 32 (`SEQ_MULTI_OF`)."""
    _, frames, height, width = call["x"][0].shape
    count = (frames // call["f_patch_size"]) * (height // call["patch_size"]) * (width // call["patch_size"])
    return Tokens(-(-count // 32) * 32, first=True)


@dataclass(frozen=True)
class Denoiser:
    """A denoiser's class: its stacks of blocks in execution order, what runs before and after them, and what it is called with.

    stacks: with what each block of it returns, where that is not what `BLOCKS` says of its class. before_item: where in what
    runs before them the image is.
    state, timestep: the arguments that hold the noisy picture and the time. in_schedule: (what it is told, its config, the
    scheduler) to the time in the scheduler's units. tokens: (its arguments, its config) to where the image stands in sequences
    that hold text, too.
    """

    stacks: Mapping[str, Form | None]
    before: str | None = "x_embedder"
    before_item: tuple[int, ...] = ()
    after: str | None = "proj_out"
    state: str = "hidden_states"
    timestep: str = "timestep"
    in_schedule: Callable[[float, Any, Any], float] = _as_it_is
    tokens: Callable[[Mapping[str, Any], Any], Tokens] | None = None


_BLOCKS: dict[str, Form | None] = {"transformer_blocks": None}
_TWO_STACKS: dict[str, Form | None] = {"transformer_blocks": None, "single_transformer_blocks": None}

DENOISERS: dict[str, Denoiser] = {
    "Transformer2DModel": Denoiser(_BLOCKS, before="pos_embed"),
    "DiTTransformer2DModel": Denoiser(_BLOCKS, before="pos_embed", after="proj_out_2"),
    "PixArtTransformer2DModel": Denoiser(_BLOCKS, before="pos_embed"),
    "HunyuanDiT2DModel": Denoiser({"blocks": None}, before="pos_embed"),
    "LuminaNextDiT2DModel": Denoiser(
        {"layers": None}, before="patch_embedder", before_item=(0,), after="norm_out", in_schedule=_risen
    ),
    "SanaTransformer2DModel": Denoiser(_BLOCKS, before="patch_embed", in_schedule=_sana),
    "PRXTransformer2DModel": Denoiser({"blocks": None}, before="img_in", after="final_layer", in_schedule=_share),
    "SD3Transformer2DModel": Denoiser(_BLOCKS, before="pos_embed"),
    "FluxTransformer2DModel": Denoiser(_TWO_STACKS, in_schedule=_share, tokens=_packed),
    "Flux2Transformer2DModel": Denoiser(_TWO_STACKS, in_schedule=_share, tokens=_packed),
    "ChromaTransformer2DModel": Denoiser(_TWO_STACKS, in_schedule=_share, tokens=_packed),
    "OvisImageTransformer2DModel": Denoiser(_TWO_STACKS, in_schedule=_share, tokens=_packed),
    "BriaTransformer2DModel": Denoiser(_TWO_STACKS, tokens=_packed),
    "BriaFiboTransformer2DModel": Denoiser(_TWO_STACKS, tokens=_packed),
    "QwenImageTransformer2DModel": Denoiser(_BLOCKS, before="img_in", in_schedule=_share),
    "HunyuanImageTransformer2DModel": Denoiser(
        {"context_embedder.token_refiner.refiner_blocks": None, **_TWO_STACKS}, tokens=None
    ),
    # its patch_embed returns text and image in one
    "CogView3PlusTransformer2DModel": Denoiser(_BLOCKS, before=None),
    "CogView4Transformer2DModel": Denoiser(_BLOCKS, before="patch_embed", before_item=(0,)),
    "AuraFlowTransformer2DModel": Denoiser(
        {"joint_transformer_blocks": None, "single_transformer_blocks": None},
        before="pos_embed",
        in_schedule=_share,
        tokens=_patched,
    ),
    "HiDreamImageTransformer2DModel": Denoiser(
        {"double_stream_blocks": None, "single_stream_blocks": None}, after="final_layer", timestep="timesteps", tokens=_hidream
    ),
    "Krea2Transformer2DModel": Denoiser(_BLOCKS, before="img_in", after="final_layer", in_schedule=_share, tokens=_packed),
    "OmniGenTransformer2DModel": Denoiser({"layers": None}, before=None, tokens=_patched),
    "Lumina2Transformer2DModel": Denoiser(
        {"context_refiner": "text", "noise_refiner": "image", "layers": None},
        after="norm_out",
        in_schedule=_risen,
        tokens=_lumina2,
    ),
    "ZImageTransformer2DModel": Denoiser(
        {"noise_refiner": "image", "context_refiner": "text", "layers": None},
        before=None,
        after=None,
        state="x",
        timestep="t",
        in_schedule=_risen,
        tokens=_z_image,
    ),
    "Kandinsky5Transformer3DModel": Denoiser(
        {"text_transformer_blocks": None, "visual_transformer_blocks": None}, before="visual_embeddings", after="out_layer"
    ),
}
"""Every transformer of diffusers that makes pictures of captions or classes, by its class."""

_UNET = Denoiser({}, state="sample")
_CASCADE = Denoiser({}, state="sample", timestep="timestep_ratio")


def denoiser_of(model: nn.Module) -> Denoiser | None:
    """What is known of a denoiser's class, or the class that it is made from; None of what is none."""
    if hasattr(model, "down_blocks"):
        return _CASCADE if hasattr(model, "down_downscalers") else _UNET
    return next((DENOISERS[kind.__name__] for kind in type(model).__mro__ if kind.__name__ in DENOISERS), None)


# --- streams -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    name: str
    kind: Kind
    streams: dict[str, Stream]
    inside: str | None = None
    heads: dict[str, tuple[Heads, ...]] = field(default_factory=dict)


def _main(name: str, bypass: str | None = None) -> dict[str, Stream]:
    """One tensor in, one out; bypass: the argument that carries it in."""
    return {"main": Stream((Site(name),), bypass=None if bypass is None else (Site(name, (bypass,), "input"),))}


def _streams(name: str, form: Form, enters: Mapping[str, str] | None) -> dict[str, Stream]:
    """The streams of a module that returns `form`.

    enters: by `image` and `text`, the arguments that carry the same in; None for one whose output is added to the stream.
    """

    def one(*parts: tuple[str, Site]) -> Stream:
        bypass = (None if enters is None else replace(site, path=(enters[which],), border="input") for which, site in parts)
        return Stream(tuple(site for _, site in parts), bypass=tuple(bypass))

    if form == "image":
        return {"main": one(("image", Site(name)))}
    if form == "text":
        return {"text": one(("text", Site(name)))}
    if form == "joined":
        image, text = Site(name, tokens="image"), Site(name, tokens="text")
        return {"image": one(("image", image)), "text": one(("image", text)), "both": one(("image", Site(name)))}
    image, text = (Site(name, (form.split(", ").index(which),)) for which in ("image", "text"))
    return {"image": one(("image", image)), "text": one(("text", text)), "both": one(("text", text), ("image", image))}


def _block(name: str, module: Any, form: Form | None = None) -> Iterator[_Found]:
    """A block and what lies inside it. Raises ProbekitError for a class that is not registered."""
    # HiDream's blocks are wrapped in one that only hands on
    inner = module.block if type(module).__name__ == "HiDreamBlock" else module
    known = next((BLOCKS[kind.__name__] for kind in type(inner).__mro__ if kind.__name__ in BLOCKS), None)
    if known is None:
        raise ProbekitError(f"layer {name}: a {type(inner).__name__}, which is not registered; hooks.BLOCKS takes it")
    within = name if inner is module else f"{name}.block"
    carries = form or known.form
    for part, (kind, part_form) in known.parts.items():
        if (found := getattr(inner, part, None)) is not None:
            yield from _part(f"{within}.{part}", found, kind, carries if form else part_form, name)
    if getattr(inner, "context_pre_only", False):  # SD3's last block returns (None, image)
        site = Site(name, (1,))
        yield _Found(name, "block", {"image": Stream((site,), bypass=(Site(name, (known.image,), "input"),))})
        return
    # of a stack that holds one of the two, the one argument carries it
    enters = {"image": known.image, "text": known.image if form == "text" else known.text}
    yield _Found(name, "block", _streams(name, carries, enters))


def _part(name: str, module: Any, kind: Kind, form: Form, inside: str) -> Iterator[_Found]:
    """An attention with its queries, keys and values, or a feed-forward."""
    if kind == "feed-forward":
        yield _Found(name, kind, _streams(name, form, None), inside)
        return
    crosses = getattr(module, "is_cross_attention", None)  # of diffusers' own Attention
    if kind == "self-attention" and crosses and name.endswith("attn1"):
        kind = "cross-attention"  # `only_cross_attention`
    elif kind == "cross-attention" and crosses is False:
        kind = "self-attention"  # `double_self_attention`
    streams = _streams(name, form, None)
    if form == "image, text" and getattr(module, "context_pre_only", None):
        streams = {"image": streams["image"]}  # the last block's text goes nowhere
    if kind == "cross-attention":
        streams["text"] = Stream((Site(name, ("encoder_hidden_states",), "input"),))
    for of in ("query", "key", "value"):
        if projections := _projections(name, module, of):
            label, whole, heads = _by_stream(name, of, projections, form)
            yield _Found(label, of, whole, inside, heads)
    outs = _outputs(name, module, form)
    heads = _by_stream(name, "", outs, form)[2] if outs else {}
    yield _Found(name, kind, streams, inside, {key: value for key, value in heads.items() if key in streams})


_FUSED = {"to_qkv_mlp_proj": ("query", "key", "value"), "img_qkv_proj": ("query", "key", "value")}


def _projections(name: str, module: Any, of: str) -> list[Heads]:
    """Where an attention makes its queries, keys or values: of the image, and of the text where that has some of its own."""
    count = _head_count(module)
    found: list[Heads] = []
    letter = of[0]
    for attribute in (f"to_{letter}", f"to_{of}", f"add_{letter}_proj", f"to_{letter}_t"):
        if isinstance(made := getattr(module, attribute, None), nn.Linear):
            # with fewer keys than queries, several queries share one
            own = made.out_features // (_head_size(module, count) or 1) if of != "query" else count
            found.append(Heads(Site(f"{name}.{attribute}"), 0, own, made.out_features // max(own, 1)))
    for attribute, order in _FUSED.items():
        if isinstance(getattr(module, attribute, None), nn.Linear):
            size = module.inner_dim // count
            first = order.index(of) * module.inner_dim
            site = Site(f"{name}.{attribute}", features=((first, first + module.inner_dim),))
            found.append(Heads(site, first, count, size))
    if of != "query" and isinstance(getattr(module, "txt_kv_proj", None), nn.Linear):
        first = ("key", "value").index(of) * module.inner_dim
        site = Site(f"{name}.txt_kv_proj", features=((first, first + module.inner_dim),))
        found.append(Heads(site, first, count, module.inner_dim // count))
    return found


def _outputs(name: str, module: Any, form: Form) -> list[Heads]:
    """Where the heads' outputs stand beside each other, before they are mixed: what enters the last projection."""
    count = _head_count(module)
    found: list[Heads] = []
    if type(getattr(module, "processor", None)).__name__ == "LuminaAttnProcessor2_0":
        return found  # it mixes the heads of both its attentions together
    for attribute in ("to_out", "out_layer", "to_add_out", "to_out_t"):
        made = getattr(module, attribute, None)
        path = f"{name}.{attribute}"
        if isinstance(made, nn.ModuleList) and len(made):
            made, path = made[0], f"{path}.0"
        if isinstance(made, nn.Linear):
            width = getattr(module, "inner_dim", None) or made.in_features
            found.append(Heads(Site(path, ("input",), "input"), 0, count, width // count))
    if not found and getattr(module, "pre_only", False):  # Flux mixes them with its feed-forward, after the attention
        found.append(Heads(Site(name), 0, count, module.inner_dim // count))
    return found


def _head_count(module: Any) -> int:
    return int(getattr(module, "heads", 0) or getattr(module, "num_heads", 0) or 1)


def _head_size(module: Any, count: int) -> int:
    query = getattr(module, "to_q", None) or getattr(module, "to_query", None)
    return query.out_features // count if isinstance(query, nn.Linear) else 0


def _by_stream(
    name: str, of: str, found: list[Heads], form: Form
) -> tuple[str, dict[str, Stream], dict[str, tuple[Heads, ...]]]:
    """The name of a projection, and its streams and heads: those of the image first, of the text second."""
    module = found[0].site.module
    label = f"{name}.to_{of[:1]}" if module.removeprefix(f"{name}.") in _FUSED else module
    groups: dict[str, tuple[Heads, ...]]
    if len(found) > 1:
        groups = {"image": (found[0],), "text": (found[1],), "both": (found[1], found[0])}
    elif form == "joined":
        (one,) = found
        image, text = replace(one.site, tokens="image"), replace(one.site, tokens="text")
        groups = {"image": (one._replace(site=image),), "text": (one._replace(site=text),), "both": (one,)}
    else:
        groups = {"text" if form == "text" else "main": (found[0],)}
    return label, {key: Stream(tuple(heads.site for heads in sites)) for key, sites in groups.items()}, groups


# --- U-Nets ------------------------------------------------------------------------------------------------------------

_UNET_BLOCKS = (
    "DownBlock2D",
    "CrossAttnDownBlock2D",
    "AttnDownBlock2D",
    "SimpleCrossAttnDownBlock2D",
    "ResnetDownsampleBlock2D",
    "UpBlock2D",
    "CrossAttnUpBlock2D",
    "AttnUpBlock2D",
    "SimpleCrossAttnUpBlock2D",
    "ResnetUpsampleBlock2D",
    "UNetMidBlock2D",
    "UNetMidBlock2DCrossAttn",
    "UNetMidBlock2DSimpleCrossAttn",
)


def _unet(model: Any) -> Iterator[_Found]:
    """The layers of a U-Net. Raises ProbekitError for blocks that are not registered."""
    if hasattr(model, "down_downscalers"):
        yield from _cascade(model)
        return
    if type(model.down_blocks[0]).__name__ == "Kandinsky3DownSampleBlock":
        yield from _kandinsky3(model)
        return
    blocks = {f"{side}.{i}": block for side in ("down_blocks", "up_blocks") for i, block in enumerate(getattr(model, side))}
    for name, block in {**blocks, "mid_block": model.mid_block}.items():
        if block is not None and not any(kind.__name__ in _UNET_BLOCKS for kind in type(block).__mro__):
            raise ProbekitError(f"layer {name}: a {type(block).__name__}, a block of U-Nets that is not known here")
    skips = _skip_sites(model)

    def encoder(name: str, skip: Site, bypass: str | None) -> dict[str, Stream]:
        out = Site(name)
        passes = None if bypass is None else (Site(name, (bypass,), "input"),)
        return {
            "both": Stream((out,), bypass=passes),
            "main": Stream((out,), keeps=(skip,), bypass=passes),
            "skip": Stream((skip,)),
        }

    def attention(name: str, module: Any, streams: dict[str, Stream]) -> Iterator[_Found]:
        for i, block in enumerate(getattr(module, "transformer_blocks", [])):
            for found in _block(f"{name}.transformer_blocks.{i}", block):
                yield replace(found, inside=name)
        if not hasattr(module, "transformer_blocks"):  # an Attention by itself, which adds its input to its output
            for of in ("query", "key", "value"):
                if projections := _projections(name, module, of):
                    # the text's keys and values are added to the image's
                    label, whole, heads = _by_stream(name, of, projections, "image")
                    yield _Found(label, of, whole, name, heads)
        yield _Found(name, "attention", streams)

    yield _Found("conv_in", "conv", encoder("conv_in", next(skips), None))
    for i, block in enumerate(model.down_blocks):
        name = f"down_blocks.{i}"
        attentions = getattr(block, "attentions", None) or []
        count = 0
        for j in range(len(block.resnets)):
            resnet = f"{name}.resnets.{j}"
            if len(attentions):
                yield _Found(resnet, "resnet", _main(resnet, "input_tensor"))
                layer = f"{name}.attentions.{j}"
                yield from attention(layer, attentions[j], encoder(layer, next(skips), "hidden_states"))
            else:
                yield _Found(resnet, "resnet", encoder(resnet, next(skips), "input_tensor"))
            count += 1
        for j in range(len(getattr(block, "downsamplers", None) or [])):
            layer = f"{name}.downsamplers.{j}"
            yield _Found(layer, "sampler", encoder(layer, next(skips), None))
            count += 1
        main = Site(name, (0,))
        rest = tuple(Site(name, (1, k)) for k in range(count))
        whole = {"both": Stream((main, *rest)), "main": Stream((main,)), "skip": Stream(rest)}
        yield _Found(name, "block", whole)

    if model.mid_block is not None:
        attentions = getattr(model.mid_block, "attentions", None) or []
        for j in range(len(model.mid_block.resnets)):
            if 0 < j <= len(attentions) and attentions[j - 1] is not None:
                layer = f"mid_block.attentions.{j - 1}"
                yield from attention(layer, attentions[j - 1], _main(layer, "hidden_states"))
            yield _Found(f"mid_block.resnets.{j}", "resnet", _main(f"mid_block.resnets.{j}", "input_tensor"))
        yield _Found("mid_block", "mid", _main("mid_block", "hidden_states"))

    for i, block in enumerate(model.up_blocks):
        name = f"up_blocks.{i}"
        attentions = getattr(block, "attentions", None) or []
        for j in range(len(block.resnets)):
            yield _Found(f"{name}.resnets.{j}", "resnet", _main(f"{name}.resnets.{j}"))
            if len(attentions):
                layer = f"{name}.attentions.{j}"
                yield from attention(layer, attentions[j], _main(layer, "hidden_states"))
        for j in range(len(getattr(block, "upsamplers", None) or [])):
            yield _Found(f"{name}.upsamplers.{j}", "sampler", _main(f"{name}.upsamplers.{j}"))
        yield _Found(name, "block", _main(name))
    yield _Found("conv_out", "conv", _main("conv_out"))


def _skip_sites(model: Any) -> Iterator[Site]:
    """Where each skip tensor, in the order the encoder makes them, enters the decoder.

    Every up block takes as many from the end of the stack as it has resnets.
    """
    taken = [
        (f"up_blocks.{i}", j) for i, block in reversed(list(enumerate(model.up_blocks))) for j in range(len(block.resnets))
    ]
    for name, j in taken:
        yield Site(name, ("res_hidden_states_tuple", j), "input")


def _kandinsky3(model: Any) -> Iterator[_Found]:
    """Kandinsky 3's U-Net: a down block's output is the skip; in the decoder it is joined to the path outside any block."""

    def attention(name: str, module: Any, kind: Kind) -> Iterator[_Found]:
        if type(module).__name__ != "Kandinsky3AttentionBlock":
            return
        yield from _part(f"{name}.attention", module.attention, kind, "image", name)
        yield _Found(f"{name}.feed_forward", "feed-forward", _streams(f"{name}.feed_forward", "image", None), name)
        yield _Found(name, "attention", _main(name, "x"))

    yield _Found("conv_in", "conv", _main("conv_in"))
    for side in ("down_blocks", "up_blocks"):
        for i, block in enumerate(getattr(model, side)):
            name = f"{side}.{i}"
            if side == "down_blocks":
                yield from attention(f"{name}.attentions.0", block.attentions[0], "self-attention")
            for j in range(len(block.resnets_in)):
                yield _Found(f"{name}.resnets_in.{j}", "resnet", _main(f"{name}.resnets_in.{j}", "x"))
                yield from attention(f"{name}.attentions.{j + 1}", block.attentions[j + 1], "cross-attention")
                yield _Found(f"{name}.resnets_out.{j}", "resnet", _main(f"{name}.resnets_out.{j}", "x"))
            if side == "up_blocks":
                yield from attention(f"{name}.attentions.0", block.attentions[0], "self-attention")
            yield _Found(name, "block", _main(name))
    yield _Found("conv_out", "conv", _main("conv_out"))


def _cascade(model: Any) -> Iterator[_Found]:
    """Stable Cascade's U-Net: each level of the encoder is handed to the first residual block of its level in the decoder."""
    yield _Found("embedding", "conv", _main("embedding"))
    kinds: dict[str, Kind] = {
        "SDCascadeResBlock": "resnet",
        "SDCascadeAttnBlock": "attention",
        "SDCascadeTimestepBlock": "block",
    }
    for side, scaler in (("down", "downscalers"), ("up", "upscalers")):
        for i, level in enumerate(getattr(model, f"{side}_blocks")):
            if len(getattr(model, f"{side}_repeat_mappers")[i]):
                raise ProbekitError(f"layer {side}_blocks.{i}: runs more than once a step, which is not known here")
            if side == "down" and i:
                yield _Found(f"down_{scaler}.{i}", "sampler", _main(f"down_{scaler}.{i}"))
            for j, block in enumerate(level):
                name = f"{side}_blocks.{i}.{j}"
                if type(block).__name__ == "SDCascadeAttnBlock":
                    yield from _part(f"{name}.attention", block.attention, "joint-attention", "image", name)
                yield _Found(name, kinds[type(block).__name__], _main(name, "x"))
            if side == "up" and i < len(model.up_blocks) - 1:
                yield _Found(f"up_{scaler}.{i}", "sampler", _main(f"up_{scaler}.{i}"))
    yield _Found("clf", "conv", _main("clf"))


# --- transformers ------------------------------------------------------------------------------------------------------


def _stack(model: nn.Module, path: str) -> nn.ModuleList:
    """The stack of blocks at that path, empty where there is none."""
    try:
        found = model.get_submodule(path)
    except AttributeError:
        return nn.ModuleList()
    return found if isinstance(found, nn.ModuleList) else nn.ModuleList()


def _transformer(model: nn.Module, denoiser: Denoiser) -> Iterator[_Found]:
    if denoiser.before is not None:
        yield _Found(denoiser.before, "projection", {"main": Stream((Site(denoiser.before, denoiser.before_item),))})
    for stack, form in denoiser.stacks.items():
        for i, block in enumerate(_stack(model, stack)):
            yield from _block(f"{stack}.{i}", block, form)
    if denoiser.after is not None and isinstance(getattr(model, denoiser.after, None), nn.Module):
        yield _Found(denoiser.after, "projection", _main(denoiser.after))


_TEXT_STACKS = (
    "encoder.layers",
    "text_model.encoder.layers",
    "encoder.block",
    "model.layers",
    "language_model.layers",
    "layers",
)
"""Where the text encoders of transformers hold their blocks: CLIP, T5, and language models."""
_TEXT_PARTS = ("self_attn", "layer.0.SelfAttention", "mlp", "layer.1.DenseReluDense")
"""Their attentions, which return what they looked at beside, and their feed-forwards."""


def _text_encoder(model: nn.Module, stack: str) -> Iterator[_Found]:
    """The blocks of a text encoder, with their attentions and feed-forwards; what they return first is the text."""
    for i, block in enumerate(_stack(model, stack)):
        name = f"{stack}.{i}"
        for part in _TEXT_PARTS:
            if any(path == part for path, _ in block.named_modules()):
                path = (0,) if part.lower().endswith(("attn", "attention")) else ()
                yield _Found(f"{name}.{part}", "text", {"text": Stream((Site(f"{name}.{part}", path),), bypass=(None,))}, name)
        site = Site(name, (0,) if type(block).__name__ == "T5Block" else ())
        bypass = (Site(name, ("hidden_states",), "input"),)
        yield _Found(name, "text", {"text": Stream((site,), bypass=bypass)})


# --- flow ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """A module that a denoiser calls once, which treats every row of its batch by itself; and what it reads and writes.

    reads, writes: values that pass between units: `state` (what the denoiser is given), `image`, `text`, `skip 3`, `out`. What
    else a unit is told (time, text of a cross-attention) belongs to the row and does not change in a call.
    """

    module: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]


@dataclass(frozen=True)
class Flow:
    """What passes between a denoiser's units, in execution order.

    sites: for each site that layers write, after which unit it is written, and which values it holds.
    """

    units: tuple[Unit, ...]
    sites: Mapping[Site, tuple[int, tuple[str, ...]]]


ROWS = (
    "input",
    "input_tensor",
    "hidden_states",
    "encoder_hidden_states",
    "temb",
    "emb",
    "temb_mod",
    "temb_mod_img",
    "temb_mod_txt",
    "timestep",
    "class_labels",
    "attention_mask",
    "encoder_attention_mask",
    "encoder_hidden_states_mask",
)
"""The arguments of units that hold an entry a row. What a unit is told beside them must be the same for all."""


def flow(model: nn.Module) -> Flow | None:
    """How values pass through a denoiser; None where that is not known (skips between the blocks of a transformer)."""
    if hasattr(model, "down_blocks"):
        return None if hasattr(model, "down_downscalers") or not hasattr(model.down_blocks[0], "resnets") else _unet_flow(model)  # type: ignore[index]
    denoiser = denoiser_of(model)
    return None if denoiser is None or type(model).__name__ == "HunyuanDiT2DModel" else _transformer_flow(model, denoiser)


def _unet_flow(model: Any) -> Flow:
    units: list[Unit] = []
    sites: dict[Site, tuple[int, tuple[str, ...]]] = {}
    skips = 0

    def add(module: str, *read: str, skip: bool = False) -> None:
        nonlocal skips
        writes = ("image", f"skip {skips}") if skip else ("image",)
        skips += skip
        sites[Site(module)] = (len(units), writes)
        units.append(Unit(module, ("image", *read), writes))

    def inner(name: str, block: Any, skip: bool, reads: Sequence[str] = ()) -> None:
        attentions = getattr(block, "attentions", None) or []
        for j in range(len(block.resnets)):
            add(f"{name}.resnets.{j}", *reads[j : j + 1], skip=skip and not len(attentions))
            if len(attentions):
                add(f"{name}.attentions.{j}", skip=skip)

    add("conv_in", skip=True)
    units[0] = replace(units[0], reads=("state",))
    for i, block in enumerate(model.down_blocks):
        name, first = f"down_blocks.{i}", skips
        inner(name, block, True)
        for j in range(len(getattr(block, "downsamplers", None) or [])):
            add(f"{name}.downsamplers.{j}", skip=True)
        sites[Site(name, (0,))] = (len(units) - 1, ("image",))
        sites |= {Site(name, (1, k)): (len(units) - 1, (f"skip {first + k}",)) for k in range(skips - first)}
    if model.mid_block is not None:
        attentions = getattr(model.mid_block, "attentions", None) or []
        for j in range(len(model.mid_block.resnets)):
            if 0 < j <= len(attentions) and attentions[j - 1] is not None:
                add(f"mid_block.attentions.{j - 1}")
            add(f"mid_block.resnets.{j}")
        sites[Site("mid_block")] = (len(units) - 1, ("image",))
    left = skips
    sites |= {site: (len(units) - 1, (f"skip {k}",)) for k, site in enumerate(_skip_sites(model))}
    for i, block in enumerate(model.up_blocks):
        name, count = f"up_blocks.{i}", len(block.resnets)
        inner(name, block, False, [f"skip {left - 1 - j}" for j in range(count)])
        left -= count
        for j in range(len(getattr(block, "upsamplers", None) or [])):
            add(f"{name}.upsamplers.{j}")
        sites[Site(name)] = (len(units) - 1, ("image",))
    add("conv_out")
    return Flow(tuple(units), sites)


def _transformer_flow(model: nn.Module, denoiser: Denoiser) -> Flow:
    units: list[Unit] = []
    sites: dict[Site, tuple[int, tuple[str, ...]]] = {}
    image = "state"
    if denoiser.before is not None:
        sites[Site(denoiser.before, denoiser.before_item)] = (0, ("image",))
        # what embeds the image and something else at once is read for both
        both = bool(denoiser.before_item)
        units.append(
            Unit(denoiser.before, ("state", "text") if both else ("state",), ("image", "text") if both else ("image",))
        )
        image = "image"
    for found in layers(model):
        if found.kind != "block":
            continue
        written = {site: which for which, stream in found.streams.items() for site in stream.writes if which != "both"}
        names = {"main": "image"}
        values = tuple(dict.fromkeys(names.get(which, which) for which in found.streams if which != "both"))
        # an image's block may read the text, whether it returns it or not
        reads = ("text",) if values == ("text",) else ("image", "text")
        for stream in found.streams.values():
            for site in stream.writes:
                one = written.get(site)
                sites[site] = (len(units), values if one is None else (names.get(one, one),))
        units.append(Unit(found.name, tuple(image if value == "image" else value for value in reads), values))
        image = "image" if "image" in values else image
    if denoiser.after is not None and isinstance(getattr(model, denoiser.after, None), nn.Module):
        sites[Site(denoiser.after)] = (len(units), ("out",))
        units.append(Unit(denoiser.after, ("image",), ("out",)))
    return Flow(tuple(units), sites)


# --- shapes ------------------------------------------------------------------------------------------------------------


def output_shapes(model: nn.Module, chosen: Sequence[Layer], run: Callable[[], Any]) -> dict[str, tuple[int, ...]]:
    """The shape of each layer's output, batch first, as seen while `run()` calls the model.

    For layers with two streams it is that of the default one's first tensor, of sequences of text and image both together.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def watch(layer: Layer, site: Site) -> Callable[..., None]:
        def keep(tensor: Tensor) -> None:
            width = (sum(stop - start for start, stop in site.features),) if site.features else tensor.shape[-1:]
            shapes[layer.name] = (*tensor.shape[:-1], *width)

        def on_output(module: nn.Module, args: Any, output: Any) -> None:
            keep(read(output, site.path))

        def on_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            keep(read(bind(module, args, kwargs).arguments, site.path))

        return on_output if site.border == "output" else on_input

    sites = {layer: layer.stream().writes[0] for layer in chosen}
    modules = attach(model, [site.module for site in sites.values()])
    with contextlib.ExitStack() as stack, torch.no_grad():
        for layer, site in sites.items():
            module = modules[site.module]
            hook = watch(layer, site)
            handle = (
                module.register_forward_hook(hook)
                if site.border == "output"
                else module.register_forward_pre_hook(hook, with_kwargs=True)
            )
            stack.callback(handle.remove)
        run()
    return shapes
