"""Properties: how dense, smooth, organized and relevant a latent space is (The Evolving Nature of Latent Spaces, 3)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from probekit.hooks.errors import ProbekitError
from probekit.runs.experiment import Bench, Experiment, Findings, Unit, Work, names

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import torch
    from torch import Tensor

    from probekit.data.dataset import Dataset
    from probekit.latents import LatentSpace
    from probekit.latents.properties import Inputs, Measured
    from probekit.metrics.manifolds import Manifold
    from probekit.metrics.readers import Reading
    from probekit.models import Model
    from probekit.runs.folder import Run

SPACES = ",".join(
    [
        "avatar-gan:w",
        "avatar-vae:mean",
        "avatar-vqvae:grid",
        "avatar-flow:z",
        "avatar-ddpm:noise:steps=10",
        "avatar-ddpm:h:steps=10",
        "mini-sd:noise:steps=10",
        "mini-sd:text:steps=10",
        "mini-sd:text-eos:steps=10",
        "mini-sd:code",
        *(f"mini-sd:h:layer={layer}:steps=10" for layer in ("down_blocks.1", "mid_block", "up_blocks.1")),
    ]
)
"""What figure 4 scores, GAN and VAE beside it, and the other families."""

REAL = 1000
"""Real pictures, at most, between which those of a space are looked for."""
FITTED = 256
"""Codes, at most, of whose mean and covariance a Gaussian is."""
SHOWN = 4
"""Codes, pairs and swaps that are kept as pictures."""
PATCH = 4
"""Pixels of a side of the patches that a picture is cut into that is destroyed."""


@dataclass(frozen=True, kw_only=True)
class PropertiesRun(Experiment):
    """Measure how dense, smooth, organized and relevant latent spaces are, as figure 4 of The Evolving Nature scores them."""

    name: ClassVar[str] = "properties-run"

    spaces: Annotated[
        str,
        typer.Option(help="Models, MODEL:SPACE or MODEL:SPACE:key=value, separated by commas; file.py:Class for one's own."),
    ] = SPACES
    data: Annotated[
        str,
        typer.Option(
            help="avatars, scenes, photos, celeba:PATH, folder:PATH or a folder; auto: what each bundled model was trained on."
        ),
    ] = "auto"
    n: Annotated[
        int, typer.Option("--n", min=8, max=1000, help="Codes of each space; half as many paths between two of them.")
    ] = 32
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of noise, samples, pairs and swaps.")] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        names(self.spaces, "--spaces")

    @property
    def subject(self) -> str:
        """The data set's name, or that each model has its own."""
        return Path(self.data).name if self.data != "auto" else "spaces"

    # --- what takes part --------------------------------------------------------------------------------------------------

    @functools.cached_property
    def loaded(self) -> dict[str, tuple[Model, LatentSpace]]:
        """The spaces with their models, by how they were asked for. Raises ProbekitError as `load_spaces`, and for a space
        that there are no codes of."""
        from probekit.models import load_with_models

        found = load_with_models(names(self.spaces, "--spaces"), device=self.device)
        for _, space in found:
            if space.encoder is None and space.sampler is None:
                raise ProbekitError(f"--spaces: {space} can neither encode nor sample, so that there are no codes of it")
        return {str(space): (model, space) for model, space in found}

    def data_of(self, model: Model) -> Dataset:
        """The pictures that a model's are held against, in its size. Raises ProbekitError where nobody says which, and for less
        than there must be."""
        from probekit.bundled import TRAINED_ON
        from probekit.data import load_data

        if self.data == "auto" and model.name not in TRAINED_ON:
            raise ProbekitError(f"--data auto: model {model.name!r} does not ship; name the pictures that it was trained on")
        spec = TRAINED_ON[model.name] if self.data == "auto" else self.data
        size = model.image_size or 32
        if (spec, size) not in self._data:
            made = self._data[spec, size] = load_data(spec, size)
            if len(made.split("test")) < 2 * self.n:
                raise ProbekitError(
                    f"--n {self.n}: {made.name} has {len(made.split('test'))} images to test on, twice --n are needed"
                )
        return self._data[spec, size]

    @functools.cached_property
    def _data(self) -> dict[tuple[str, int], Dataset]:
        return {}

    def inputs(self) -> dict[str, Any]:
        """The fingerprints of spaces and images, and the unit in which each space is held against its model's other inputs."""
        sets = {str(space): self.data_of(model) for model, space in self.loaded.values()}
        for _, space in self.loaded.values():
            if space.takes == "captions":
                sets[str(space)].captions([0])  # refuses a data set without
        return {
            "spaces": {str(space): f"{space.family} {space.name} {space.digest}" for _, space in self.loaded.values()},
            "data_digest": {data.name: data.digest for data in sets.values()},
            "swaps": {str(pair[1]): self._swap_unit(*pair) for pair in self.loaded.values() if pair[1].decoder is not None},
        }

    # --- units ------------------------------------------------------------------------------------------------------------

    def plan(self) -> list[Unit]:
        """For each space one of what its codes decode to, then one of its inputs, which spaces of one model may share."""
        from probekit.latents import properties

        units: dict[str, Unit] = {}
        for model, space in self.loaded.values():
            size = (len(properties.STRENGTHS) + 1) * self.n + (properties.POINTS + 2) * (self.n // 2)
            units[str(space)] = Unit(str(space), size, group=model.name)
            if space.decoder is not None:
                inputs = self._inputs_of(model, space)
                size = (2 + (len(inputs.names) if len(inputs.names) > 1 else 0)) * self.n
                units[self._swap_unit(model, space)] = Unit(self._swap_unit(model, space), size, group=model.name)
        return list(units.values())

    def work(self, unit: Unit, bench: Bench) -> Work:
        """A space's density, smoothness and organization, or the relevance of a model's inputs.

        A row a number: space, property, measure, of what it is taken, by which features or factor (`by`), its value, its 95%
        interval where it has one, over how many pictures, pairs or draws, and a note. A space that cannot decode has
        organization alone, and a note that says so.
        """
        if unit.name in self.loaded:
            return _Look(self, *self.loaded[unit.name], bench).work()
        members = [pair for pair in self.loaded.values() if self._swap_unit(*pair) == unit.name]
        return self._swap(members, bench)

    def findings(self, run: Run, rows: pd.DataFrame) -> Findings:
        """Figure 4, measured."""
        from probekit.report.properties import findings

        return findings(run, rows)

    # --- relevance --------------------------------------------------------------------------------------------------------

    def _inputs_of(self, model: Model, space: LatentSpace) -> Inputs:
        """What a space's pictures are made of. Nothing is drawn or encoded before they are painted."""
        from probekit.latents.properties import Inputs
        from probekit.models import inputs

        data = self.data_of(model)
        numbers = data.split("test")[: 2 * self.n]
        if space.name in (known := inputs.names(model)):
            steps = space.parameters["steps"]
            try:
                captions = data.captions(numbers)
            except ProbekitError:
                return Inputs((space.name,), self._decoded(space, data, numbers), "its caption is fixed, the data has none")
            return dataclasses.replace(inputs.inputs(model, captions, steps=steps, seed=self.seed), names=known)
        fixed = "its model's caption is fixed" if known and "condition" in space.made_of else ""
        if space.around is not None:
            images = functools.cache(lambda: data.images(numbers))
            codes = functools.cache(lambda: self.codes(space, data, numbers))

            def paint(drawn: Mapping[str, Sequence[int]]) -> Tensor:
                return space.decode(codes()[drawn[space.name]], rest_of=images()[drawn["the rest"]])

            return Inputs((space.name, "the rest"), paint, fixed)
        return Inputs((space.name,), self._decoded(space, data, numbers), fixed)

    def _decoded(self, space: LatentSpace, data: Dataset, numbers: np.ndarray) -> Any:
        codes = functools.cache(lambda: self.codes(space, data, numbers))
        return lambda drawn: space.decode(codes()[list(drawn[space.name])])

    def _swap_unit(self, model: Model, space: LatentSpace) -> str:
        from probekit.models import inputs

        if space.name in inputs.names(model):
            return f"relevance in {model.name} of {space.parameters['steps']} steps"
        return f"relevance in {space}"

    def _swap(self, members: Sequence[tuple[Model, LatentSpace]], bench: Bench) -> Work:
        """The Sobol indices of what one model's pictures are made of: rows for each of the spaces among them."""
        import torch

        from probekit.latents import properties
        from probekit.metrics import lpips

        model, first = members[0]
        reading, inputs = self.reading(model), self._inputs_of(model, first)
        swapped = properties.swaps(dataclasses.replace(inputs, paint=_counted(inputs.paint, bench)), self.n)
        sees: dict[str, properties.See] = {"picture": lpips.embedded, "pixels": lambda images: images.flatten(1)}
        if reading is not None:

            def as_vectors(factors: Sequence[str]) -> properties.See:
                def see(images: Tensor) -> Tensor:
                    read = reading.read(images)
                    return torch.cat([properties.as_vectors(read[f], reading.values[f]) for f in factors], 1)

                return see

            sees["all factors"] = as_vectors(list(reading.values))
            sees |= {factor: as_vectors([factor]) for factor in reading.values}
        told: list[dict[str, Any]] = []
        for by, see in sees.items():
            found = properties.relevance(swapped, see)
            for _, space in members:
                for name, indices in found.items():
                    for measure, value in indices.items():
                        told.append(row(space, "relevance", measure, name, by, value, note=inputs.fixed))
        pictures = {f"swap-{i}-a": swapped.a[i] for i in range(SHOWN)} | {f"swap-{i}-b": swapped.b[i] for i in range(SHOWN)}
        if len(inputs.names) > 1:
            for number, made in enumerate(swapped.swapped.values()):
                pictures |= {f"swap-{i}-{number}": made[i] for i in range(SHOWN)}
        return Work(told, pictures)

    # --- what both kinds of units need ------------------------------------------------------------------------------------

    def codes(self, space: LatentSpace, data: Dataset, numbers: np.ndarray) -> Tensor:
        """Codes of images or captions of those numbers; of a space that cannot encode as many draws of its prior."""
        import torch

        from probekit.seeds import named

        generator = named("properties", space.name, self.seed)
        if space.encoder is None:
            return space.sample(len(numbers), generator)
        parts = [numbers[i : i + 64] for i in range(0, len(numbers), 64)]
        items = [data.captions(part) if space.takes == "captions" else data.images(part) for part in parts]
        return torch.cat([space.encode(part, generator) for part in items])

    def real(self, data: Dataset) -> Manifold:
        """Where real pictures lie, those that models were trained on, by LPIPS' AlexNet.

        By the readers' features, which have seen clean pictures only, nine of ten destroyed ones lie there, too.
        """
        from probekit.metrics.distributions import alexnet_features
        from probekit.metrics.manifolds import Manifold

        if data.digest not in self._real:
            images = data.images(data.split("train")[:REAL])
            self._real[data.digest] = Manifold(alexnet_features(images).double().numpy())
        return self._real[data.digest]

    @functools.cached_property
    def _real(self) -> dict[str, Manifold]:
        return {}

    def reading(self, model: Model) -> Reading | None:
        """How factors are read off the pictures, of data whose factors are known."""
        from probekit.metrics.readers import reading

        return reading(self.data_of(model).name)


def row(
    space: LatentSpace, prop: str, measure: str, of: str, by: str, value: Measured | float, *, note: str = ""
) -> dict[str, Any]:
    """A row of the results."""
    from probekit.latents.properties import NOT_TOLD

    told = dataclasses.replace(NOT_TOLD, value=value) if isinstance(value, float) else value
    return {"space": str(space), "property": prop, "measure": measure, "of": of, "by": by, **vars(told), "note": note}


def _counted(paint: Any, bench: Bench) -> Any:
    """The same, moving the progress bar."""

    def painted(numbers: Mapping[str, Sequence[int]]) -> Tensor:
        pictures = paint(numbers)
        bench.advance(len(pictures))
        return pictures

    return painted


@dataclass(frozen=True, eq=False)
class _Look:
    """One space's codes, looked at in every way but as a part of its model."""

    experiment: PropertiesRun
    model: Model
    space: LatentSpace
    bench: Bench
    rows: list[dict[str, Any]] = field(default_factory=list)
    pictures: dict[str, Tensor] = field(default_factory=dict)

    def work(self) -> Work:
        """Density, smoothness and organization."""
        numbers = self.data.split("test")[: self.experiment.n]
        codes = self.experiment.codes(self.space, self.data, numbers)
        if self.space.decoder is None:
            self.organization(codes, None, numbers)
            for prop in ("density", "smoothness", "relevance"):
                self.rows.append(row(self.space, prop, "", "", "", float("nan"), note="cannot decode"))
            return Work(self.rows)
        own = self.density(codes, numbers)
        self.smoothness(codes)
        self.organization(codes, own, numbers)
        return Work(self.rows, self.pictures)

    @functools.cached_property
    def data(self) -> Dataset:
        return self.experiment.data_of(self.model)

    @functools.cached_property
    def reading(self) -> Reading | None:
        return self.experiment.reading(self.model)

    def decode(self, codes: Tensor) -> Tensor:
        """The pictures, moving the progress bar."""
        import torch

        made = []
        for part in torch.split(codes, 50):
            made.append(self.space.decode(part))
            self.bench.advance(len(part))
        return torch.cat(made)

    def add(self, prop: str, told: Mapping[str, Measured], of: str, by: str = "") -> None:
        """Rows of several numbers."""
        self.rows.extend(row(self.space, prop, measure, of, by, value) for measure, value in told.items())

    def where(self, pictures: Tensor, of: str, prop: str = "density") -> None:
        """Rows of how much some pictures lie where real ones do."""
        from probekit.latents.properties import density
        from probekit.metrics.distributions import alexnet_features

        self.add(prop, density(alexnet_features(pictures).double().numpy(), self.experiment.real(self.data)), of, "alexnet")

    # --- the three --------------------------------------------------------------------------------------------------------

    def density(self, codes: Tensor, numbers: np.ndarray) -> Tensor:
        """With noise added, from the prior and from a Gaussian; beside real pictures and destroyed ones. Returns those of the
        codes themselves."""
        import torch

        from probekit.latents import properties
        from probekit.seeds import named

        space, n = self.space, len(codes)
        generator = named("noise of properties", space.name, self.experiment.seed)
        more = self.experiment.codes(space, self.data, self.data.split("test")[:FITTED])
        mean = more.mean(0)
        if space.sampler is None:
            noise, drawn = properties.gaussian(more, n, generator), "gaussian"
        else:
            noise, drawn = space.sample(n, generator), "prior"
        normal = drawn == "prior" and properties.is_normal(space.sample(FITTED, generator))
        if normal and space.encoder is None:
            mean = torch.zeros_like(mean)
        own = None
        for strength in properties.STRENGTHS:
            pictures = self.decode(properties.mixed(codes, noise, strength, mean))
            own = pictures if own is None else own
            self.where(pictures, f"noise {strength:g}")
            step = properties.STRENGTHS.index(strength)
            self.pictures.update({f"noise-{i}-{step}": pictures[i] for i in range(SHOWN)})
        assert own is not None
        self.where(pictures, drawn)
        if drawn == "prior" and not (normal and space.encoder is None):  # whose Gaussian is the prior
            self.where(self.decode(properties.gaussian(more, n, generator)), "gaussian")
        kept = own
        if space.around is not None:  # the model's own picture has the rest, too
            kept = space.decode(codes, rest_of=self.data.images(numbers))
        self.where(kept, "own")
        real = self.data.images(self.data.split("test")[n : 2 * n])
        of_data = named("destroyed pictures", self.data.digest, self.experiment.seed)  # the same beside every space
        self.where(real, "real")
        self.where(_shuffled(real, of_data), "patches")
        self.where(torch.rand(real.shape, generator=of_data) * 2 - 1, "pixel noise")
        return own

    def smoothness(self, codes: Tensor) -> None:
        """Along paths between pairs of codes; a cross-fade beside them. And the paths' midpoints."""
        from probekit.latents import properties
        from probekit.metrics import lpips
        from probekit.seeds import named

        space, half = self.space, len(codes) // 2
        generator = named("paths of properties", space.name, self.experiment.seed)
        spherical = space.sampler is not None and properties.is_normal(space.sample(FITTED, generator))
        a, b = codes[:half], codes[half : 2 * half]
        walks = properties.walk(self.decode, lpips.embedded, a, b, generator, spherical=spherical)
        self.add("smoothness", properties.smoothness(walks), "path", "great circle" if spherical else "straight")
        fade = properties.smoothness(properties.faded(walks, lpips.embedded))
        self.add("smoothness", {measure: fade[measure] for measure in ("jump", "leap")}, "cross-fade")
        self.where(walks.pictures[:, 1:-1].flatten(0, 1), "path", "smoothness")
        for i in range(SHOWN):
            self.pictures.update({f"path-{i}-{step}": walks.pictures[i, step] for step in range(properties.POINTS + 1)})
        middle = walks.pictures[:, properties.POINTS // 2]
        self.where(middle, "midpoints", "organization")
        self.where(walks.pictures[:, [0, -1]].flatten(0, 1), "ends", "organization")
        self.add("organization", {"detour": properties.detour(walks)}, "midpoints", "lpips")
        if self.reading is not None:
            read = [self.reading.read(walks.pictures[:, i]) for i in (0, properties.POINTS // 2, -1)]
            for factor, told in properties.midpoints(*read).items():
                self.add("organization", told, "midpoints", factor)

    def organization(self, codes: Tensor, own: Tensor | None, numbers: np.ndarray) -> None:
        """Whether near codes are alike: to look at, and in the factors that they show."""
        from probekit.latents import properties
        from probekit.metrics import lpips
        from probekit.metrics.readers import coded

        seed = self.experiment.seed
        apart = {}
        if own is not None:
            apart["lpips"] = properties.unlike(lpips.embedded(own))
        labels = coded(self.data.labels(numbers))
        if self.space.encoder is not None and labels:
            apart["factors"] = properties.differing(labels)
        elif self.reading is not None and own is not None:
            apart["factors"] = properties.differing(self.reading.read(own))
        for by, distances in apart.items():
            found = properties.organization(codes, distances, seed=seed)
            self.add("organization", {"correlation": found.correlation}, "codes", by)
            self.rows.append(row(self.space, "organization", "null", "codes", by, found.null))
            self.rows.append(row(self.space, "organization", "p", "codes", by, found.p))
        if len(apart) == 2 and own is not None:
            seen = properties.organization(lpips.embedded(own), apart["factors"], seed=seed)
            self.add("organization", {"correlation": seen.correlation}, "lpips", "factors")


def _shuffled(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures cut into patches that change places; what is left over at the edges is cut off."""
    import torch

    n, c, h, w = images.shape
    rows, columns = h // PATCH, w // PATCH
    cut = images[..., : rows * PATCH, : columns * PATCH].reshape(n, c, rows, PATCH, columns, PATCH).permute(0, 2, 4, 1, 3, 5)
    flat = cut.reshape(n, rows * columns, c, PATCH, PATCH)
    moved = torch.stack([each[torch.randperm(len(each), generator=generator)] for each in flat])
    back = moved.reshape(n, rows, columns, c, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return back.reshape(n, c, rows * PATCH, columns * PATCH)
