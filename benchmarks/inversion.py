"""What sampling and inversion cost beyond the network's calls, and what it costs to find every sample's nearest noise.

    python benchmarks/inversion.py [--model avatar-ddpm] [--rows 16] [--steps 20] [--n 2048] [--pixels 3072] [--repeats 5]
    python benchmarks/inversion.py --methods fixed-point,newton [--model mini-flow] [--rows 4] [--steps 50]    # of these alone
    python benchmarks/inversion.py --mapped 50000    # writes two times n * 49,152 bytes, for as long as it takes

Sampling and every inversion are timed against the same number of bare calls of the network on as many rows, in turn, and the
median of the ratios is printed, beside it by how much the way back misses the pictures (root mean square, their mean). Nearest
noises are found in three ways that must agree: by blocks (`geometry.nearest`), by `torch.cdist` in one piece, and by a plain
double loop, on as many rows as it manages in a minute. Each way runs in a process of its own; memory is the resident set's peak
above what it is with the vectors loaded, as the kernel counts it (Linux).
`--mapped` instead finds noises of 3x64x64 among that many in a run's files, as `probekit noise-map run` does, for 2,048 of the
samples, and says the whole process's peak.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from memory import resident, start_peak

LOOP_ROWS = 64  # of the queries, for the double loop; its time for all is this in proportion


def calls(asked: argparse.Namespace) -> None:
    """Seconds of each algorithm, of the bare calls it makes, and their ratio."""
    from probekit import load, seeds
    from probekit.sampling import sample
    from probekit.sampling.inversions import INVERSIONS, noises

    diffusion = load(asked.model, device="cpu").diffusion
    schedule, denoiser = diffusion.schedule(asked.steps), diffusion.denoiser(asked.rows)
    noise = diffusion.noise(range(asked.rows), 0)
    image = sample(denoiser, noise, schedule).end
    ways: dict[str, Callable[[], Any]] = {"sample": lambda: sample(denoiser, noise, schedule)}
    for name, inversion in INVERSIONS.items():
        if (inversion.flows and schedule.prediction != "flow") or (asked.methods and name not in asked.methods.split(",")):
            continue
        fresh = seeds.fresh_noise(noises(name, asked.steps, diffusion.shape), range(asked.rows), 0)
        ways[name] = lambda inversion=inversion, fresh=fresh: inversion.invert(denoiser, image, schedule, fresh, 1)
    print(f"{asked.model}, {asked.rows} rows, {asked.steps} steps\n")
    print("| way | calls | seconds | bare calls | ratio | round trip |\n|---|---|---|---|---|---|")
    for name, way in ways.items():
        made = way()  # and warm
        count, error = made.calls, ""
        if name in INVERSIONS:
            away = INVERSIONS[name].back(denoiser, made.end, schedule).end - image
            error = f"{away.flatten(1).square().mean(1).sqrt().mean():.1e}"
        both = [
            (_timed(way), _timed(lambda count=count: _bare(denoiser, image, schedule, count))) for _ in range(asked.repeats)
        ]
        taken, bare = (statistics.median(times) for times in zip(*both, strict=True))
        ratio = statistics.median(a / b for a, b in both)
        print(f"| {name} | {count} | {taken:.2f} | {bare:.2f} | {ratio:.3f} | {error} |", flush=True)


@torch.no_grad()
def _bare(denoiser: Any, states: torch.Tensor, schedule: Any, count: int) -> None:
    for call in range(count):
        denoiser(states, schedule.timesteps[call % len(schedule)])


def _timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def vectors(n: int, pixels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noises, and samples that each lie near one of them, shrunk."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(n, pixels, generator=generator)
    return 0.3 * noise + 0.5 * torch.randn(n, pixels, generator=generator), noise


def by_blocks(samples: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """probekit's."""
    from probekit.metrics.geometry import nearest

    return nearest(samples, noise)


def by_cdist(samples: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """All distances at once."""
    return torch.cdist(samples, noise).argmin(1)


def by_loop(samples: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """A pair at a time."""
    return torch.tensor([min(range(len(noise)), key=lambda j, s=s: float((s - noise[j]).norm())) for s in samples[:LOOP_ROWS]])


WAYS = {"by blocks": by_blocks, "torch.cdist": by_cdist, "double loop": by_loop}


def measure(way: str, n: int, pixels: int) -> tuple[float, int, list[int]]:
    """Seconds, peak bytes above the vectors, and the numbers found."""
    samples, noise = vectors(n, pixels)
    WAYS[way](samples[:8], noise[:8])  # what the first call imports
    before, start = start_peak(), time.perf_counter()
    found = WAYS[way](samples, noise)
    return time.perf_counter() - start, resident("VmHWM") - before, found.tolist()


def mapped(n: int) -> None:
    """Seconds and peak memory of writing noises and samples to a run's files and of finding 2,048 noises among them."""
    from probekit.experiments.denoising import BLOCK
    from probekit.metrics.geometry import margin, nearest
    from probekit.runs.experiment import Work
    from probekit.runs.folder import Run, Stacked

    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder) / "run", "benchmark", {})
        units = [f"samples-{start:07d}" for start in range(0, n, BLOCK)]
        for block, unit in enumerate(units):
            generator = torch.Generator().manual_seed(block)
            noise = torch.randn(min(BLOCK, n - block * BLOCK), 3, 64, 64, generator=generator)
            near = 0.3 * noise + 0.5 * torch.randn(noise.shape, generator=generator)
            run.write(unit, Work(arrays={"noise": noise.numpy(), "states": near.numpy()}))
        noises, samples = (Stacked([run.array(unit, key) for unit in units]) for key in ("noise", "states"))
        asked = min(n, 2048)
        start = time.perf_counter()
        found = nearest(samples[n - asked : n], noises)
        seconds = time.perf_counter() - start
        margin(samples, noises)
    right = float((found == torch.arange(n)[-asked:]).double().mean())
    print(f"{asked:,} samples among {n:,} noises: {seconds:.1f} s, {right:.0%} right; peak {resident('VmHWM') / 2**30:.2f} GiB")


def main() -> None:
    """Both tables, or what `--mapped` asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="avatar-ddpm")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--n", type=int, default=2048)
    parser.add_argument("--pixels", type=int, default=3072)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--methods", default="")
    parser.add_argument("--mapped", type=int)
    asked = parser.parse_args()
    if asked.mapped:
        mapped(asked.mapped)
        return
    calls(asked)
    if asked.methods:
        return
    results = {}
    for way in WAYS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            results[way] = pool.apply(measure, (way, asked.n, asked.pixels))
    found = results["by blocks"][2]
    assert found == results["torch.cdist"][2], "torch.cdist finds other noises"
    assert found[:LOOP_ROWS] == results["double loop"][2], "the double loop finds other noises"
    print(f"\nnearest of {asked.n} noises of {asked.pixels} pixels, for as many samples: all ways find the same\n")
    print("| way | seconds | peak memory above the vectors |\n|---|---|---|")
    for way, (seconds, peak, numbers) in results.items():
        scaled = seconds * asked.n / len(numbers)
        note = "" if len(numbers) == asked.n else f" (from {len(numbers)} rows)"
        print(f"| {way} | {scaled:.2f}{note} | {peak / 2**20:.0f} MiB |")


if __name__ == "__main__":
    main()
