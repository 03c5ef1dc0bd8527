"""A generative model, whatever its family: a network, its latent spaces, and where it is one, its denoiser."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from probekit import hooks
from probekit.hooks.errors import ProbekitError
from probekit.latents import LatentSpace
from probekit.models.painter import Painter
from probekit.models.swap import Swap
from probekit.sampling import Diffusion

Maker = Callable[..., LatentSpace]
"""Makes a space from its parameters, which are keyword arguments with defaults; their annotations say what text is read as."""


@dataclass(frozen=True)
class Condition:
    """What a conditional model's images are of. A guidance of None is the model's own."""

    prompt: str | None = None
    label: int | None = None
    guidance: float | None = None

    def then(self, later: Condition) -> Condition:
        """This condition with what a later one says of it changed."""
        said = {key: value for key, value in dataclasses.asdict(later).items() if value is not None}
        return dataclasses.replace(self, **said)


def fixed(*spaces: LatentSpace) -> dict[str, Maker]:
    """The makers of spaces without parameters, by name."""

    def made(space: LatentSpace) -> Maker:
        return lambda: space

    return {space.name: made(space) for space in spaces}


@dataclass(frozen=True, eq=False)
class Model:
    """A network and its latent spaces, the first of which is the default.

    name: how it was asked for. family: vae, vqvae, glow, stylegan2, ddpm, flow (rectified), ldm, dit, text-to-image, random or
    custom. image_size: height and width of its images in pixels, None where any will do. network: the module whose weights
    count, None for a model without any. makers: by name, what makes each of its spaces.

    Where the model has them: process: how noise becomes images and back; paints: how captions become pictures; on: the same
    model under a condition; at_size: the same network for images of another size, of a convolutional one; source: what else
    makes the model what it is, such as a hash of the user's code.
    """

    name: str
    family: str
    image_size: int | None
    network: nn.Module | None = field(repr=False)
    makers: Mapping[str, Maker] = field(repr=False)
    process: Diffusion | None = field(default=None, repr=False)
    paints: Painter | None = field(default=None, repr=False)
    on: Callable[[Condition], Model] | None = field(default=None, repr=False)
    at_size: Callable[[int], Model] | None = field(default=None, repr=False)
    source: str = field(default="", repr=False)

    # --- spaces ----------------------------------------------------------------------------------------------------------

    @cached_property
    def spaces(self) -> dict[str, LatentSpace]:
        """Every space with its default parameters, by name."""
        return {name: self.space(name) for name in self.makers}

    def space(self, spec: str | None = None, *, label: str | None = None, **parameters: Any) -> LatentSpace:
        """The space that `NAME` or `NAME:key=value:key=value` means, or the default one.

        parameters: the same as keyword arguments. label: what to call it in results, by default how it could be asked for.
        Raises ProbekitError, naming what there is, for a space or a parameter that the model does not have, and for a value
        that the parameter cannot take.
        """
        if not self.makers:
            raise self._no_vae()
        spec = spec or next(iter(self.makers))
        name, *given = spec.split(":")
        if name not in self.makers:
            raise ProbekitError(f"model {self.name!r}: no space {name!r}; it has {', '.join(self.makers)}")
        maker = self.makers[name]
        called = label or ":".join([self.name, spec, *(f"{key}={value}" for key, value in parameters.items())])
        arguments = _parameters(called, maker, given, parameters)
        try:
            made = maker(**arguments)
        except ProbekitError as error:
            raise ProbekitError(f"space {called!r}: {str(error).removeprefix(f'model {self.name!r}: ')}") from error
        return dataclasses.replace(
            made,
            model=self.name,
            family=self.family,
            image_size=self.image_size,
            label=called,
            weights=lambda: self.weights,
            made_of={**made.made_of, "networks": self._configs},
        )

    # --- conditions ------------------------------------------------------------------------------------------------------

    def conditioned(self, prompt: str | None = None, label: int | None = None, guidance: float | None = None) -> Model:
        """The same model under a caption or a class, with classifier-free guidance (Ho and Salimans 2022; 1 is none).

        What is not given stays as it is. Raises ProbekitError, naming the option, for a model that takes none, for a class that
        is not there, and for guidance that the model would ignore.
        """
        condition = Condition(prompt, label, guidance)
        if condition == Condition():
            return self
        if self.on is None:
            if prompt is not None:
                raise ProbekitError(f"--prompt {prompt!r}: model {self.name!r} takes none")
            if label is not None or guidance != 1:
                option = f"--guidance {guidance:g}" if label is None else f"--label {label}"
                raise ProbekitError(f"{option}: model {self.name!r} has no classes")
            return self
        return self.on(condition)

    # --- noise and images ------------------------------------------------------------------------------------------------

    @property
    def diffusion(self) -> Diffusion:
        """How noise becomes images and back. Raises ProbekitError for a model that does not go step by step."""
        if self.process is None and self.paints is not None:
            raise self._no_vae()
        if self.process is None:
            raise ProbekitError(f"model {self.name!r}: a {self.family}, which makes no images from noise step by step")
        return self.process

    @property
    def denoiser(self) -> nn.Module:
        """The U-Net or transformer. Raises ProbekitError for a model without one."""
        if self.paints is not None:
            return hooks.denoiser(self.paints.pipeline)
        if self.process is None:
            raise ProbekitError(f"model {self.name!r}: a {self.family}; layers are those of denoisers, U-Nets and transformers")
        return self.process.network

    @cached_property
    def layers(self) -> hooks.Layers:
        """The layers of the text encoders and of the denoiser, in execution order. Raises ProbekitError as `denoiser`."""
        of_text = hooks.text_layers(self.paints.pipeline) if self.paints is not None else []
        return hooks.Layers([*of_text, *hooks.layers(self.denoiser)])

    def _no_vae(self) -> ProbekitError:
        kind = self.paints.kind if self.paints is not None else self.family
        return ProbekitError(f"model {self.name!r}: a {kind}, which has no VAE known to bring images to its latents")

    def denoise_once(self) -> None:
        """Call the denoiser on one picture, for what watches its layers."""
        if self.paints is not None:
            self.paints.denoise_once()
        else:
            self.diffusion.denoise_once()

    # --- captions --------------------------------------------------------------------------------------------------------

    @property
    def painter(self) -> Painter:
        """How captions become pictures. Raises ProbekitError for a model that takes no captions."""
        if self.paints is None:
            raise ProbekitError(f"model {self.name!r}: a {self.family}, which takes no prompt; name a text-to-image model")
        return self.paints

    @property
    def pipeline(self) -> Any:
        """The diffusers pipeline of a text-to-image model. Raises ProbekitError as `painter`."""
        return self.painter.pipeline

    def generate(self, prompts: Sequence[str], noises: Sequence[int], **options: Any) -> Float[Tensor, "n 3 h w"]:
        """`Painter.generate`: pictures of the prompts, each from the noise of that number."""
        return self.painter.generate(prompts, noises, **options)

    def sweep(
        self, original: tuple[str, int], edit: tuple[str, int], rules: Sequence[Sequence[hooks.Injection]], **options: Any
    ) -> hooks.Swept:
        """`Painter.sweep`: one picture a rule, of (prompt, noise's number) O with layers of E."""
        return self.painter.sweep(original, edit, rules, **options)

    def swap(self, original: tuple[str, int | Tensor], edit: tuple[str, int | Tensor], seed: int = 0, **options: Any) -> Swap:
        """O and E, from (prompt, noise's number or latent), and O with layers of E: `swap(rule)`. options: the pipeline's."""
        return Swap(self.painter, original, edit, seed, **options)

    # --- what it is ------------------------------------------------------------------------------------------------------

    @cached_property
    def parameters(self) -> int:
        """The number of weights."""
        return sum(p.numel() for p in self.network.parameters()) if self.network is not None else 0

    @cached_property
    def digest(self) -> str:
        """A fingerprint of the model, 12 hex digits: its weights, what its networks' configs say, and its scheduler's."""
        scheduler = self.paints.pipeline.scheduler if self.paints else self.process.scheduler if self.process else None
        configs = {**self._configs, "scheduler": _told(scheduler)}
        return hashlib.sha256(json.dumps([self.weights, configs], sort_keys=True, default=str).encode()).hexdigest()[:12]

    @cached_property
    def _configs(self) -> dict[str, Any]:
        """What networks are built and scaled by, by their names; it leaves no trace in the weights."""
        found: dict[str, Any] = {}
        for name, module in self.network.named_modules() if self.network is not None else ():
            # a part of a network that has said it all repeats it
            if not any(name.startswith(f"{whole}.") for whole in found) and (told := _told(module)):
                found[name] = told
        return found

    @cached_property
    def weights(self) -> str:
        """A fingerprint of the weights, 12 hex digits: the tensors' names, shapes and values."""
        fingerprint = hashlib.sha256(f"{self.family}{self.source}".encode())
        for key, value in sorted(_values(self.network).items()) if self.network is not None else ():
            fingerprint.update(f"{key}{tuple(value.shape)}".encode() + value.detach().float().cpu().numpy().tobytes())
        return fingerprint.hexdigest()[:12]


def _values(network: nn.Module) -> dict[str, Tensor]:
    """The weights by name, of modules too that have them only while they compute."""
    if not any(p.is_meta for p in network.parameters()):
        return network.state_dict()
    from accelerate.utils.modeling import get_state_dict_offloaded_model

    return get_state_dict_offloaded_model(network)


def _told(part: Any) -> dict[str, Any]:
    """The config of a part of diffusers or transformers, without where it lay and who wrote it; of anything else nothing."""
    config: Any = getattr(part, "config", None)
    if hasattr(config, "to_dict"):
        passing = ("transformers_version", "dtype", "torch_dtype")
        told = {key: value for key, value in config.to_dict().items() if not key.startswith("_") and key not in passing}
    elif isinstance(config, Mapping):
        # diffusers keeps what a file says beyond the class's own arguments, such as another scheduler's
        told = {key: config[key] for key in inspect.signature(type(part)).parameters if key in config}
    else:
        return {}
    return {"class": type(part).__name__, **told}


def _parameters(space: str, maker: Maker, given: Sequence[str], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """A maker's arguments from `key=value` texts and keyword arguments, read as its annotations say."""
    known = inspect.signature(maker, eval_str=True).parameters
    wanted: dict[str, Any] = {}
    for key, value in [*(_pair(space, text) for text in given), *parameters.items()]:
        if key in wanted:
            raise ProbekitError(f"space {space!r}: {key} is given twice")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1) or list(known)
            there = f"it has {', '.join(near)}" if near else "it has none"
            raise ProbekitError(f"space {space!r}: no parameter {key!r}; {there}")
        wanted[key] = _value(space, key, value, str(known[key].annotation))
    return wanted


def _pair(space: str, text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ProbekitError(f"space {space!r}: {text!r} is no key=value")
    return key, value


def _value(space: str, key: str, value: Any, annotation: str) -> Any:
    if value is None or not ("int" in annotation or "float" in annotation):
        return value
    whole = "int" in annotation
    try:
        if whole and isinstance(value, float) and not value.is_integer():
            raise ValueError
        return int(value) if whole else float(value)
    except (TypeError, ValueError) as error:
        needed = "a whole number" if whole else "a number"
        raise ProbekitError(f"space {space!r}: {key} {value!r} is not {needed}") from error
