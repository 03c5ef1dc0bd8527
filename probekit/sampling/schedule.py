"""Which noise levels a sampler steps through, read from a diffusers scheduler, and the arithmetic of one step."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from probekit.hooks.errors import ProbekitError

_PREDICTIONS = ("epsilon", "v_prediction")
_FLOW = "FlowMatchEulerDiscreteScheduler"

Level = tuple[float, float]
"""Signal and noise: a state there is signal * image + noise * epsilon."""


@dataclass(frozen=True)
class Schedule:
    """The steps of a deterministic sampler, from noise to image.

    timesteps: what the network is told at each step, n of them, in its training's units.
    sources, targets: the level at which each step starts and ends. diffusers rounds strides, so that one step may end a
    timestep beside where the next starts; state 0 … n - 1 count as at their step's source, state n, the image, as at the last
    target.
    prediction: what the network predicts: `epsilon`, `v_prediction` (Salimans and Ho 2022) or `flow`, the velocity
    epsilon - image of rectified flow (Liu et al. 2023), whose levels are (1 - sigma, sigma).
    """

    timesteps: tuple[float, ...]
    sources: tuple[Level, ...]
    targets: tuple[Level, ...]
    prediction: str

    @classmethod
    def of(cls, scheduler: Any, steps: int, *, start: int | None = None, tokens: int | None = None) -> Schedule:
        """The schedule that a diffusers scheduler means, in float64.

        Schedulers with betas (DDPM, DDIM, PNDM, Euler, DPM-Solver, …) give DDIM's with eta 0 (Song et al. 2021, equation 12):
        the strides of `DDIMScheduler` with their config, without clipping. `FlowMatchEulerDiscreteScheduler` gives its sigmas.

        start: a timestep, a whole number from 0, from where `steps` even strides lead to the image, instead of the noisiest.
        tokens: the length of Flux's token sequence: its sigmas end at 1 / steps, and may shift with that length.
        Raises ProbekitError, naming the scheduler, for one that cannot be stepped both ways, and for more steps than it has.
        """
        scheduler = reversible({"_class_name": type(scheduler).__name__, **scheduler.config})
        trained = scheduler.config.num_train_timesteps
        check_steps(steps, trained if start is None else start + 1)
        if start is not None:  # as `trailing` spaces the whole schedule; the end, without noise, is before all timesteps
            stops = [round((start + 1) * (steps - i) / steps) - 1 for i in range(steps + 1)]
            return cls._between(scheduler, list(itertools.pairwise(stops)))
        if type(scheduler).__name__ != _FLOW:
            scheduler.set_timesteps(steps)
            return cls._between(scheduler, [(t, t - trained // steps) for t in scheduler.timesteps.tolist()])
        # as FluxPipeline asks for them, which knows the tokens: sigmas from 1 to 1 / steps, and calculate_shift
        options: dict[str, Any] = (
            {"num_inference_steps": steps} if tokens is None else {"sigmas": [1 - i / steps for i in range(steps)]}
        )
        if (config := scheduler.config).use_dynamic_shifting:
            if tokens is None:
                raise ProbekitError(f"scheduler {_FLOW}: shifts with the image's size; tokens are needed")
            slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
            options["mu"] = config.base_shift + slope * (tokens - config.base_image_seq_len)
        # its sigma_min is shifted already: sigmas are read, not computed again
        scheduler.set_timesteps(**options)
        levels = [(1 - sigma, sigma) for sigma in scheduler.sigmas.double().tolist()]
        return cls(tuple(scheduler.timesteps.double().tolist()), tuple(levels[:-1]), tuple(levels[1:]), "flow")

    @classmethod
    def _between(cls, scheduler: Any, strides: list[tuple[int, int]]) -> Schedule:
        sources, targets = (tuple(level_at(scheduler, t) for t in ends) for ends in zip(*strides, strict=True))
        prediction = "flow" if type(scheduler).__name__ == _FLOW else scheduler.config.prediction_type
        return cls(tuple(float(t) for t, _ in strides), sources, targets, prediction)

    def __len__(self) -> int:
        return len(self.timesteps)

    def level(self, state: int) -> Level:
        """Signal and noise of a state, 0 (noise) to n (image)."""
        return self.sources[state] if state < len(self) else self.targets[-1]

    def after(self, step: int) -> Schedule:
        """What is left of the schedule from that step on."""
        return Schedule(self.timesteps[step:], self.sources[step:], self.targets[step:], self.prediction)

    def forward(self, step: int) -> tuple[float, float]:
        """(a, b) of a sampling step: the next state is a * state + b * prediction."""
        return between(self.prediction, self.sources[step], self.targets[step])

    def backward(self, step: int) -> tuple[float, float]:
        """(a, b) of a plain inversion step: state `step` is about a * state `step + 1` + b * prediction at the latter."""
        return between(self.prediction, self.targets[step], self.sources[step])


def between(prediction: str, source: Level, target: Level) -> tuple[float, float]:
    """(a, b) of a step between two noise levels that keeps the image and epsilon that are predicted at the source.

    With them, target = signal' * image + noise' * epsilon: for epsilon equation 12 of Song et al. (2021) with sigma 0, for
    flow Euler's step along the velocity. Linear in the state and the prediction, it is a * state + b * prediction.
    """
    (signal, noise), (signal_, noise_) = source, target
    if prediction == "epsilon":
        return signal_ / signal, noise_ - signal_ * noise / signal
    if prediction == "v_prediction":
        return signal_ * signal + noise_ * noise, noise_ * signal - signal_ * noise
    return 1.0, noise_ - noise


def straight(prediction: str, level: Level) -> tuple[float, float]:
    """(scale, time) of a level: states / scale go straight in time as long as what is predicted stays what it is.

    For diffusion signal and noise / signal, with epsilon as the slope (Song et al. 2021, equation 14), for flow 1 and noise,
    with the velocity. Raises ProbekitError for a level of diffusion without signal.
    """
    signal, noise = level
    if prediction == "flow":
        return 1.0, noise
    if signal == 0:
        raise ProbekitError("schedule: starts without signal, where ways are not straight; another scheduler would do")
    return signal, noise / signal


def slope(prediction: str, level: Level) -> tuple[float, float]:
    """(a, b) of the slope of `straight` at a level: it is a * state + b * prediction."""
    return (level[1], level[0]) if prediction == "v_prediction" else (0.0, 1.0)


def reversible(config: Mapping[str, Any]) -> Any:
    """The scheduler that walks the noise levels of a diffusers scheduler's config both ways.

    A `DDIMScheduler` without clipping or thresholding, which would make steps irreversible, for one with betas; a fresh
    `FlowMatchEulerDiscreteScheduler` for its own. Raises ProbekitError, naming the scheduler, for any other, for one that draws
    noise, and for a network that predicts other than epsilon, velocity or flow.
    """
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    kind = config.get("_class_name")
    if kind == _FLOW:
        for option in ("stochastic_sampling", "invert_sigmas"):
            if config.get(option):
                raise ProbekitError(f"scheduler {kind}: has {option}, which cannot be inverted")
        return FlowMatchEulerDiscreteScheduler.from_config(dict(config))
    if config.get("beta_schedule") is None and config.get("trained_betas") is None:
        raise ProbekitError(f"scheduler {kind}: has no betas; a DDPM or DDIM scheduler or {_FLOW} would do")
    # linspace strides do not meet: neither diffusers' step nor its inverse knows them
    changed = {"timestep_spacing": "leading"} if config.get("timestep_spacing") == "linspace" else {}
    try:
        scheduler = DDIMScheduler.from_config(dict(config), clip_sample=False, thresholding=False, **changed)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ProbekitError(f"scheduler {kind}: makes no DDIM scheduler ({' '.join(str(error).split())[:160]})") from error
    if scheduler.config.prediction_type not in _PREDICTIONS:
        told = scheduler.config.prediction_type
        raise ProbekitError(f"scheduler {kind}: its network predicts {told!r}; {' or '.join(_PREDICTIONS)} would do")
    if scheduler.config.prediction_type == "epsilon" and not scheduler.alphas_cumprod[-1] > 0:
        raise ProbekitError(f"scheduler {kind}: its last timestep has no signal, where predicted epsilon tells of no image")
    return scheduler


def level_at(scheduler: Any, timestep: int) -> Level:
    """Signal and noise at one of a reversible scheduler's timesteps, of the schedule's end for negative ones."""
    if type(scheduler).__name__ == _FLOW:
        sigma = max(timestep, 0) / scheduler.config.num_train_timesteps
        return 1 - sigma, sigma
    abar = float(scheduler.alphas_cumprod[timestep] if timestep >= 0 else scheduler.final_alpha_cumprod)
    return abar**0.5, (1 - abar) ** 0.5


def check_steps(steps: int, most: int) -> None:
    """Raises ProbekitError for other than 1 to `most` steps."""
    if not 1 <= steps <= most:
        raise ProbekitError(f"steps {steps}: choose 1 to {most}, the number of timesteps to go through")
