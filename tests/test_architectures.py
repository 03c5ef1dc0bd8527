"""Every denoiser of diffusers, built tiny: its layers, and injections into them against plain PyTorch hooks."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from probekit import hooks
from probekit.hooks.architectures import BLOCKS, denoiser_of
from probekit.hooks.pictures import pictures
from tests import pipelines
from tests.pipelines import PIPELINES

# of the same number of words: Lumina 2 does not pad captions, and text of another length cannot take its place
CAPTIONS = (
    "a large red fish at the top left on a striped blue ground",
    "a small white moon at the low right on a plain red ground",
)


def row(name: str, number: int) -> dict[str, Any]:
    """What makes E (0) or O (1) of a pipeline."""
    negative = {key: value for key, value in PIPELINES[name].guided.items() if key == "negative_prompt"}
    return pipelines.row(name, CAPTIONS[number], torch.Generator().manual_seed(number)) | negative


def build(name: str) -> Any:
    """The pipeline; Kandinsky's in double precision: it makes a thousand times of every rounding."""
    return pipelines.PIPELINES[name].make().to(torch.float64) if name in ("kandinsky", "kandinsky22") else pipelines.build(name)


def places(pipeline: Any, pag: bool = False, adapter: bool = False) -> list[tuple[hooks.Layer, str]]:
    """The first and the last layer of each kind in each stack, with every stream; of what lies inside others, the first."""
    groups: dict[Any, list[hooks.Layer]] = {}
    for la in hooks.layers(hooks.denoiser(pipeline)):
        if pag and la.kind in ("query", "key", "value"):
            continue  # perturbed-attention guidance splits the batch there
        if adapter and la.kind == "block" and la.name.startswith("down_blocks"):
            continue
        stack = la.name.split(".")[0] if la.inside is None else None
        groups.setdefault((stack, la.kind, tuple(la.streams)), []).append(la)
    chosen = {la.name: la for (stack, *_), las in groups.items() for la in (las[0], las[-1 if stack else 0])}
    return [(la, stream) for la in chosen.values() for stream in la.streams]


def options(name: str) -> dict[str, Any]:
    shared = {**PIPELINES[name].options, **PIPELINES[name].guided}
    return {key: value for key, value in shared.items() if key != "negative_prompt"}


@contextlib.contextmanager
def plainly(model: nn.Module, rules: list[tuple[hooks.Layer, str]], rows: int) -> Iterator[None]:
    """Row k + 1 takes row 0's values at the k-th place: hooks of PyTorch, one a place, and nothing of probekit's engine."""
    handles, tokens, own = [], {}, {}

    def called(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> inspect.BoundArguments:
        bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
        bound.apply_defaults()
        return bound

    def begin(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        known = denoiser_of(model)
        assert known is not None
        tokens["at"] = known.tokens and known.tokens(called(module, args, kwargs).arguments, module.config)

    def swapped(tensor: Tensor, site: Any, target: int) -> Tensor:
        new = tensor.clone()
        for branch in range(len(tensor) // rows):
            to, of = branch * rows + target, branch * rows
            part: Any = slice(None)
            if site.tokens is not None:
                part = slice(*tokens["at"].range(site.tokens, to, tensor.shape[1]))
                assert tokens["at"].range(site.tokens, of, tensor.shape[1]) == (part.start, part.stop)
            columns = [i for a, b in site.features or ((0, tensor.shape[-1]),) for i in range(a, b)]
            new[to, part][..., columns] = tensor[of, part][..., columns]
        return new

    def inside(value: Any, path: tuple[Any, ...], change: Any) -> Any:
        if not path:
            if isinstance(value, Tensor):
                return change(value)
            items = list(value.values()) if isinstance(value, dict) else list(value)
            items = [change(item) if isinstance(item, Tensor) else item for item in items]
            return type(value)(*items) if isinstance(value, dict) else type(value)(items)
        items = list(value)
        items[path[0]] = inside(items[path[0]], path[1:], change)
        return type(value)(items)

    def on_output(site: Any, target: int, kept: tuple[Any, ...]) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            tensor = output if isinstance(output, Tensor) else output[0]
            for keep in kept:
                own[keep, target] = tensor - swapped(tensor, site, target)
            return inside(output, site.path, lambda tensor: swapped(tensor, site, target))

        return hook

    def on_input(site: Any, target: int, restores: bool) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            bound = called(module, args, kwargs)
            name = site.path[0]

            def change(tensor: Tensor) -> Tensor:
                # what was swapped away comes back; what a ControlNet added stays
                return tensor + own[site, target] if restores else swapped(tensor, site, target)

            bound.arguments[name] = inside(bound.arguments[name], site.path[1:], change)
            return bound.args[1:], bound.kwargs

        return hook

    handles.append(model.register_forward_pre_hook(begin, with_kwargs=True))
    for target, (la, name) in enumerate(rules, start=1):
        stream = la.stream(name)
        for site in stream.writes:
            module = model.get_submodule(site.module)
            if site.border == "output":
                handles.append(module.register_forward_hook(on_output(site, target, stream.keeps)))
            else:
                handles.append(module.register_forward_pre_hook(on_input(site, target, False), with_kwargs=True))
        for site in stream.keeps:
            module = model.get_submodule(site.module)
            handles.append(module.register_forward_pre_hook(on_input(site, target, True), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", pipelines.each(PIPELINES))
def test_layers_run_in_their_order_and_every_one_of_them_runs(name: str) -> None:
    pipeline = build(name)
    model, ran = hooks.denoiser(pipeline), list[str]()
    known = [la for la in hooks.layers(model) if la.inside is None]
    handles = [model.get_submodule(la.name).register_forward_hook(lambda m, a, o, n=la.name: ran.append(n)) for la in known]
    pictures(pipeline, [row(name, 0)], **options(name))
    for handle in handles:
        handle.remove()
    assert ran[: len(known)] == [la.name for la in known]
    assert len(ran) % len(known) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", pipelines.each(PIPELINES))
def test_e_into_itself_is_e_and_every_layer_and_stream_equals_plain_pytorch_hooks(name: str) -> None:
    pipeline = build(name)
    model, where = hooks.denoiser(pipeline), places(pipeline, "pag" in name, "adapter" in name)
    e, o = row(name, 0), row(name, 1)
    rules = [[hooks.Injection(la.name, stream=stream)] for la, stream in where]
    itself = hooks.sweep(pipeline, original=e, edit=e, rules=rules, **options(name))
    # a ControlNet's own rounding goes by where a row stands in the batch
    same = torch.allclose if "controlnet" in name or "adapter" in name else torch.equal
    assert all(same(image, itself.edit) for image in itself.images)
    swept = hooks.sweep(pipeline, original=o, edit=e, rules=rules, **options(name))
    with plainly(model, where, len(where) + 1):
        plain = pictures(pipeline, [e, *[o] * len(where)], **options(name))
    for (la, stream), ours, theirs in zip(where, swept.images, plain[1:], strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5), (la.name, stream, (ours - theirs).abs().max())
    assert torch.allclose(swept.edit, plain[0], atol=1e-5)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", pipelines.each(name for name in PIPELINES if "pag" not in name))
def test_all_heads_swapped_are_the_whole_attention_swapped(name: str) -> None:
    pipeline = build(name)
    with_heads = [la for la in hooks.layers(hooks.denoiser(pipeline)) if la.heads]
    some = list({(la.kind, tuple(la.heads)): la for la in with_heads}.values())
    rules = []
    for la in some:
        module = hooks.denoiser(pipeline).get_submodule(la.name) if la.kind.endswith("attention") else None
        if type(module).__name__ == "Flux2ParallelSelfAttention":
            continue  # its output is that of the feed-forward beside it, too
        stream = next(iter(la.heads))
        heads = ",".join(map(str, range(la.heads[stream][0].number)))
        rules += [[hooks.Injection(la.name, stream=stream)], [hooks.Injection(f"{la.name}:heads={heads}", stream=stream)]]
    swept = hooks.sweep(pipeline, original=row(name, 1), edit=row(name, 0), rules=rules, **options(name))
    for whole, heads, rule in zip(swept.images[::2], swept.images[1::2], rules[::2], strict=True):
        assert torch.allclose(whole, heads, atol=1e-5), rule[0].layer


def test_blocks_return_what_diffusers_own_registry_says() -> None:
    from diffusers.hooks._helpers import TransformerBlockRegistry
    from diffusers.models.attention import BasicTransformerBlock

    TransformerBlockRegistry.get(BasicTransformerBlock)  # fills it
    shared = {kind.__name__: told for kind, told in TransformerBlockRegistry._registry.items() if kind.__name__ in BLOCKS}
    assert len(shared) >= 10
    for name, told in shared.items():
        block = BLOCKS[name]
        if ", " in block.form and name != "BriaTransformerBlock":  # of it that registry says what it does not do
            assert told.return_hidden_states_index == block.form.split(", ").index("image"), name
        if told.hidden_states_argument_name != "hidden_states":
            assert block.image == told.hidden_states_argument_name, name


def test_nothing_in_a_block_s_place_is_diffusers_layer_skip_and_in_a_part_s_zero() -> None:
    from diffusers import LayerSkipConfig
    from diffusers.hooks import HookRegistry, apply_layer_skip

    # of two-stream blocks, that of diffusers 0.42 hands on the text as the image; of parts, what they are given
    name, pipeline = "pixart", pipelines.build("pixart")
    o = row(name, 1)
    places = ["transformer_blocks.0", "transformer_blocks.0.attn1", "transformer_blocks.0.ff"]
    rules = [[hooks.Injection(place, source=hooks.Nothing())] for place in places]
    ours = hooks.sweep(pipeline, original=o, edit=o, rules=[*rules, []], **options(name)).images
    apply_layer_skip(pipeline.transformer, LayerSkipConfig(indices=[0], fqn="transformer_blocks"))
    try:
        skipped = pictures(pipeline, [o], **options(name))[0]
    finally:
        for module in pipeline.transformer.modules():
            if isinstance(registry := getattr(module, "_diffusers_hook", None), HookRegistry):
                for hook in list(registry.hooks):
                    registry.remove_hook(hook)
    assert torch.allclose(ours[0], skipped, atol=1e-5)
    for place, made in zip(places[1:], ours[1:], strict=False):
        handle = pipeline.transformer.get_submodule(place).register_forward_hook(lambda m, a, output: torch.zeros_like(output))
        zero = pictures(pipeline, [o], **options(name))[0]
        handle.remove()
        assert torch.allclose(made, zero, atol=1e-5), place
    assert all(not torch.allclose(made, ours[-1], atol=1e-3) for made in ours[:-1])


@pytest.mark.parametrize("name", ["sd_pag", "sd3_pag"])
def test_inside_attentions_that_split_the_batch_nothing_is_written(name: str) -> None:
    pipeline = pipelines.build(name)
    inner = [la for la in hooks.layers(hooks.denoiser(pipeline)) if la.kind == "query"]
    rules = [[hooks.Injection(la.name)] for la in inner]
    with pytest.raises(hooks.ProbekitError, match=r"of a batch of \d+, and which is not known"):
        hooks.sweep(pipeline, original=row(name, 1), edit=row(name, 0), rules=rules, **options(name))


def test_a_t2i_adapter_s_down_blocks_are_refused_by_name() -> None:
    pipeline = pipelines.build("sd_adapter")
    rules = [[hooks.Injection("down_blocks.0")]]
    with pytest.raises(hooks.ProbekitError, match=r"layer down_blocks\.0: a T2I-Adapter adds to it in place"):
        hooks.sweep(pipeline, original=row("sd_adapter", 1), edit=row("sd_adapter", 0), rules=rules, **options("sd_adapter"))


def test_a_block_and_a_denoiser_that_are_not_registered_are_refused_by_name() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(2, 2)])

    with pytest.raises(hooks.ProbekitError, match="Own is no denoiser known here"):
        hooks.layers(Own())
    hooks.DENOISERS["Own"] = hooks.Denoiser({"blocks": None}, before=None, after=None)
    try:
        with pytest.raises(hooks.ProbekitError, match=r"layer blocks\.0: a Linear, which is not registered; hooks\.BLOCKS"):
            hooks.layers(Own())
        hooks.BLOCKS["Linear"] = hooks.Block()
        assert [la.name for la in hooks.layers(Own())] == ["blocks.0"]
    finally:
        del hooks.DENOISERS["Own"]
        hooks.BLOCKS.pop("Linear", None)
