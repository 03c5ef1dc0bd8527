"""Pictures of rows: one call of a diffusers pipeline, in which every row has its own caption and its own noise."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .errors import ProbekitError


def pictures(pipeline: Any, rows: Sequence[Mapping[str, Any]], **options: Any) -> Float[Tensor, "n c h w"]:
    """A picture a row, in [0, 1], float32, on the CPU: what the pipeline gives as `output_type="np"`.

    That is the one output which is the same in all pipelines: "pt" of Kandinsky 2 and 3 and of DeepFloyd IF is what their last
    network gave, in no fixed range, and T2I-Adapter's is no tensor.

    rows: what is particular to each (`stack`). A `generator` draws all noise of its row, that of the scheduler's steps, too.
    options: what all rows share (`num_inference_steps`, …).
    Raises ProbekitError for more than one picture a row, and for what makes no pictures.
    """
    if (images := options.get("num_images_per_prompt", 1)) != 1:
        raise ProbekitError(f"num_images_per_prompt {images}: a row is one picture; give as many rows")
    call = stack(rows)
    with _by_row(pipeline, call.get("generator")), torch.no_grad():
        made = np.asarray(pipeline(**call, **options, output_type="np")[0])
    if made.ndim != 4 or len(made) != len(rows):
        raise ProbekitError(
            f"{type(pipeline).__name__}: it gave an array of shape {made.shape} for {len(rows)} rows, not a picture a row; "
            f"give a text-to-image pipeline"
        )
    return torch.from_numpy(made).float().permute(0, 3, 1, 2)


def stack(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The rows' arguments as one batch: tensors joined along their first dimension, everything else listed.

    Generators are copied, so that rows which share one see the same noise.
    """
    stacked: dict[str, Any] = {}
    for row in rows[1:]:
        if differ := sorted(set(row) ^ set(rows[0])):
            raise ProbekitError(f"original and edit must have the same arguments: only one of them has {', '.join(differ)}")
    for key in rows[0]:
        values = [row[key] for row in rows]
        if isinstance(values[0], Tensor):
            shapes = {tuple(v.shape[1:]) for v in values}
            if len(shapes) > 1:
                raise ProbekitError(f"{key} of original and edit differ in shape: {' and '.join(map(str, sorted(shapes)))}")
            stacked[key] = torch.cat(values)
        elif isinstance(values[0], torch.Generator):
            stacked[key] = [_copy(generator) for generator in values]
        else:
            stacked[key] = values
    return stacked


def _copy(generator: torch.Generator) -> torch.Generator:
    twin = torch.Generator(generator.device)
    twin.set_state(generator.get_state())
    return twin


@contextlib.contextmanager
def _by_row(pipeline: Any, generators: Sequence[torch.Generator] | None) -> Iterator[None]:
    """What pipelines do for a batch as a whole, or by the clock, is done for each row, so that equal rows stay equal.

    The noise of a scheduler's steps: pipelines of flow models do not hand generators on, and DPM-Solver SDE has a Brownian path
    of its own. The codes of control pictures: ControlNets of SD3 and HunyuanDiT sample them. The time: under guidance PRX's
    pipeline tells two of them, whatever the batch.
    """
    with contextlib.ExitStack() as undone:
        if type(pipeline).__name__ == "PRXPipeline":
            undone.callback(pipeline.transformer.register_forward_pre_hook(_a_time_a_row, with_kwargs=True).remove)
        if generators is not None:
            _draw_steps(pipeline.scheduler, generators, undone)
            if (vae := getattr(pipeline, "vae", None)) is not None:
                _draw_codes(vae, generators, undone)
        yield


def _a_time_a_row(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    rows, times = len(kwargs["hidden_states"]), kwargs["timestep"]
    return args, kwargs | {"timestep": times.repeat_interleave(rows // len(times))}


def _draw_steps(scheduler: Any, generators: Sequence[torch.Generator], undone: contextlib.ExitStack) -> None:
    step, signature = scheduler.step, inspect.signature(scheduler.step)

    @functools.wraps(step)
    def told(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        if given.get("generator") is None and len(given["sample"]) == len(generators):
            kwargs["generator"] = generators
        return step(*args, **kwargs)

    if "generator" in signature.parameters:
        scheduler.step = told
        undone.callback(delattr, scheduler, "step")
    if hasattr(scheduler, "noise_sampler_seed"):
        undone.callback(setattr, scheduler, "noise_sampler_seed", scheduler.noise_sampler_seed)
        scheduler.noise_sampler_seed = [generator.initial_seed() for generator in generators]


def _draw_codes(vae: Any, generators: Sequence[torch.Generator], undone: contextlib.ExitStack) -> None:
    encode = vae.encode

    @functools.wraps(encode)
    def told(*args: Any, **kwargs: Any) -> Any:
        made = encode(*args, **kwargs)
        codes = getattr(made, "latent_dist", None)
        if codes is not None and len(codes.parameters) % len(generators) == 0:
            # guidance encodes each picture twice, and the picture's own noise must not depend on that
            of_rows = [_copy(g) for _ in range(len(codes.parameters) // len(generators)) for g in generators]
            codes.sample = functools.partial(_sample, codes.sample, of_rows)
        return made

    vae.encode = told
    undone.callback(delattr, vae, "encode")


def _sample(draw: Any, of_rows: list[torch.Generator], generator: Any = None) -> Tensor:
    return draw(of_rows if generator is None else generator)
