"""Time one full sweep three ways: probekit's one batch, plain nnsight, and the papers' capture-then-inject.

    python benchmarks/sweep.py [--layout mini-sd] [--steps 20] [--guidance 3] [--repeats 3]

--layout: `mini-sd`; or `sd-1.4`, `sdxl` or `pixart`: the layers of these denoisers in the same order, narrower, with random
weights, and mini-sd's text encoder and autoencoder.

Every way runs in a process of its own, on the same pair, layers and steps; the pictures are checked to be equal. Seconds are
those of the processor, the median of the repeats, which other work on the machine changes little. Memory is the
resident set's peak above what the loaded and warmed-up model takes, as the kernel counts it (Linux), and, apart from it, the
activations that are held from one denoiser call to another. Below stands how much of a batch that is computed whole probekit
computes: the denoiser's floating-point operations as torch counts them, in rows of that batch; how far that is what the
seconds say, too, of the same batch computed whole; and the same of four windows of steps beside all steps (`--by-time`).
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from memory import resident, start_peak

if TYPE_CHECKING:
    from probekit.models import Model

ORIGINAL = "a small white moon at the right on a dotted green ground"
EDIT = "a large red fish at the top left on a striped blue ground"
WINDOWS = ("all", "0%-25%", "25%-50%", "50%-75%", "75%-100%")


def one_batch(model: Model, layers: list[str], options: dict[str, Any]) -> tuple[torch.Tensor, int]:
    """probekit: E and a copy of O for every layer, in one batch."""
    from probekit import hooks

    rules = [[hooks.Injection(name)] for name in layers]
    return model.painter.sweep((ORIGINAL, 0), (EDIT, 0), rules, **options).images, 0


def nnsight(model: Model, layers: list[str], options: dict[str, Any]) -> tuple[torch.Tensor, int]:
    """One traced generation of [E, O] for every layer."""
    from probekit import hooks

    traced = hooks.trace(model.pipeline)
    images = []
    for name in layers:
        rows = hooks.stack([model.painter.row(EDIT, 0), model.painter.row(ORIGINAL, 0)])
        with torch.no_grad(), traced.generate(**rows, **model.painter.defaults | options, output_type="pt") as tracer:
            for _ in tracer.iter[: options["num_inference_steps"]]:
                output = hooks.layer(traced.unet if hasattr(model.pipeline, "unet") else traced.transformer, name).output
                tensor = output[0] if "attentions" in name else output
                tensor[1] = tensor[0]
                if options["guidance_scale"] > 1:
                    tensor[3] = tensor[2]
            made = traced.output.save()
        images.append(made.images[1] * 2 - 1)
    return torch.stack(images), 0


def capture_then_inject(model: Model, layers: list[str], options: dict[str, Any]) -> tuple[torch.Tensor, int]:
    """The papers' way: E once with every activation stored, then O once for every layer."""
    from probekit import hooks

    schedule, images = model.pipeline.scheduler, []
    with hooks.capture(model.denoiser, layers, schedule=schedule) as captured:
        model.painter.generate([EDIT], [0], **options)
    for name in layers:
        rule = {0: [hooks.Injection(name, source=hooks.Stored(captured))]}
        with hooks.inject(model.denoiser, rule, schedule=schedule, rows=1):
            images.append(model.painter.generate([ORIGINAL], [0], **options)[0])
    return torch.stack(images), captured.bytes


def build(layout: str) -> Model:
    """mini-sd, or a random narrow denoiser with the layers of a published one, in a pipeline with mini-sd's other parts."""
    from probekit import load
    from probekit.models.families.text_to_image import as_model

    mini = load("mini-sd", device="cpu")
    if layout == "mini-sd":
        return mini
    from diffusers import PixArtAlphaPipeline, PixArtTransformer2DModel, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    parts = dict(mini.pipeline.components)
    if layout == "pixart":
        transformer = PixArtTransformer2DModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            num_layers=28,
            num_attention_heads=4,
            attention_head_dim=24,
            cross_attention_dim=96,
            caption_channels=96,
        )
        from transformers import T5Config, T5EncoderModel

        words = parts["tokenizer"]
        shape = {"d_model": 96, "d_kv": 24, "d_ff": 96, "num_layers": 1, "num_heads": 4}
        text = T5EncoderModel(T5Config(vocab_size=len(words), pad_token_id=words.eos_token_id, **shape))
        return as_model(PixArtAlphaPipeline(words, text.eval(), parts["vae"], transformer.eval(), parts["scheduler"]), "pixart")
    levels = {
        "sd-1.4": {
            "block_out_channels": (32, 64, 128, 128),
            "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        },
        "sdxl": {
            "block_out_channels": (32, 64, 128),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
        },
    }
    shape = {
        "sample_size": 16,
        "layers_per_block": 2,
        "attention_head_dim": 4,
        "cross_attention_dim": 96,
        "norm_num_groups": 16,
    }
    parts["unet"] = UNet2DConditionModel(**shape, **levels[layout]).eval()
    return as_model(StableDiffusionPipeline(**parts, requires_safety_checker=False), layout)


def operations(layout: str, options: dict[str, Any], windows: Sequence[str] = ("all",)) -> tuple[int, list[float]]:
    """How many rows a batch has, and how many of them the sweep computes in each step."""
    from torch.utils.flop_counter import FlopCounterMode

    from probekit import hooks
    from probekit.hooks import rows

    model = build(layout)
    layers = [la.name for la in hooks.select(model.layers, hooks.default_layers(model.denoiser))]
    rules = [[hooks.Injection(name, steps=hooks.Steps.parse(window))] for window in windows for name in layers]
    count, told = len(rules) + 1, list[tuple[str, int]]()
    counter = FlopCounterMode(display=False)

    def counted(name: str) -> Any:
        def hook(*_: Any) -> None:
            told.append((name, counter.get_total_flops()))

        return hook

    for plain in (True, False):
        known = rows.flow
        rows.flow = (lambda model: None) if plain else known
        before = model.denoiser.register_forward_pre_hook(counted("begin"))
        after = model.denoiser.register_forward_hook(counted("end"))
        with counter:
            model.painter.sweep((ORIGINAL, 0), (EDIT, 0), rules, **options)
        rows.flow = known
        before.remove()
        after.remove()
    spent = [end - begin for (_, begin), (_, end) in zip(told[::2], told[1::2], strict=True)]
    whole, ours = spent[: len(spent) // 2], spent[len(spent) // 2 :]
    return count, [count * mine / plain for mine, plain in zip(ours, whole, strict=True)]


def seconds_whole(layout: str, options: dict[str, Any], repeats: int) -> float:
    """The denoiser's seconds as a share of those of the same batch with nothing left out, one after the other."""
    from probekit import hooks
    from probekit.hooks import rows

    model = build(layout)
    layers = [la.name for la in hooks.select(model.layers, hooks.default_layers(model.denoiser))]
    known, shares, times = rows.flow, [], list[float]()
    # before the sweep's own hooks, whose planning counts
    model.denoiser.register_forward_pre_hook(lambda *_: times.append(-time.process_time()))
    model.denoiser.register_forward_hook(lambda *_: times.append(time.process_time()))
    one_batch(model, layers, options | {"num_inference_steps": 1})
    for _ in range(repeats):
        taken = []
        for way in (known, lambda model: None):
            rows.flow = way
            times.clear()
            one_batch(model, layers, options)
            taken.append(sum(times))
        rows.flow = known
        shares.append(taken[0] / taken[1])
    return statistics.median(shares)


WAYS: dict[str, Callable[..., tuple[torch.Tensor, int]]] = {
    "probekit, one batch": one_batch,
    "nnsight, a trace a layer": nnsight,
    "capture, then inject": capture_then_inject,
}


def measure(way: str, layout: str, options: dict[str, Any], repeats: int) -> tuple[list[float], int, int, torch.Tensor]:
    """Seconds of every repeat, peak bytes above the loaded model, bytes held, and the pictures."""
    from probekit import hooks

    model = build(layout)
    layers = [la.name for la in hooks.select(model.layers, hooks.default_layers(model.denoiser))]
    model.painter.generate([ORIGINAL, EDIT], [0, 0], **options | {"num_inference_steps": 1})
    before = start_peak()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        images, held = WAYS[way](model, layers, options)
        seconds.append(time.process_time() - start)
    return seconds, resident("VmHWM") - before, held, images.clone()


def main() -> None:
    """Measure every way and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layout", choices=("mini-sd", "sd-1.4", "sdxl", "pixart"), default="mini-sd")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    options = {"num_inference_steps": asked.steps, "guidance_scale": asked.guidance}
    results = {}
    for way in WAYS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            results[way] = pool.apply(measure, (way, asked.layout, options, asked.repeats))
    ours = results["probekit, one batch"]
    print(f"| {'way':26} | processor seconds | of probekit's | peak memory | activations held | largest difference |")
    print("|---|---|---|---|---|---|")
    for way, (seconds, peak, held, images) in results.items():
        median = statistics.median(seconds)
        ratio = statistics.median(seconds) / statistics.median(ours[0])
        difference = (images - ours[3]).abs().max().item()
        assert difference < 1e-3, f"{way} gives other pictures: {difference}"
        print(f"| {way:26} | {median:.2f} | {ratio:.2f} | {peak / 2**20:.0f} MiB | {held / 2**20:.1f} MiB | {difference:.1e} |")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        count, each = pool.apply(operations, (asked.layout, options))
        share = pool.apply(seconds_whole, (asked.layout, options, asked.repeats))
        whole, windowed = pool.apply(operations, (asked.layout, options, WINDOWS))
    later = statistics.mean(each[1:] or each)
    print(f"operations: of {count} rows, {each[0]:.1f} in the first step and {later:.1f} in each later one")
    part = statistics.mean(each) / count
    print(f"of a batch computed whole: {part:.3f} of the operations, {share:.3f} of the denoiser's seconds")
    mean = statistics.mean(windowed)
    print(
        f"four windows beside all steps: {mean:.1f} of {whole} rows, as {mean / count:.2f} sweeps computed whole instead of 5"
    )


if __name__ == "__main__":
    main()
