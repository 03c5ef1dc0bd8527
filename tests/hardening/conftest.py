"""Where small models and data lie, and every command that leaves something on the disk, in its smallest form."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline
from PIL import Image

from probekit.data.avatars import Avatars
from probekit.models.families import glow
from probekit.zoo.avatar_families import _save_own
from probekit.zoo.recipes import RECIPES
from tests.conftest import smooth
from tests.hardening.warmed import Warmed

OWN = '''
import torch
import torch.nn.functional as F

Q = torch.linalg.qr(torch.randn(192, 192, generator=torch.Generator().manual_seed(0)))[0]


class Pixels:
    """A picture made small."""

    image_size = 32

    def encode(self, images):
        return F.avg_pool2d(images, 4)

    def decode(self, latents):
        return F.interpolate(latents, scale_factor=4, mode="bilinear")

    def sample(self, n, generator):
        return torch.rand(n, 3, 8, 8, generator=generator) * 2 - 1


class Rotated(Pixels):
    """The same, rotated."""

    def encode(self, images):
        return super().encode(images).flatten(1) @ Q

    def decode(self, latents):
        return super().decode((latents @ Q.T).reshape(-1, 3, 8, 8))

    def sample(self, n, generator):
        return torch.randn(n, 192, generator=generator)
'''
OPERATION = "def operation(target, source, context):\n    return (target + source) / 2\n"
PICTURES = "--model sd --prompt-original fish --prompt-edit star --num-steps 2"
TWO = "./own.py:Pixels,./own.py:Rotated"
EXPERIMENTS = {
    "inject-sweep": "inject sweep --model sd --pairs-file pairs.yaml --num-steps 2 --layers mid_block",
    "inject-image": f"inject image {PICTURES} --apart --windows 2 --layers mid_block --layers up_blocks.0",
    "inject-script": f"inject script operation.py {PICTURES} --layers mid_block",
    "inject-calibrate": "inject calibrate --pairs 1 --num-steps 4 --seed 1 --measure outputs",
    "stitch-run": f"stitch run --train 60 --test 20 --models {TWO}",
    "stitch-edit": f"stitch edit --train 300 --test 20 --attributes Eyeglasses,Blue_Background --models {TWO}",
    "probe-run": f"probe run --train 300 --test 60 --kind ridge --models {TWO}",
    "probe-layers": "probe layers --model sd --train 60 --test 40 --timesteps 700,100 --layers mid_block",
    "dynamics-flow": "dynamics flow --model my-flow --train 300 --kind ridge",
    "dynamics-diffusion": "dynamics diffusion --model my-ddpm --steps 2 --n 70",
    "invert-run": "invert run --model ddpm --steps 4 --n 70",
    "invert-trajectory": "invert trajectory --model ddpm --steps 4 --n 130",
    "invert-interpolate": "invert interpolate --model ddpm --steps 4 --data folder:images --frames 3",
    "noise-map-run": "noise-map run --model ddpm --n 130 --steps 2,3",
    "properties-run": f"properties run --spaces {TWO} --data avatars --n 8",
}
"""By the experiment's name."""
COMMANDS = {
    **{name: [*command.split(), "--device", "cpu", "--out", "out"] for name, command in EXPERIMENTS.items()},
    "latents-encode": ["latents", "encode", "./own.py:Pixels", "--n", "250", "--out", "out"],
    **{f"train-{name}": ["zoo", "train", name, "--out", "out", "--checkpoints", "training"] for name in RECIPES},
}
"""By a name: the command; what it leaves lies in out/ and in runs/."""


@pytest.fixture(scope="session")
def warmed() -> Iterator[Warmed]:
    with Warmed() as process:
        yield process


@pytest.fixture(scope="session")
def place(tiny_sd: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands name."""
    root = tmp_path_factory.mktemp("place")
    tiny_sd.save_pretrained(root / "sd")
    _pipeline().save_pretrained(root / "ddpm")
    generator = torch.Generator().manual_seed(0)
    for step in (5, 100):
        pipeline = _pipeline()
        for p in pipeline.unet.parameters():
            p.data += torch.randn(p.shape, generator=generator) / step
        pipeline.save_pretrained(root / "my-ddpm" / f"step-{step:06d}")
        torch.manual_seed(step)
        flow = glow.Glow(in_channels=3, flows=2, blocks=2, affine=True, lu=True, width=16)
        glow.nll(flow, Avatars().images(range(8)), generator)  # its layers' norms are those of its first batch
        _save_own("glow")(flow, root / "my-flow" / f"step-{step:06d}")
    (root / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(root / "images" / f"{i:02d}.png")
    (root / "own.py").write_text(OWN)
    (root / "operation.py").write_text(OPERATION)
    (root / "pairs.yaml").write_text(
        "- {original: a red fish, edit: a red star, factor: content}\n"
        "- {original: a red fish at the left, edit: a red fish at the right, factor: structure}\n"
    )
    return root


def _pipeline() -> Any:
    return DDPMPipeline(smooth(), DDIMScheduler(beta_end=0.005, clip_sample=False))


def room(place: Path, folder: Path) -> Path:
    """A folder to run commands in: what is in `place` is seen there."""
    folder.mkdir(parents=True)
    for path in place.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def made(folder: Path) -> dict[str, bytes]:
    """What a command left in its room: every file by its place, but for a training's checkpoints."""
    parts = ("out", "runs")
    files = (path for part in parts for path in sorted((folder / part).rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
