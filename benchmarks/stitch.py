"""Time the linear maps between all pairs of latent spaces, each with its penalty chosen from ten: probekit and scikit-learn.

    python benchmarks/stitch.py [--samples 9000] [--sizes 64 128 192 3072 3072] [--largest 3072] [--latents a.npy b.npy ...]
                                [--ways probekit scikit-learn] [--repeats 1]

scikit-learn's way is what a careful user writes: for every pair, RidgeCV(alphas) with its defaults. It chooses by the exact
leave-one-out error from one factorization a pair, never refitting; it is its fastest for the task. probekit's way is one
RidgeSolver a source. Both choose one penalty a pair from the same grid, ten from 1e-5 to 1e4 times the mean eigenvalue of the
source's Gram matrix. The choices and maps are checked to be equal.

Every way and repeat runs in a process of its own. Memory is the resident set's peak above what it is with the latents loaded,
as the kernel counts it (Linux). The latents are synthetic: the spaces share factors of variation, each seen through a rotation
of its own with standard deviations that fall as a power, plus values of its own; --latents takes real ones, (n, ...) each, the
same images in the same order. BLAS uses the threads of its environment (OMP_NUM_THREADS).
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from memory import resident, start_peak

# StyleGAN2's w, a VAE's code, a VQ-VAE's grid, Glow's z, a DDPM's inverted noise
SIZES = [64, 128, 192, 3072, 3072]
POWERS = [0.6, 0.3, 0.5, 0.7, 0.2]

Map = tuple[tuple[int, int], float, Any, Any, float]


def synthetic(samples: int, sizes: list[int]) -> list[np.ndarray]:
    """Correlated latents, float32."""
    rng = np.random.default_rng(0)
    factors = rng.standard_normal((samples, 256), dtype=np.float32) * np.arange(1, 257, dtype=np.float32) ** -0.5
    spaces = []
    for size, power in zip(sizes, itertools.cycle(POWERS), strict=False):
        seen = factors @ rng.standard_normal((256, size), dtype=np.float32)
        own = rng.standard_normal((samples, size), dtype=np.float32)
        # a product of reflections: a rotation that costs nothing to make
        latents = (0.3 * seen + own) * np.arange(1, size + 1, dtype=np.float32) ** -power
        for axis in rng.standard_normal((3, size), dtype=np.float32):
            latents -= 2 * np.outer(latents @ axis, axis / (axis @ axis))
        spaces.append(latents + rng.standard_normal(size, dtype=np.float32))
    return spaces


def load(asked: argparse.Namespace) -> list[np.ndarray]:
    """The latents, (n, d) each."""
    if asked.latents:
        spaces = [np.load(path) for path in asked.latents]
        return [latents.reshape(len(latents), -1)[: asked.samples] for latents in spaces]
    return synthetic(asked.samples, [min(size, asked.largest) for size in asked.sizes])


def probekit(spaces: list[np.ndarray]) -> Iterator[Map]:
    """One solver a source."""
    from probekit.latents.maps import LinearMap
    from probekit.latents.ridge import RidgeSolver

    for i, source in enumerate(spaces):
        solver = RidgeSolver(source)
        for j, target in enumerate(spaces):
            if i != j:
                fitted = LinearMap("auto").fit(solver, target)
                yield (i, j), fitted.alpha_, fitted.coef_, fitted.intercept_, fitted.error_


def scikit_learn(spaces: list[np.ndarray]) -> Iterator[Map]:
    """RidgeCV for every pair."""
    from sklearn.linear_model import RidgeCV

    for i, source in enumerate(spaces):
        eigenvalue = len(source) * source.var(axis=0, dtype=np.float64).sum() / min(len(source) - 1, source.shape[1])
        for j, target in enumerate(spaces):
            if i != j:
                fitted = RidgeCV(alphas=np.logspace(-5, 4, 10) * eigenvalue).fit(source, target)
                yield (i, j), fitted.alpha_, fitted.coef_, fitted.intercept_, -fitted.best_score_


WAYS = {"probekit": probekit, "scikit-learn": scikit_learn}


def measure(way: str, asked: argparse.Namespace, folder: str) -> tuple[dict[tuple[int, int], tuple[float, float, float]], int]:
    """(seconds, alpha, error) of every pair, and peak bytes above the latents; the maps go to the folder, outside the timing.

    A source's factorization counts in its first pair.
    """
    import scipy.linalg
    from sklearn.linear_model import RidgeCV

    from probekit.latents.maps import LinearMap

    spaces = load(asked)
    tiny = np.random.default_rng(0).standard_normal((20, 2))
    for estimator in (RidgeCV(), LinearMap("auto")):  # what the first call imports
        estimator.fit(tiny, tiny)
    scipy.linalg.eigh(tiny.T @ tiny)
    before, results = start_peak(), {}
    maps, start = WAYS[way](spaces), time.perf_counter()
    for pair, alpha, coef, intercept, error in maps:
        results[pair] = (time.perf_counter() - start, float(alpha), float(error))
        np.save(Path(folder) / f"{way}-{pair[0]}-{pair[1]}.npy", np.column_stack([coef, intercept]))
        start = time.perf_counter()
    return results, resident("VmHWM") - before


def main() -> None:
    """Measure both, check that the maps are equal, print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=9000)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--largest", type=int, default=max(SIZES), help="cap on the sizes, to scale down")
    parser.add_argument("--latents", type=Path, nargs="+", default=[], help=".npy files instead of synthetic ones")
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=list(WAYS))
    parser.add_argument("--repeats", type=int, default=1)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs: dict[str, list[Any]] = {way: [] for way in asked.ways}
        for _ in range(asked.repeats):
            for way in asked.ways:
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    runs[way].append(pool.apply(measure, (way, asked, folder)))
        pairs = list(runs[asked.ways[0]][0][0])
        shapes = {pair: np.load(Path(folder) / f"{asked.ways[0]}-{pair[0]}-{pair[1]}.npy").shape for pair in pairs}
        print(f"| {'pair':15} |" + "".join(f" {way} seconds |" for way in asked.ways) + " alpha | leave-one-out error |")
        print("|---|" + "---|" * (len(asked.ways) + 2))
        for pair in pairs:
            times = [statistics.median(results[pair][0] for results, _ in runs[way]) for way in asked.ways]
            _, alpha, error = runs[asked.ways[0]][0][0][pair]
            name = f"{pair[0]}: {shapes[pair][1] - 1} -> {pair[1]}: {shapes[pair][0]}"
            print(f"| {name:15} |" + "".join(f" {t:.2f} |" for t in times) + f" {alpha:.3g} | {error:.4g} |")
        totals = {w: statistics.median(sum(s for s, *_ in results.values()) for results, _ in runs[w]) for w in asked.ways}
        print()
        for way in asked.ways:
            peak = max(peak for _, peak in runs[way]) / 2**20
            print(f"{way}: {totals[way]:.2f} s, peak memory {peak:.0f} MiB above the latents")
        if len(asked.ways) == 2:
            worst = 0.0
            for pair in pairs:
                ours, theirs = (np.load(Path(folder) / f"{way}-{pair[0]}-{pair[1]}.npy") for way in asked.ways)
                chosen = [runs[way][0][0][pair][1] for way in asked.ways]
                assert np.isclose(*chosen), f"{pair}: other penalties, {chosen}"
                worst = max(worst, float(np.abs(ours - theirs).max() / np.abs(theirs).max()))
            assert worst < 1e-5, f"other maps: {worst}"
            print(f"scikit-learn takes {totals['scikit-learn'] / totals['probekit']:.1f} times as long")
            print(f"the same penalties; maps differ by {worst:.1e} of their largest value at most")


if __name__ == "__main__":
    main()
