"""The scene reader: a small CNN that reads every attribute of a scene off its picture."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from probekit.data.scenes import VALUES, labels, render, sample_scenes
from probekit.zoo import Measured, weights
from probekit.zoo.training import Schedule, train

SCHEDULE = Schedule(steps=2000, learning_rate=2e-3, ema=0.998, bfloat16=True)
BATCH = 64


class SceneReader(nn.Module):
    """Logits for every attribute in `VALUES`, from images in [-1, 1] of 64x64 pixels (others are resized)."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 128, 128)
        layers: list[nn.Module] = []
        for i, (inner, outer) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Conv2d(inner, outer, 3, stride=2 if i < 3 else 1, padding=1), nn.GroupNorm(8, outer), nn.SiLU()]
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 8 * 8, 256), nn.SiLU())
        self.heads = nn.ModuleDict({a: nn.Linear(256, len(values)) for a, values in VALUES.items()})

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> dict[str, Float[Tensor, "n _values"]]:
        """Logits of every attribute's values."""
        if images.shape[-2:] != (64, 64):
            images = F.interpolate(images, (64, 64), mode="bilinear", antialias=True)
        features = self.features(images)
        return {a: head(features) for a, head in self.heads.items()}

    @torch.no_grad()
    def read(self, images: Float[Tensor, "n 3 h w"]) -> dict[str, Int[Tensor, " n"]]:
        """The index of the value seen, for each attribute of each image."""
        return {a: logits.argmax(1) for a, logits in self(images).items()}


def loss(reader: nn.Module, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy summed over attributes, on renderings that are blurred, recoloured and noised by random amounts."""
    scenes = sample_scenes(BATCH, generator)
    images = render(scenes, generator)
    images = images + 0.15 * torch.rand(BATCH, 1, 1, 1, generator=generator) * torch.randn(images.shape, generator=generator)
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = torch.lerp(images, soft, torch.rand(BATCH, 1, 1, 1, generator=generator))
    images = images + 0.06 * torch.randn(BATCH, 3, 1, 1, generator=generator)
    logits = reader(images.to(next(reader.parameters()).dtype))
    truth = labels(scenes)
    value = sum((F.cross_entropy(logits[a].float(), truth[a]) for a in VALUES), torch.zeros(()))
    return value, {}


def evaluate(n: int = 4000, seed: int = 1) -> list[Measured]:
    """The share of held-out scenes, freshly rendered, that the bundled reader gets right, per attribute."""
    reader = load(weights("scene-reader"))
    generator = torch.Generator().manual_seed(seed)
    right = dict.fromkeys(VALUES, 0)
    for start in range(0, n, 250):
        scenes = sample_scenes(min(250, n - start), generator, held_out=True)
        seen, truth = reader.read(render(scenes, generator)), labels(scenes)
        for a in VALUES:
            right[a] += int((seen[a] == truth[a]).sum())
    return [Measured(a, hits / n, 0.99) for a, hits in right.items()]


def train_and_save(folder: Path, checkpoints: Path, *, seed: int = 0) -> None:
    """Train the reader and write its weights."""
    torch.manual_seed(seed)
    reader = train(SceneReader(), loss, SCHEDULE, checkpoint=checkpoints / "scene-reader.pt", seed=seed, title="scene-reader")
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half() for k, v in reader.state_dict().items()}, folder / "model.safetensors")


def load(folder: Path) -> SceneReader:
    """The trained reader, float32, on the CPU."""
    reader = SceneReader()
    reader.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
    return reader.eval()
