"""The recipe of the scene reader."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from probekit.data.scenes import VALUES, labels, render, sample_scenes
from probekit.metrics.readers import SceneReader, scene_reader
from probekit.zoo.measured import Measured
from probekit.zoo.training import Schedule, train

SCHEDULE = Schedule(steps=2000, learning_rate=2e-3, ema=0.998, bfloat16=True)
BATCH = 64


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
    reader = scene_reader()
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
