"""The recipe of the avatar reader."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from probekit.data.avatars import ATTRIBUTES, TRAIN, Avatars
from probekit.metrics.readers import AvatarReader, avatar_reader
from probekit.zoo.measured import Measured
from probekit.zoo.training import Schedule, train

SCHEDULE = Schedule(steps=3000, learning_rate=2e-3, ema=0.998, bfloat16=True)
BATCH = 64


class Loss:
    """Cross-entropy summed over attributes, on avatars that are blurred, recoloured and noised by random amounts.

    So the reader also reads the softer pictures that models make.
    """

    def __init__(self) -> None:
        self.avatars = Avatars()

    def __call__(self, reader: nn.Module, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """The loss of one batch."""
        index = torch.randint(TRAIN, (BATCH,), generator=generator).numpy()
        images, truth = self.avatars.images(index), torch.tensor(self.avatars.labels(index).to_numpy()).float()
        images = images + 0.1 * torch.rand(BATCH, 1, 1, 1, generator=generator) * torch.randn(images.shape, generator=generator)
        soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        images = torch.lerp(images, soft, 0.7 * torch.rand(BATCH, 1, 1, 1, generator=generator))
        images = images + 0.04 * torch.randn(BATCH, 3, 1, 1, generator=generator)
        logits = reader(images.to(next(reader.parameters()).dtype)).float()
        return F.binary_cross_entropy_with_logits(logits, truth) * len(ATTRIBUTES), {}


def evaluate(n: int = 2000, seed: int = 0) -> list[Measured]:
    """The share of the test avatars, at most 10,000, whose attribute the bundled reader gets right, for every attribute."""
    avatars, reader = Avatars(seed=seed), avatar_reader()
    index = avatars.split("test")[:n]
    right = (reader.read(avatars.images(index)).numpy() == avatars.labels(index).to_numpy()).mean(0)
    return [Measured(name, float(share), 0.99) for name, share in zip(ATTRIBUTES, right, strict=True)]


def train_and_save(folder: Path, checkpoints: Path, *, seed: int = 0) -> None:
    """Train the reader and write its weights."""
    torch.manual_seed(seed)
    reader = train(
        AvatarReader(), Loss(), SCHEDULE, checkpoint=checkpoints / "avatar-reader.pt", seed=seed, title="avatar-reader"
    )
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half() for k, v in reader.state_dict().items()}, folder / "model.safetensors")
