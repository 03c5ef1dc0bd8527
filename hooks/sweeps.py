"""The sweep: one edit image E and many copies of an original O in one batch, each copy injected by its own rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .errors import ProbekitError
from .injections import Injection, inject
from .rows import needed


@dataclass(frozen=True, eq=False)
class Swept:
    """edit: the picture of E; images: the injected picture of every rule, in order. Values as the pipeline gives them."""

    edit: Float[Tensor, "c h w"]
    images: Float[Tensor, "rules c h w"]


def denoiser(pipeline: Any) -> nn.Module:
    """The U-Net or transformer of a diffusers pipeline. Raises ProbekitError when it has neither."""
    for name in ("unet", "transformer"):
        if isinstance(found := getattr(pipeline, name, None), nn.Module):
            return found
    raise ProbekitError(f"{type(pipeline).__name__} has neither a unet nor a transformer")


def sweep(
    pipeline: Any,
    *,
    original: Mapping[str, Any],
    edit: Mapping[str, Any],
    rules: Sequence[Sequence[Injection]],
    batch_size: int | None = None,
    on_batch: Callable[[int], None] = lambda rules: None,
    **options: Any,
) -> Swept:
    """Run a diffusers pipeline once over rows [E, O, O, …], row k + 1 injected by `rules[k]`, whose source row 0 is E.

    original, edit: what is particular to a row, as arguments of the pipeline: a prompt, embeddings with a leading dimension
        of 1, a `generator` (copied for every row, so that each sees the same noise).
    rules: the injections of each copy of O; an empty rule gives O itself.
    batch_size: rows at a time, E included (default: all). Every batch makes E anew; the result is the same up to the
        rounding of differently shaped batches.
    on_batch: called after every batch with the number of rules it finished.
    options: what all rows share (`num_inference_steps`, `guidance_scale`, …).
    """
    size = len(rules) + 1 if batch_size is None else batch_size
    if size < 2:
        raise ProbekitError(f"batch size {size}: a sweep needs at least 2 rows, E and one copy of O")
    picture_of_e: Tensor | None = None
    images: list[Tensor] = []
    for start in range(0, max(len(rules), 1), size - 1):
        part = rules[start : start + size - 1]
        rows = [edit, *[original] * len(part)]
        numbered = {row: injections for row, injections in enumerate(part, start=1) if injections}
        model = denoiser(pipeline)
        with (
            inject(model, numbered, schedule=pipeline.scheduler, rows=len(rows)) as clock,
            needed(model, numbered, clock),
            torch.no_grad(),
        ):
            made = pipeline(**stack(rows), **options, output_type="pt").images
        picture_of_e = made[0] if picture_of_e is None else picture_of_e
        images += list(made[1:])
        on_batch(len(part))
    assert picture_of_e is not None
    return Swept(picture_of_e, torch.stack(images) if images else picture_of_e.new_zeros(0, *picture_of_e.shape))


def stack(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The rows' arguments as one batch: tensors joined along their first dimension, everything else listed."""
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
