"""Denoisers for `sample` and `invert`: a network with everything but the state and the timestep filled in."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from probekit import hooks
from probekit.sampling.trajectory import Denoiser


def unconditional(unet: Any, told: float = 1.0) -> Denoiser:
    """A diffusers `UNet2DModel`. Channels beyond the state's, a learned variance, are left out.

    told: what the network is told for a timestep of 1; those of 4000 that count to 1000 are told 0.25.
    """

    def predict(states: Tensor, timestep: float) -> Tensor:
        time = torch.tensor(timestep * told, device=unet.device)  # a plain number would be cut to an integer
        return unet(states.to(unet.device, unet.dtype), time).sample[:, : states.shape[1]].to(states)

    return predict


def class_conditional(dit: Any, labels: Int[Tensor, " n"], guidance: float = 1.0) -> Denoiser:
    """A diffusers `DiTTransformer2DModel` for a class a row, with classifier-free guidance (Ho and Salimans 2022).

    guidance: 1 is none; the empty class is the one after the last, as `DiTPipeline` has it.
    """
    empty = torch.full_like(labels, dit.config.num_embeds_ada_norm)
    classes = torch.cat([labels, empty]) if guidance != 1 else labels

    def predict(states: Tensor, timestep: float) -> Tensor:
        rows = torch.cat([states] * (len(classes) // len(labels))).to(dit.device, dit.dtype)
        times = torch.full((len(rows),), timestep, device=dit.device)
        out = dit(rows, timestep=times, class_labels=classes.to(dit.device)).sample[:, : states.shape[1]].to(states)
        if guidance == 1:
            return out
        conditional, unconditional = out.chunk(2)
        return guided(conditional, unconditional, guidance)

    return predict


class _Told(Exception):
    """The pipeline has told its network what it has to tell."""


def captioned(pipeline: Any, rows: Sequence[dict[str, Any]], guidance: float = 1.0, **options: Any) -> Denoiser:
    """The network of a text-to-image pipeline with a caption a row, and classifier-free guidance (Ho and Salimans 2022).

    rows: what the pipeline is called with, a dictionary a row (`Painter.row`). The pipeline is run up to its first call of its
    network, and what it tells that beside the state and the timestep is kept: embeddings, masks, sizes, positions. States are
    latents as the network takes them, Flux's packed into tokens. Where guidance is built into the network (Flux) it is
    `guidance`, too. options: more of the pipeline's.
    """
    network: Any = hooks.denoiser(pipeline)
    told: list[dict[str, Any]] = []

    def listen(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        told.append(hooks.bind(module, args, kwargs).arguments)
        raise _Told  # what the network would answer is not needed

    handle = network.register_forward_pre_hook(listen, with_kwargs=True)
    try:
        with torch.no_grad(), contextlib.suppress(_Told):
            pipeline(**hooks.stack(list(rows)), **options, num_inference_steps=1, guidance_scale=guidance, output_type="latent")
    finally:
        handle.remove()
    itself, state, *_ = call = told[0]  # the state is a U-Net's `sample`, a transformer's `hidden_states`
    del call[itself]
    branches = len(call[state]) // len(rows)
    flux = type(network).__name__.startswith("Flux")  # its pipeline hands it the timestep over 1000
    device = pipeline._execution_device  # where weights are only while they are needed, the network's own is elsewhere

    def predict(states: Tensor, timestep: float) -> Tensor:
        batch = torch.cat([states] * branches).to(device, network.dtype)
        times = torch.full((len(batch),), timestep / 1000 if flux else timestep, device=device)
        out = network(**call | {state: batch, "timestep": times, "return_dict": False})[0]
        out = out[:, : states.shape[1]] if states.ndim == 4 else out
        if branches == 1:
            return out.to(states)
        unconditional, conditional = out.to(states).chunk(2)
        return guided(conditional, unconditional, guidance)

    return predict


def guided(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """unconditional + guidance * (conditional - unconditional)."""
    return unconditional + guidance * (conditional - unconditional)
