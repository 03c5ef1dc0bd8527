"""The loop that trains every zoo model: seeded, resumable after a kill, with progress and expected time."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from probekit.files import remove, whole_file
from probekit.hooks.errors import ProbekitError
from probekit.locks import Lock
from probekit.progress import progress, telling
from probekit.seeds import numbered

Loss = Callable[[nn.Module, torch.Generator], tuple[Tensor, dict[str, float]]]
"""One training step's loss of a module: draws its own batch from the generator; also returns numbers to show."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train. AdamW, linear warm-up, cosine decay to zero, exponential moving average.

    The rate is whole from the `warmup`th step to the `hold`th and decays from there.

    `ema` is the averaging constant at its end; it rises as (1 + step) / (10 + step) before.
    `clip` bounds the gradient's norm over all weights. `betas` are AdamW's.
    With `bfloat16` the forward and backward pass run in bfloat16 on a copy, the weights that are updated stay float32.
    """

    steps: int
    learning_rate: float
    warmup: int = 100
    weight_decay: float = 0.01
    ema: float = 0.999
    bfloat16: bool = False
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.99)
    hold: int = 0

    def factor(self, step: int) -> float:
        """The learning rate at a step, as a fraction of `learning_rate`."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        start = max(self.warmup, self.hold)
        return 0.5 * (1 + math.cos(math.pi * max(0, step - start) / max(1, self.steps - start)))


def train(
    module: nn.Module,
    loss: Loss,
    schedule: Schedule,
    *,
    checkpoint: Path,
    seed: int = 0,
    title: str = "",
    save_every_seconds: float = 120.0,
    snapshots: Mapping[int, Callable[[nn.Module], None]] | None = None,
) -> nn.Module:
    """Train `module` in place and return it with its averaged weights.

    snapshots: for some numbers of finished steps, what to do with a copy that has the averaged weights at that moment.

    Batch and noise of step s come from a generator seeded with (seed, s) alone, and the checkpoint holds all else that the
    next step depends on: weights, optimizer, average, torch's own random numbers, and with how many threads sums are made. So
    a run that was killed and started again from `checkpoint` ends with the weights of an uninterrupted one (same machine).
    The checkpoint is replaced atomically every `save_every_seconds`.

    Raises ProbekitError for a checkpoint of another training, a damaged one, and one that another process trains on.
    """
    with Lock(checkpoint.parent / "locks" / checkpoint.name) as lock:
        if not lock.take():
            who = lock.holder or "another process"
            raise ProbekitError(f"checkpoint {str(checkpoint)!r}: {who}; wait until it has ended, or name other --checkpoints")
        for left in checkpoint.parent.glob(f"{checkpoint.name}.*.partial"):
            remove(left)
        return _train(module, loss, schedule, checkpoint, seed, title, save_every_seconds, snapshots or {})


def _train(
    module: nn.Module,
    loss: Loss,
    schedule: Schedule,
    checkpoint: Path,
    seed: int,
    title: str,
    save_every_seconds: float,
    snapshots: Mapping[int, Callable[[nn.Module], None]],
) -> nn.Module:
    """`train`, by the one process that may."""
    parameters: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
    worker = module
    if schedule.bfloat16:  # channels_last is up to twice as fast on CPUs with bfloat16 instructions
        worker = copy.deepcopy(module).bfloat16().to(memory_format=torch.channels_last)
    worker_parameters: list[Tensor] = [p for p in worker.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(
        parameters, lr=schedule.learning_rate, weight_decay=schedule.weight_decay, betas=schedule.betas, fused=True
    )
    first = 0
    if checkpoint.exists():
        try:
            state = torch.load(checkpoint, weights_only=True)
            if state["seed"] != seed or state["schedule"] != repr(schedule) or state["step"] > schedule.steps:
                told = f"{state['step']} steps, seed {state['seed']} and {state['schedule']}"
                raise ProbekitError(f"checkpoint {str(checkpoint)!r}: of a training with {told}; delete it")
            module.load_state_dict(state["module"])
            optimizer.load_state_dict(state["optimizer"])
            for a, saved in zip(average, state["average"], strict=True):
                a.copy_(saved)
            first = state["step"]
            if state["threads"] != torch.get_num_threads():
                torch.set_num_threads(state["threads"])
                print(f"{title}: goes on with {state['threads']} threads, as it was begun", flush=True)
            torch.set_rng_state(state["random"])
        except ProbekitError:
            raise
        except Exception as error:  # torch raises a dozen kinds for what is no checkpoint, or one of another network
            raise ProbekitError(f"checkpoint {str(checkpoint)!r}: is damaged or of another network; delete it") from error

    def save(step: int) -> None:
        state: dict[str, Any] = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
        state |= {"step": step, "seed": seed, "schedule": repr(schedule)}
        state |= {"threads": torch.get_num_threads(), "random": torch.get_rng_state()}
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(checkpoint) as file:
            torch.save(state, file)

    def kept() -> str:
        if not checkpoint.exists():
            return "interrupted, before anything was kept"
        step = torch.load(checkpoint, weights_only=True, mmap=True)["step"]
        return f"interrupted: {step} of {schedule.steps} steps are kept in {checkpoint}; the same command goes on from there"

    worker.train()
    saved_at = time.monotonic()
    with telling(kept), progress(title, schedule.steps, first) as advance:
        for step in range(first, schedule.steps):
            if worker is not module:
                torch._foreach_copy_([p.data for p in worker_parameters], parameters)
            generator = numbered(seed, step)
            value, shown = loss(worker, generator)
            torch.autograd.backward(value)
            if worker is not module:
                for p, w in zip(parameters, worker_parameters, strict=True):
                    # in the layout of p: the fused optimizer takes both for the same and would mix up values
                    p.grad = None if w.grad is None else torch.empty_like(p).copy_(w.grad)
                    w.grad = None
            nn.utils.clip_grad_norm_(parameters, schedule.clip)
            for group in optimizer.param_groups:
                group["lr"] = schedule.learning_rate * schedule.factor(step)
            optimizer.step()
            optimizer.zero_grad()
            decay = min(schedule.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
            said = "  ".join(f"{key} {number:.4f}" for key, number in {"loss": value.item(), **shown}.items())
            advance(1, said)
            if step % 100 == 99:
                print(f"{title} step {step + 1}: {said}", flush=True)  # stands above the bar, and in a log
            if step + 1 in snapshots:
                snapshots[step + 1](_averaged(module, parameters, average))
            if time.monotonic() - saved_at > save_every_seconds:
                save(step + 1)
                saved_at = time.monotonic()
    save(schedule.steps)
    with torch.no_grad():
        for p, a in zip(parameters, average, strict=True):
            p.copy_(a)
    return module.eval()


def _averaged(module: nn.Module, parameters: list[Tensor], average: list[Tensor]) -> nn.Module:
    """A copy of `module` with the averaged weights."""
    twins = {id(p): nn.Parameter(a.clone()) for p, a in zip(parameters, average, strict=True)}
    return copy.deepcopy(module, memo=dict(twins)).eval()
