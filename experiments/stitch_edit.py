"""Carried edits: a direction found in one latent space, mapped into another and applied there (All Roads, section 5).

The paper expects that edit directions can be carried over by the linear map; this tries it, and judges the pictures.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from probekit.experiments.places import (
    Alpha,
    Codes,
    Data,
    Device,
    Models,
    Out,
    Place,
    Seed,
    Train,
    encode_all,
    image_sets,
    load_places,
    penalty,
    progress,
)  # fmt: skip

from probekit.hooks.errors import ProbekitError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from torch import Tensor

    from probekit.runs import Run

MODELS = "avatar-vae:mean,avatar-vqvae,avatar-flow"
ATTRIBUTES = "Eyeglasses,Smiling,Mustache,Wearing_Hat,Pale_Skin,Blue_Background"
STRENGTHS = (0.5, 1.0, 1.5, 2.0)
"""How far pictures are moved, in lengths of the step between the means of images without and with the attribute."""


def edit(
    models: Models = MODELS,
    data: Data = "avatars",
    attributes: Annotated[str, typer.Option(help="Attributes to give, separated by commas.")] = ATTRIBUTES,
    train: Train = 9000,
    test: Annotated[int, typer.Option(min=2, help="Images to edit, for each attribute those of them without it.")] = 60,
    alpha: Alpha = "loo",
    seed: Seed = 0,
    device: Device = "auto",
    out: Out = None,
) -> None:
    """Find an attribute's direction in every space, carry it into every other, and judge the pictures edited with it."""
    from probekit.data.avatars import ATTRIBUTES as KNOWN
    from probekit.runs import Run, default_folder

    if data != "avatars":
        raise ProbekitError(f"--data {data!r}: edits are judged by the avatar reader and on counterfactual pairs; avatars only")
    names = [name.strip() for name in attributes.split(",") if name.strip()]
    if unknown := [name for name in names if name not in KNOWN]:
        raise ProbekitError(f"--attributes {unknown[0]!r}: choose from {', '.join(KNOWN)}")
    penalty(alpha, "vae", "vae")
    places = load_places(models, device)
    for place in places:
        if place.space.encoder is None or place.space.decoder is None:
            raise ProbekitError(f"--models: {place.name} cannot {'encode' if place.space.encoder is None else 'decode'}")
    (codes,) = image_sets(places, data, train, test, seed, samples=False).values()
    options: dict[str, Any] = {
        "models": {p.name: f"{p.model.family} {p.model.digest}" for p in places}, "data": data,
        "data_digest": codes.data.digest, "attributes": names, "train": train, "test": test, "alpha": alpha, "seed": seed,
    }  # fmt: skip
    folder = out or default_folder("stitch-edit", data, options)
    opened = Run(folder, "stitch-edit", options, sys.argv)
    rows = edit_all(opened, places, codes, names)
    show(folder, opened.config | {"command": sys.argv}, rows)


def edit_all(opened: Run, places: list[Place], codes: Codes, names: list[str]) -> pd.DataFrame:
    """Every target that is not finished: its own directions, those carried into it, and random ones; then all rows."""
    waiting = [place for place in places if not opened.finished(_unit(place))]
    encode_all([(place, codes) for place in (places if waiting else [])])
    with progress("editing", len(places), done=len(places) - len(waiting)) as advance:
        for target in waiting:
            _edit_in(opened, target, places, codes, names)
            advance(1)
    rows = opened.collect([_unit(place) for place in places])
    if rows.empty:
        raise ProbekitError(f"--test {opened.config['options']['test']}: no image is without {' or '.join(names)}")
    return rows


def _unit(place: Place) -> str:
    from probekit.runs import file_name

    return file_name(place.name)


def _edit_in(opened: Run, target: Place, places: list[Place], codes: Codes, names: list[str]) -> None:
    import numpy as np
    import pandas as pd
    import torch

    from probekit.data.avatars import ATTRIBUTES as KNOWN
    from probekit.latents.maps import LinearMap
    from probekit.metrics.distributions import share_interval
    from probekit.report.editing import RANDOM
    from probekit.bundled import weights
    from probekit.zoo import avatar_reader

    options = opened.config["options"]
    labels, truth = codes.data.labels(codes.train), codes.data.labels(codes.test)
    here, ours = codes.of(target, "train"), codes.of(target, "test")
    reader = avatar_reader.load(weights("avatar-reader"))
    index = {name: KNOWN.index(name) for name in names}
    directions = {(target.name, name): _direction(here, labels[name].to_numpy()) for name in names}
    for source in places:
        if source is not target:
            there = codes.of(source, "train")
            weight = penalty(options["alpha"], source.model.family, target.model.family)
            linear = LinearMap(weight).fit(there, here).coef_
            for name in names:
                directions[source.name, name] = linear @ _direction(there, labels[name].to_numpy())
    draw = np.random.default_rng(options["seed"])
    for name in names:
        own = directions[target.name, name]
        noise = draw.standard_normal(own.shape)
        directions[RANDOM, name] = noise * (np.linalg.norm(own) / np.linalg.norm(noise))
    true = {name: _Counterfactuals.of(target, name, options["seed"]) for name in names}
    plain = _decode(target, ours)
    read_plain = reader.read(plain).numpy()
    rows: list[dict[str, Any]] = []
    pictures: dict[str, Tensor] = {}
    for (source_name, name), step in directions.items():
        without = np.flatnonzero(~truth[name].to_numpy() & ~read_plain[:, index[name]])
        exact = true[name].step
        cosine = float(step @ exact / max(np.linalg.norm(step) * np.linalg.norm(exact), 1e-12))
        for strength in STRENGTHS:
            if len(without) == 0:
                continue
            edited = _decode(target, ours[without] + np.float32(strength) * step.astype(np.float32))
            seen = reader.read(edited).numpy()
            given = seen[:, index[name]]
            others = np.delete(seen == read_plain[without], index[name], axis=1)
            low, high = share_interval(int(given.sum()), len(given))
            rows.append({"source": source_name, "target": target.name, "attribute": name, "strength": strength,
                         "success": given.mean(), "low": low, "high": high, "kept": others.mean(), "cosine": cosine,
                         "apart": np.nan, "apart_unedited": true[name].apart, "n": len(without)})  # fmt: skip
            if strength == 1.0:
                pictures[f"{source_name.replace('/', '_')}-{name}"] = torch.cat(list(edited[:4]), dim=2)
                pictures[f"plain-{name}"] = torch.cat(list(plain[torch.from_numpy(without[:4])]), dim=2)
        if len(without):
            best = max(rows[-len(STRENGTHS) :], key=lambda row: (row["success"], -row["strength"]))
            best["apart"] = true[name].distance(np.float32(best["strength"]) * step.astype(np.float32))
    columns = ["source", "target", "attribute", "strength", "success", "low", "high", "kept", "cosine", "apart",
               "apart_unedited", "n"]  # fmt: skip
    opened.write(_unit(target), pd.DataFrame(rows, columns=columns), pictures)


def _direction(latents: np.ndarray, has: np.ndarray) -> np.ndarray:
    """The step from the mean latent of images without an attribute to that of images with it."""
    import numpy as np

    return (latents[has].mean(0) - latents[~has].mean(0)).astype(np.float64)


@dataclass(frozen=True)
class _Counterfactuals:
    """Avatars that differ in one attribute only: what an edit should have done. apart: LPIPS between the two, not edited."""

    place: Place
    without: np.ndarray
    with_: np.ndarray
    pictures: Tensor
    apart: float

    @classmethod
    def of(cls, place: Place, name: str, seed: int, pairs: int = 32) -> _Counterfactuals:
        import numpy as np
        import torch

        from probekit.data.avatars import TRAIN, counterfactual
        from probekit.metrics import lpips

        both = [counterfactual(TRAIN + i, name) for i in range(pairs)]
        size = place.model.image_size
        pictures = [torch.from_numpy(np.stack([p[k].draw(size) for p in both])).float() / 127.5 - 1 for k in (0, 1)]
        generators = [torch.Generator().manual_seed(seed) for _ in range(2)]  # what is drawn is drawn alike
        codes = (place.space.encode(x, g).flatten(1).numpy() for x, g in zip(pictures, generators, strict=True))
        without, with_ = codes
        apart = lpips.distances(_decode(place, without), pictures[1]).mean().item()
        return cls(place, without, with_, pictures[1], apart)

    @property
    def step(self) -> np.ndarray:
        """The mean step from the code of the avatar without the attribute to that of the one with it."""
        import numpy as np

        return (self.with_ - self.without).mean(0).astype(np.float64)

    def distance(self, step: np.ndarray) -> float:
        """Mean LPIPS between the avatars without the attribute, moved by a step, and those with it."""
        from probekit.metrics import lpips

        return lpips.distances(_decode(self.place, self.without + step), self.pictures).mean().item()


def _decode(place: Place, latents: np.ndarray) -> Tensor:
    import torch

    shaped = torch.from_numpy(latents).float().reshape(-1, *place.space.shape)
    return torch.cat([place.space.decode(part) for part in torch.split(shaped, 50)])


def show(folder: Path, config: dict[str, Any], rows: pd.DataFrame) -> None:
    """Write the report of a finished run and print its result."""
    from probekit.report.editing import print_edits, write_report
    from probekit.runs import writing

    with writing(folder):
        report = write_report(folder, config, rows)
    print_edits(rows)
    typer.echo(f"\nreport: {report}")
