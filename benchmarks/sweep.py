"""Time one full sweep of mini-sd three ways: probekit's one batch, plain nnsight, and the papers' capture-then-inject.

    python benchmarks/sweep.py [--steps 20] [--guidance 3] [--repeats 3]

Every way runs in a process of its own, on the same pair, layers and steps; the pictures are checked to be equal. Memory is the
resident set's peak above what the loaded and warmed-up model takes, as the kernel counts it (Linux), and, apart from it, the
activations that are held from one denoiser call to another.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from memory import resident, start_peak

if TYPE_CHECKING:
    from probekit.models import Model

ORIGINAL = "a small white moon at the right on a dotted green ground"
EDIT = "a large red fish at the top left on a striped blue ground"


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
        with torch.no_grad(), traced.generate(**rows, **options, output_type="pt") as tracer:
            for _ in tracer.iter[: options["num_inference_steps"]]:
                output = hooks.layer(traced.unet, name).output
                tensor = output[0] if "attentions" in name else output
                tensor[1] = tensor[0]
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


WAYS: dict[str, Callable[..., tuple[torch.Tensor, int]]] = {
    "probekit, one batch": one_batch,
    "nnsight, a trace a layer": nnsight,
    "capture, then inject": capture_then_inject,
}


def measure(way: str, options: dict[str, Any], repeats: int) -> tuple[list[float], int, int, torch.Tensor]:
    """Seconds of every repeat, peak bytes above the loaded model, bytes held, and the pictures."""
    from probekit import hooks, load

    model = load("mini-sd", device="cpu")
    layers = [la.name for la in hooks.select(model.layers, hooks.default_layers(model.denoiser))]
    model.painter.generate([ORIGINAL, EDIT], [0, 0], **options | {"num_inference_steps": 1})
    before = start_peak()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        images, held = WAYS[way](model, layers, options)
        seconds.append(time.perf_counter() - start)
    return seconds, resident("VmHWM") - before, held, images.clone()


def main() -> None:
    """Measure every way and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    options = {"num_inference_steps": asked.steps, "guidance_scale": asked.guidance}
    results = {}
    for way in WAYS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            results[way] = pool.apply(measure, (way, options, asked.repeats))
    ours = results["probekit, one batch"]
    print(f"| {'way':26} | median seconds | of probekit's | peak memory | activations held | largest difference |")
    print("|---|---|---|---|---|---|")
    for way, (seconds, peak, held, images) in results.items():
        median = statistics.median(seconds)
        ratio = statistics.median(seconds) / statistics.median(ours[0])
        difference = (images - ours[3]).abs().max().item()
        assert difference < 1e-3, f"{way} gives other pictures: {difference}"
        print(f"| {way:26} | {median:.2f} | {ratio:.2f} | {peak / 2**20:.0f} MiB | {held / 2**20:.1f} MiB | {difference:.1e} |")


if __name__ == "__main__":
    main()
