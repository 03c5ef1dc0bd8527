"""DiffuseVAE's checkpoints (Pandey et al. 2022, kpandey008/DiffuseVAE): Lightning's `.ckpt` of either stage, a state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

from probekit.hooks.errors import ProbekitError
from probekit.models.families.vae import VAE, as_model, config_of, read_plan
from probekit.models.formats import Format
from probekit.models.model import Model
from probekit.models.papers.checkpoint import Foreign, allow, tensors

# our argument and the reference's name of it
_STRINGS = {
    "enc_blocks": "enc_block_str",
    "enc_channels": "enc_channel_str",
    "dec_blocks": "dec_block_str",
    "dec_channels": "dec_channel_str",
}


def matches(content: Any) -> bool:
    """Whether what `checkpoint.read` returned holds DiffuseVAE's VAE, in a checkpoint of either stage or as a bare state."""
    return (
        isinstance(content, Mapping)
        and {"enc.in_conv.weight", "enc.mu.weight", "dec.last_conv.weight"} <= _state(content).keys()
    )


def from_diffusevae(content: Mapping[str, Any], name: str) -> Model:
    """The model in a Lightning checkpoint of DiffuseVAE, or in a bare state dict, from what `checkpoint.read` returned.

    The network's plan is taken from `hyper_parameters`, and where they lack it from the tensors (`config_of`). Raises
    ProbekitError where neither tells it, or tensors are missing or have other shapes.
    """
    state = _state(content)
    try:
        config = _hyper_parameters(content) or _derived(state)
        for option, kinds in (("enc_blocks", "xdt"), ("dec_blocks", "xut")):
            if sum(number for kind, _, number in read_plan(option, config[option], kinds) if kind == "x") > len(state):
                raise ProbekitError(f"{option} {config[option][:80]!r}: has more blocks than the file has tensors")
        network = cast(VAE, allow(lambda: VAE(**config), state))
    except ProbekitError as error:
        raise ProbekitError(f"model {name!r}: {error}") from error
    planned = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    for key in sorted(planned.keys() | found.keys()):
        if planned.get(key) != found.get(key):
            raise ProbekitError(f"model {name!r}: tensor {key!r} is {found.get(key)}, its plan says {planned.get(key)}")
    network.load_state_dict(state)
    return as_model(network.eval(), name)


def _state(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The VAE's tensors under its own names: of a checkpoint or a bare state, and out of a stage-2 model's, under `vae.`."""
    held = content.get("state_dict", content)
    state = tensors(held) if isinstance(held, Mapping) else {}
    inner = {key.removeprefix("vae."): value for key, value in state.items() if key.startswith("vae.")}
    return inner or state


def _derived(state: Mapping[str, Tensor]) -> dict[str, Any]:
    try:
        return config_of(state)
    except ProbekitError as error:
        raise ProbekitError(f"{error}, and hyper_parameters lacks one of {', '.join(_STRINGS.values())}") from error


def _hyper_parameters(content: Mapping[str, Any]) -> dict[str, Any] | None:
    held = content.get("hyper_parameters")
    if isinstance(held, Foreign):  # Lightning's AttributeDict has items, a Namespace a state
        held = held.items or held.state
    if not isinstance(held, Mapping) or not all(isinstance(held.get(theirs), str) for theirs in _STRINGS.values()):
        return None
    config: dict[str, Any] = {ours: held[theirs] for ours, theirs in _STRINGS.items()}
    size = held.get("input_res")
    # without one: the encoder's first step begins at the height of the image
    return config | {
        "input_size": size if isinstance(size, int) else read_plan("enc_blocks", config["enc_blocks"], "xdt")[0][1]
    }


FORMATS = (
    Format(
        "DiffuseVAE's Lightning `.ckpt`",
        lambda place: place.is_file and matches(place.content),
        lambda place: from_diffusevae(place.content, place.name),
    ),
)
