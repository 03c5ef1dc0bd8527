"""The sweep: edit images E and many copies of an original O in one batch, each copy injected by its own rule."""

from __future__ import annotations

import base64
import contextlib
import gc
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from .architectures import Layer, layers
from .errors import ProbekitError
from .injections import Injection, inject
from .pictures import pictures
from .rows import needed

DENOISER_NAMES = ("unet", "transformer", "decoder")
"""The components that may be a pipeline's denoiser; Stable Cascade's decoder is a U-Net."""

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
"""The components whose layers are named with the component's name before them."""


@dataclass(frozen=True, eq=False)
class Swept:
    """edit: the picture of E; others: those of other donors; images: of every rule, in order. Values in [0, 1], on the CPU."""

    edit: Float[Tensor, "c h w"]
    others: Float[Tensor, "others c h w"]
    images: Float[Tensor, "rules c h w"]

    def _repr_html_(self) -> str:
        """E, then the picture of every rule in order, for a notebook. Values below 0 are taken for those of [-1, 1]."""
        signed = min(float(images.min()) for images in (self.edit, self.images) if images.numel()) < 0
        named = [("E", self.edit), *((str(number), image) for number, image in enumerate(self.images))]
        return "".join(
            f"<figure style='display: inline-block; margin: 2px; text-align: center'><img src='{_url(image, signed)}' "
            f"style='height: 96px; image-rendering: pixelated'><figcaption>{name}</figcaption></figure>"
            for name, image in named
        )


def _url(image: Tensor, signed: bool) -> str:
    """A picture inside a page, as PNG."""
    values = (image + 1) / 2 if signed else image
    pixels = (values.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def denoiser(pipeline: Any) -> nn.Module:
    """The U-Net or transformer of a diffusers pipeline. Raises ProbekitError when it has neither."""
    for name in DENOISER_NAMES:
        if isinstance(found := getattr(pipeline, name, None), nn.Module):
            return found
    raise ProbekitError(f"{type(pipeline).__name__} has neither a unet nor a transformer nor a decoder")


def text_layers(pipeline: Any) -> list[Layer]:
    """The layers of a pipeline's text encoders, `text_encoder.encoder.layers.3`, in execution order; orders are below zero.

    A component whose blocks are not known has none.
    """
    found: list[Layer] = []
    for name in TEXT_ENCODERS:
        if isinstance(encoder := getattr(pipeline, name, None), nn.Module):
            with contextlib.suppress(ProbekitError):
                for layer in layers(encoder):
                    inside = layer.inside and f"{name}.{layer.inside}"
                    found.append(replace(layer, name=f"{name}.{layer.name}", inside=inside))
    whole = sum(layer.inside is None for layer in found)
    return [replace(layer, order=order - whole) for layer, order in zip(found, _orders(found), strict=True)]


def _orders(found: Sequence[Layer]) -> list[float]:
    """The orders of the layers of several encoders, one after the other."""
    orders, before = [], 0
    for i, layer in enumerate(found):
        if i and layer.order < found[i - 1].order:
            before += int(found[i - 1].order) + 1
        orders.append(before + layer.order)
    return orders


def sweep(
    pipeline: Any,
    *,
    original: Mapping[str, Any],
    edit: Mapping[str, Any],
    rules: Sequence[Sequence[Injection]],
    others: Sequence[Mapping[str, Any]] = (),
    batch_size: int | None = None,
    on_batch: Callable[[int], None] = lambda rules: None,
    **options: Any,
) -> Swept:
    """Run a diffusers pipeline over rows [E, *others, O, O, …], a copy of O for each of `rules`, injected by it.

    What is overwritten, read by nobody or the same in several rows is computed once or not at all (`rows.needed`).

    original, edit, others: what is particular to a row, as arguments of the pipeline: a prompt, embeddings with a leading
        dimension of 1, a `generator` (copied for every row, so that each sees the same noise).
    rules: the injections of each copy of O, whose source row 0 is E and row k the k-th of `others`; an empty rule gives O
        itself. Layers of text encoders (`text_layers`) can be injected where rows are prompts, not embeddings.
    batch_size: rows at a time, E and the others included (default: all). Every batch makes E anew; the result is the same up
        to the rounding of differently shaped batches. Where memory does not suffice for it, half of it is taken.
    on_batch: called after every batch with the number of rules it finished.
    options: what all rows share (`num_inference_steps`, `guidance_scale`, …).
    """
    donors = [edit, *others]
    size = len(rules) + len(donors) if batch_size is None else batch_size
    if size <= len(donors):
        raise ProbekitError(f"batch size {size}: a sweep needs at least {len(donors) + 1} rows, the donors and one copy of O")
    of_donors: Tensor | None = None
    images: list[Tensor] = []
    while of_donors is None or len(images) < len(rules):
        part = rules[len(images) : len(images) + size - len(donors)]
        try:
            made = injected(pipeline, [*donors, *[original] * len(part)], [*[()] * len(donors), *part], **options)
        except (MemoryError, RuntimeError) as error:
            if not _is_full(error):
                raise
            if len(part) < 2:
                raise ProbekitError(
                    f"batch size {size}: memory does not suffice for {len(donors) + len(part)} rows "
                    f"({' '.join(str(error).split())[:80]}); half precision (dtype) or offloading need less"
                ) from error
            made = None  # what the error's traceback holds is given back only where the error is gone
        if made is None:
            size = len(donors) + len(part) // 2
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        of_donors = made[: len(donors)] if of_donors is None else of_donors
        images += list(made[len(donors) :])
        on_batch(len(part))
    edit_image, rest = of_donors[0], of_donors[1:]
    return Swept(edit_image, rest, torch.stack(images) if images else edit_image.new_zeros(0, *edit_image.shape))


def injected(
    pipeline: Any, rows: Sequence[Mapping[str, Any]], rules: Sequence[Sequence[Injection]], **options: Any
) -> Float[Tensor, "n c h w"]:
    """Pictures of rows in one batch, values in [0, 1], on the CPU: each row is injected by its own rule, or by none (`()`).

    rows: what is particular to each, as arguments of the pipeline. rules: one a row; a source `Row(k)` is the k-th of `rows`.
    options: what all rows share. Raises ProbekitError as `inject`.
    """
    numbered = {row: injections for row, injections in enumerate(rules) if injections}
    of_text: dict[str, dict[int, list[Injection]]] = {}
    of_image: dict[int, list[Injection]] = {}
    for row, injections in numbered.items():
        for injection in injections:
            component, _, name = injection.layer.partition(".")
            if component in TEXT_ENCODERS:
                if "prompt" not in rows[0]:
                    raise ProbekitError(
                        f"layer {injection.layer}: rows are embeddings, which no text encoder runs on; give prompts"
                    )
                of_text.setdefault(component, {}).setdefault(row, []).append(replace(injection, layer=name))
            else:
                of_image.setdefault(row, []).append(injection)
    model = denoiser(pipeline)
    with contextlib.ExitStack() as hooked:
        for component, its in of_text.items():
            hooked.enter_context(inject(getattr(pipeline, component), its, rows=len(rows)))
        clock = hooked.enter_context(inject(model, of_image, schedule=pipeline.scheduler, rows=len(rows)))
        hooked.enter_context(needed(model, of_image, clock))
        return pictures(pipeline, rows, **options)


def _is_full(error: BaseException) -> bool:
    """Whether memory did not suffice; on the CPU torch and oneDNN say so in a RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(said in str(error) for said in ("allocate memory", "bad_alloc", "could not create a primitive"))
