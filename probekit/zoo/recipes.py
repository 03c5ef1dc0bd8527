"""Every model of the zoo: what it is, how it is trained, how it is measured."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from probekit.bundled import MODELS, weights
from probekit.hooks.errors import ProbekitError
from probekit.zoo import avatar_reader, scene_clip, scene_reader, scene_vae
from probekit.zoo.measured import Measured


@dataclass(frozen=True)
class Recipe:
    """train(folder, checkpoints, seed) writes the weights; evaluate(n, seed) measures the bundled ones."""

    about: str
    train: Callable[[Path, Path, int], None]
    evaluate: Callable[[int, int], list[Measured]]


def find(name: str) -> Recipe:
    """The recipe of that name. Raises ProbekitError with the nearest name."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1) or list(RECIPES)
        raise ProbekitError(f"zoo model {name!r}: there is none; {', '.join(near)}")
    return RECIPES[name]


def _train_mini_sd(folder: Path, checkpoints: Path, seed: int) -> None:
    from probekit.zoo import mini_sd

    vae = checkpoints / "scene-vae"
    if not (vae / "diffusion_pytorch_model.safetensors").exists():
        scene_vae.train_and_save(vae, checkpoints, seed=seed)
    mini_sd.train_and_save(folder, checkpoints, seed=seed, vae_folder=vae, clip_folder=weights("scene-clip"))


def _evaluate_mini_sd(n: int, seed: int) -> list[Measured]:
    from probekit.zoo import mini_sd

    return mini_sd.evaluate("mini-sd", n, seed)


def _transformer_recipe(name: str) -> Recipe:
    def train(folder: Path, checkpoints: Path, seed: int) -> None:
        from probekit.zoo import scene_transformers

        scene_transformers.train_and_save(name, folder, checkpoints, seed=seed)

    def evaluate(n: int, seed: int) -> list[Measured]:
        from probekit.zoo import mini_sd

        return mini_sd.evaluate(name, n, seed)

    return Recipe(_TRANSFORMERS[name], train, evaluate)


def _train_planted_sd(folder: Path, checkpoints: Path, seed: int) -> None:
    from probekit.zoo import planted_sd

    planted_sd.train_and_save(folder, checkpoints, seed=seed, vae_folder=weights("mini-sd") / "vae")


def _evaluate_planted_sd(n: int, seed: int) -> list[Measured]:
    from probekit.zoo import mini_sd

    return mini_sd.evaluate("planted-sd", n, seed)


def _family_recipe(name: str) -> Recipe:
    # the families' modules import diffusers, which a list of names can do without
    def train(folder: Path, checkpoints: Path, seed: int) -> None:
        from probekit.zoo import avatar_families

        avatar_families.train_and_save(name, folder, checkpoints, seed=seed)

    def evaluate(n: int, seed: int) -> list[Measured]:
        from probekit.zoo import avatar_families

        return avatar_families.evaluate(name, n, seed)

    return Recipe(_FAMILIES[name], train, evaluate)


_TRANSFORMERS = {
    "mini-sd3": "StableDiffusion3Pipeline of the same scenes: two-stream transformer, rectified flow, mini-sd's autoencoder",
    "mini-dit": "PixArtAlphaPipeline of the same scenes: transformer with cross-attention, T5, mini-sd's autoencoder, DDIM",
}

_FAMILIES = {
    "avatar-vae": "VAE of 32x32 avatars in DiffuseVAE's architecture, a code of 128",
    "avatar-vqvae": "VQModel of avatars: a grid of 3x8x8, 2,048 codes",
    "avatar-gan": "StyleGAN2 of avatars: z and w of 64",
    "avatar-flow": "Glow of avatars: three levels of eight flows, affine couplings; and its weights as it learned",
    "avatar-ddpm": "DDPM of avatars: UNet2DModel, linear schedule of 1,000 steps; and its weights as it learned",
    "photo-ddpm": "DDPM of patches of photographs: avatar-ddpm's U-Net and schedule",
    "mini-flow": "rectified flow of avatars: avatar-ddpm's U-Net, trained to predict velocity",
    "avatar-ldm": "latent diffusion of avatars: a UNet2DModel on avatar-vqvae's grid",
}

RECIPES: dict[str, Recipe] = {
    "mini-sd": Recipe(
        "StableDiffusionPipeline of 64x64 scenes: CLIP text model, U-Net, KL VAE 4x16x16, DDIM",
        _train_mini_sd,
        _evaluate_mini_sd,
    ),
    **{name: _transformer_recipe(name) for name in _TRANSFORMERS},
    "planted-sd": Recipe(
        "StableDiffusionPipeline of scenes whose cross-attentions each read the words of one factor, or none",
        _train_planted_sd,
        _evaluate_planted_sd,
    ),
    "scene-reader": Recipe(
        "CNN that reads place, size, kind, colour, ground and texture off a scene",
        lambda folder, checkpoints, seed: scene_reader.train_and_save(folder, checkpoints, seed=seed),
        scene_reader.evaluate,
    ),
    "scene-clip": Recipe(
        "CLIPModel of scenes: mini-sd's text encoder, and the CLIP score of scenes",
        lambda folder, checkpoints, seed: scene_clip.train_and_save(folder, checkpoints, seed=seed),
        scene_clip.evaluate,
    ),
    "avatar-reader": Recipe(
        "CNN that reads 33 attributes off an avatar",
        lambda folder, checkpoints, seed: avatar_reader.train_and_save(folder, checkpoints, seed=seed),
        avatar_reader.evaluate,
    ),
    **{name: _family_recipe(name) for name in MODELS},
}
