from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from probekit import load
from probekit.bundled import MODELS
from probekit.data.avatars import ATTRIBUTES, Avatars
from probekit.zoo.avatar_families import FAMILIES, evaluate
from probekit.zoo.training import Schedule, train
from tests.conftest import quick_spaces


@pytest.mark.parametrize("name", MODELS)
def test_a_bundled_model_encodes_decodes_and_samples_as_it_says(name: str) -> None:
    model, data = load(name, device="cpu"), FAMILIES[name].data()
    images = data.images(data.split("test")[:3])
    families = {"avatar-gan": "stylegan2", "avatar-flow": "glow", "mini-flow": "flow", "photo-ddpm": "ddpm"}
    assert model.image_size == 32 and model.family == families.get(name, name.removeprefix("avatar-"))
    for space in quick_spaces(model, steps=5).values():
        latents = None
        if space.encoder is not None:
            latents = space.encode(images, torch.Generator().manual_seed(0))
            # one image alone has the same latent as in a batch, but for what is drawn
            if space.name not in ("sample", "noised"):
                assert torch.allclose(space.encode(images[1:2])[0], latents[1], atol=1e-4), space.name
        if space.sampler is not None:
            latents = space.sample(3, torch.Generator().manual_seed(0))
            assert torch.equal(latents, space.sample(3, torch.Generator().manual_seed(0)))
        assert latents is not None and latents.shape == (3, *space.shape) and latents.dtype == torch.float32
        if space.decoder is not None:
            pictures = space.decode(latents)
            assert pictures.shape == images.shape and pictures.abs().max() <= 1, space.name


# what the bundled weights measured at n = 500 (`probekit zoo evaluate`, README), with room for fewer images
FACES = "samples that show a face"
BARS: dict[str, dict[str, float]] = {
    "avatar-vae": {"reconstruction PSNR": 24, "attributes read off reconstructions": 0.9, FACES: 0.95},
    "avatar-vqvae": {"reconstruction PSNR": 35, "attributes read off reconstructions": 0.98},
    "avatar-flow": {"reconstruction PSNR": 60, "attributes read off reconstructions": 0.99, FACES: 0.9},
    "avatar-ddpm": {"reconstruction PSNR": 27, "attributes read off reconstructions": 0.98, FACES: 0.95},
    "mini-flow": {"reconstruction PSNR": 31, "attributes read off reconstructions": 0.98, FACES: 0.95},
    "avatar-ldm": {"reconstruction PSNR": 30, "attributes read off reconstructions": 0.97, FACES: 0.95},
    "avatar-gan": {FACES: 0.85, f"{FACES}, truncation 0.7": 0.95},
    "photo-ddpm": {"reconstruction PSNR": 22},
}
# the Fréchet distance of 24 samples, a tenth above what it is; of 24 other avatars it is 221, of 24 other photos 222
MOST = {"avatar-vae": 304, "avatar-gan": 206, "avatar-flow": 298, "avatar-ddpm": 245, "mini-flow": 231, "avatar-ldm": 219}
MOST |= {"photo-ddpm": 277}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.slow
def test_a_bundled_model_is_as_good_as_readme_says(name: str) -> None:
    measured = {row.what: row.value for row in evaluate(name, n=24, seed=3)}
    for what, bar in BARS[name].items():
        assert measured[what] >= bar, (what, measured[what])
    samples = measured["Fréchet distance of samples"]
    assert math.isnan(samples) if name == "avatar-vqvae" else samples < MOST[name]  # it has no prior


@pytest.mark.parametrize("name", MODELS)
def test_a_recipe_s_loss_has_gradients_for_every_weight_and_repeats_with_its_generator(name: str) -> None:
    family = FAMILIES[name]
    torch.manual_seed(0)
    network = family.build()
    images = family.data().images(range(4))
    family.loss(network, images, torch.Generator().manual_seed(7))  # a flow takes its first scale from its first batch
    values = [family.loss(network, images.clone(), torch.Generator().manual_seed(7))[0] for _ in range(2)]
    assert torch.equal(*values)
    torch.autograd.backward(values[0])
    silent = [key for key, p in network.named_parameters() if p.requires_grad and p.grad is None]
    assert silent == [], silent
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["avatar-vae", "avatar-flow", "avatar-gan"])
def test_what_a_recipe_saves_is_read_back_by_its_tensors_alone(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    family = FAMILIES[name]
    network: Any = family.build()
    family.loss(network, Avatars().images(range(4)), torch.Generator().manual_seed(0))
    family.save(network, tmp_path / "saved")
    read = load(tmp_path / "saved", device="cpu")
    assert read.network is not None and read.image_size == 32
    saved = (network.generator if name == "avatar-gan" else network).state_dict()
    for key, value in read.network.state_dict().items():
        assert torch.equal(value, saved[key].half().float() if value.is_floating_point() else saved[key]), key


def test_snapshots_are_those_of_an_uninterrupted_training(tmp_path: Path) -> None:
    def loss(network: nn.Module, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        x = torch.randn(8, 3, generator=generator)
        if stop_at and generator.initial_seed() % 1_000_003 == stop_at:
            raise KeyboardInterrupt
        return (network(x) - x).square().mean(), {}

    kept: dict[str, dict[int, Any]] = {"whole": {}, "cut": {}}

    def run(name: str) -> nn.Module:
        torch.manual_seed(0)
        keep = {step: (lambda m, step=step: kept[name].update({step: m.state_dict()})) for step in (5, 15, 30)}
        return train(
            nn.Linear(3, 3),
            loss,
            Schedule(30, 1e-2, warmup=3),
            checkpoint=tmp_path / f"{name}.pt",
            save_every_seconds=0,
            snapshots=keep,
        )

    stop_at = 0
    whole = run("whole")
    stop_at = 17
    with pytest.raises(KeyboardInterrupt):
        run("cut")
    stop_at = 0
    cut = run("cut")
    assert torch.equal(whole.weight, cut.weight)  # type: ignore[arg-type]
    assert list(kept["cut"]) == [5, 15, 30]
    for step, state in kept["whole"].items():
        assert all(torch.equal(state[k], kept["cut"][step][k]) for k in state), step
    assert torch.equal(kept["whole"][30]["weight"], whole.weight)  # type: ignore[arg-type]


def test_the_reader_knows_every_attribute_of_test_avatars() -> None:
    from probekit.zoo.avatar_reader import evaluate as evaluate_reader

    rows = evaluate_reader(300)
    assert [row.what for row in rows] == list(ATTRIBUTES) and all(row.value >= 0.99 for row in rows)
