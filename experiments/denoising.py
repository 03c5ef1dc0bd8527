"""What the experiments on noise and samples share: the model with its condition, and its samples from numbered noises."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from probekit.experiments.loading import Dtype, Offload, Variant
from probekit.hooks.errors import ProbekitError
from probekit.runs.experiment import Bench, Experiment, Unit, Work, names, whole_numbers

if TYPE_CHECKING:
    from torch import Tensor

    from probekit.data.dataset import Dataset
    from probekit.models import Model
    from probekit.sampling import Diffusion
    from probekit.sampling.gaussian import Gaussian

BLOCK = 64
"""Noises that a unit of samples starts from."""
SHOWN = 6
"""Pictures that are kept as pictures."""
METHODS = "plain,fixed-point,renoised,edict"
"""The inversions that are compared where nobody says."""
CHOICES = "plain, fixed-point, newton, renoise, renoised, edict, bdia, belm, edit-friendly, rf-solver, fireflow"
"""Every inversion, for the help: `sampling.inversions` needs torch."""
MOMENTS = 2000
"""Training images whose mean and covariance are taken."""


@dataclass(frozen=True, kw_only=True)
class Denoising(Experiment):
    """An experiment on a model that makes images from noise step by step."""

    model: Annotated[str, typer.Option(help="A bundled model, a folder, a hub id, or one of the papers' files.")] = (
        "avatar-ddpm"
    )
    prompt: Annotated[str | None, typer.Option(help="The caption of a text-to-image model's images.")] = None
    label: Annotated[int | None, typer.Option(min=0, help="The class of a DiT's images, by its number.")] = None
    guidance: Annotated[float, typer.Option(min=0, help="Classifier-free guidance; 1 is none, and inversion likes none.")] = 1.0
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of noise, samples and bootstrap.")] = 0
    dtype: Dtype = "auto"
    variant: Variant = None
    offload: Offload = dataclasses.field(default="none", compare=False)
    batch_size: Annotated[int, typer.Option(min=1, max=64, help="How many pictures go through the model at a time.")] = (
        dataclasses.field(default=32, compare=False)
    )

    @property
    def subject(self) -> str:
        """The model's name."""
        return Path(self.model).name

    @functools.cached_property
    def loaded(self) -> Model:
        """The model under its condition. Raises ProbekitError as `probekit.load` and `Model.conditioned`."""
        from probekit.models import load

        model = load(self.model, device=self.device, dtype=self.dtype, variant=self.variant, offload=self.offload)
        return model.conditioned(prompt=self.prompt, label=self.label, guidance=self.guidance)

    @property
    def diffusion(self) -> Diffusion:
        """How its noise becomes images and back. Raises ProbekitError for a model that does not go step by step."""
        return self.loaded.diffusion

    def of_model(self) -> dict[str, Any]:
        """The fingerprint of the model and of what its images are of."""
        return {"model_digest": self.loaded.digest, "made_of": self.diffusion.made_of}

    def sample_units(self, steps: int, n: int) -> list[Unit]:
        """The units of samples from noises 0 … n - 1 in that many steps: arrays `noise` and `states`, no rows."""
        return [Unit(f"samples-{steps}-{start:07d}", min(BLOCK, n - start)) for start in range(0, n, BLOCK)]

    def sample_work(self, unit: Unit, bench: Bench) -> Work:
        """One of `sample_units`."""
        import torch

        from probekit.sampling import sample

        _, steps, start = unit.name.split("-")
        schedule, diffusion = self.diffusion.schedule(int(steps)), self.diffusion
        noise = diffusion.noise(range(int(start), int(start) + unit.size), self.seed)
        made = []
        for part in torch.split(noise, self.batch_size):
            made.append(diffusion.walk(part, lambda denoiser, states: sample(denoiser, states, schedule).end, self.batch_size))
            bench.advance(len(part))
        return Work(arrays={"noise": noise.numpy(), "states": torch.cat(made).numpy()})


@dataclass(frozen=True, kw_only=True)
class Predicting(Denoising):
    """An experiment of whose outcome it is said, too, what the second moments of the training data alone predict."""

    theory: Annotated[
        str | None,
        typer.Option(
            help="Data whose covariance predicts the outcome: avatars, photos, folder:PATH, …, or none. "
            "[default: what a bundled model was trained on]"
        ),
    ] = None

    def of_theory(self) -> dict[str, Any]:
        """The name and the fingerprint of these data; nothing where they are not known."""
        data = self.trained_on
        return {} if data is None else {"theory_data": data.name, "theory_digest": data.digest}

    @functools.cached_property
    def trained_on(self) -> Dataset | None:
        """What is known of what the model was trained on; pictures of one caption or class are no data set's.

        Raises ProbekitError as `load_data`.
        """
        from probekit.bundled import TRAINED_ON
        from probekit.data import load_data

        unconditional = self.prompt is None and self.label is None
        spec = self.theory if self.theory is not None else TRAINED_ON.get(self.model) if unconditional else None
        return None if spec in (None, "none") else load_data(spec, self.diffusion.image_size)

    def predicts(self, method: str, steps: int) -> bool:
        """Whether second moments are known, and say what a method's latents are.

        Not those of methods that draw several noises, nor of second order, which ask between the schedule's levels.
        """
        from probekit.sampling.inversions import INVERSIONS

        inversion = INVERSIONS[method]
        return self.second_moments is not None and inversion.draws(steps) <= 1 and not inversion.flows

    @functools.cached_property
    def second_moments(self) -> Gaussian | None:
        """The mean and covariance of these data, as the network sees them."""
        from probekit.sampling.gaussian import Gaussian

        if self.trained_on is None:
            return None
        return Gaussian.of(self.diffusion.encode(self.trained_on.images(self.trained_on.split("train")[:MOMENTS])))


@dataclass(frozen=True, kw_only=True)
class Inverting(Denoising):
    """An experiment on the latents that inversion gives."""

    steps: Annotated[int, typer.Option(min=1, help="Steps of sampling and of inversion.")] = 50
    renoised: Annotated[
        int | None,
        typer.Option(min=0, help="Steps that renoised replaces by fresh noise. [default: a twentieth, one at least]"),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.renoised is not None and self.renoised > self.steps:
            raise ProbekitError(f"--renoised {self.renoised}: there are {self.steps} steps")

    def inputs(self) -> dict[str, Any]:
        """The model's fingerprint. Raises ProbekitError for what is no schedule of the model's, or no inversion for it."""
        from probekit.sampling.inversions import check_method

        prediction = self.diffusion.schedule(self.steps).prediction
        for name in self.chosen:
            check_method(name, prediction)
        return self.of_model()

    @property
    def chosen(self) -> list[str]:
        """The names of its inversions."""
        raise NotImplementedError

    def images_of(self, data: str) -> Dataset:
        """A data set in the size of the model's images. Raises ProbekitError as `load_data`."""
        from probekit.data import load_data

        return load_data(data, self.diffusion.image_size)


def inversions(text: str, flag: str) -> list[str]:
    """`plain,edict` as the names of inversions. Raises ProbekitError, naming the option, for what is none."""
    from probekit.sampling.inversions import INVERSIONS

    for name in (chosen := names(text, flag)):
        if name not in INVERSIONS:
            raise ProbekitError(f"{flag} {text!r}: inversion {name!r}: choose {', '.join(INVERSIONS)}")
    return chosen


def step_counts(text: str) -> list[int]:
    """`--steps 10,100` as numbers. Raises ProbekitError for what is none."""
    if 0 in (counts := whole_numbers(text, "--steps", "numbers of steps, as 10,100")):
        raise ProbekitError(f"--steps {text!r}: write numbers of steps, as 10,100")
    return sorted(set(counts))


def numbered(prefix: str, pictures: Tensor | Sequence[Tensor], first: int = 0) -> dict[str, Tensor]:
    """Pictures by names such as `sample-0`."""
    return {f"{prefix}-{first + i}": picture for i, picture in enumerate(pictures)}
