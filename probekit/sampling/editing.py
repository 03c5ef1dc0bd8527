"""Editing an image under another caption without inverting it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from probekit.hooks.errors import ProbekitError
from probekit.sampling.schedule import Schedule, slope, straight
from probekit.sampling.trajectory import Denoiser, States, Trajectory, Walk


@torch.no_grad()
def flow_edit(
    source: Denoiser,
    target: Denoiser,
    start: States,
    schedule: Schedule,
    epsilon: Float[Tensor, "n steps ..."],
    *,
    skipped: int = 0,
) -> Trajectory:
    """FlowEdit (Kulikov et al. 2024, algorithm 1), from images (n, ...) under `source` to such under `target`.

    At every step the image is noised afresh, and what is edited by then moves by the difference of the two velocities, where
    it would be with the same noise. The paper has it for flows; for diffusion it is the same in the coordinates in which its
    ways are straight (`schedule.straight`). epsilon: standard normal, one a step. skipped: the noisiest steps, which are left
    out: n less the paper's n_max; its n_min is 0 and its n_avg 1. Two calls a step. Raises ProbekitError for as many as there
    are steps.
    """
    if not 0 <= skipped < len(schedule):
        raise ProbekitError(f"skipped {skipped}: choose 0 to {len(schedule) - 1}, fewer than the steps")
    kind = schedule.prediction
    of_source, of_target = (Walk(denoiser, start, schedule, ()) for denoiser in (source, target))
    image, drawn = of_source.start, epsilon.to(of_source.start)
    edited = image
    for step in range(skipped, len(schedule)):
        signal, noise = level = schedule.sources[step]
        (scale, now), (_, then) = straight(kind, level), straight(kind, schedule.targets[step])
        noised = signal * image + noise * drawn[:, step]
        moved = noised + scale * (edited - image)
        a, b = slope(kind, level)
        change = a * (moved - noised) + b * (of_target.predict(moved, step) - of_source.predict(noised, step))
        edited = edited + (then - now) * change
    end = of_target.end(edited)
    return Trajectory(end.end, calls=of_source.calls + of_target.calls)
