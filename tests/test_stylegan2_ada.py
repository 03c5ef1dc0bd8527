from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from probekit.hooks.errors import ProbekitError
from probekit.zoo import stylegan2_ada
from probekit.zoo.stylegan2_ada import Adversaries, augment, loss
from probekit.zoo.training import Schedule, train

SIZE = 8


def tiny() -> Adversaries:
    torch.manual_seed(0)
    return Adversaries(SIZE, channels=(8, 8), latents=6)


def pictures(n: int = 8) -> Tensor:
    return torch.rand(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5)) * 2 - 1


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def after(seen: int) -> Adversaries:
    """Networks that have seen so many batches."""
    network = tiny()
    network.seen.fill_(seen)
    return network


def test_both_networks_gradients_are_those_of_their_own_losses_from_images_judged_twice() -> None:
    network = after(1)
    loss(network, pictures(), seeded())[0].backward()

    twin = after(1)
    generator, judge = twin.generator, twin.discriminator
    drawn = seeded()
    ws = stylegan2_ada._mixed_ws(generator, 8, drawn)
    with torch.autocast("cpu", torch.bfloat16):
        made = generator.synthesis(ws, "random", drawn).float()
        of_generator = F.softplus(-judge(made).float()).mean()
        of_judge = F.softplus(judge(made.detach()).float()).mean() + F.softplus(-judge(pictures()).float()).mean()
    parts = ((of_generator, generator, network.generator), (of_judge, judge, network.discriminator))
    for value, part, learned in parts:
        weights = list(part.parameters())
        expected = torch.autograd.grad(value, weights, retain_graph=True)
        for (name, p), e in zip(learned.named_parameters(), expected, strict=True):
            assert p.grad is not None and torch.allclose(p.grad, e, rtol=0.02, atol=0.02 * e.abs().max().item() + 1e-7), name


def test_the_penalties_come_every_16th_batch_and_weigh_16_times() -> None:
    values = {seen: loss(after(seen), pictures(), seeded())[0].item() for seen in (0, 1, 15, 16)}
    assert values[1] == values[15] and values[0] == values[16]

    network, images = after(0), pictures().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        real = network.discriminator(images).float()
    (slope,) = torch.autograd.grad(real.sum(), images)
    r1 = 16 * 1.0 / 2 * slope.square().sum((1, 2, 3)).mean().item()
    # the batch's own draws come first
    drawn = seeded()
    with torch.no_grad():
        network.generator.synthesis(stylegan2_ada._mixed_ws(network.generator, 8, drawn), "random", drawn)
    paths = 16 * 2 * stylegan2_ada._path_penalty(network, 4, drawn).item()
    assert r1 > 1e-3 and paths > 1e-3
    assert values[0] - values[1] == pytest.approx(r1 + paths, rel=0.02)


def test_paths_are_twice_as_long_where_the_images_are_twice_as_strong() -> None:
    network = tiny()
    stylegan2_ada._path_penalty(network, 4, seeded())
    strong = tiny()
    for name, p in strong.generator.named_parameters():
        if name.endswith("torgb.weight"):
            p.data *= 2
    stylegan2_ada._path_penalty(strong, 4, seeded())
    assert network.paths > 0 and strong.paths.item() == pytest.approx(2 * network.paths.item(), rel=1e-5)


def test_mixed_images_have_two_ws_from_one_layer_on() -> None:
    network = tiny().generator
    mixed = 0
    for seed in range(100):
        ws = stylegan2_ada._mixed_ws(network, 3, seeded(seed))
        changes = (ws.diff(dim=1).abs().amax(2) > 0).sum(1)
        assert changes.max() == changes.min() <= 1
        mixed += int(changes[0])
    assert 80 <= mixed <= 98  # of 100 at 0.9: within 3.5 standard deviations


def test_augmentation_is_adapted_to_the_share_of_real_images_that_are_told() -> None:
    step = 4 * 8 / stylegan2_ada._ADA_IMAGES
    network = tiny()
    last = network.discriminator.b4.out
    for sure, expected in ((True, step), (True, 2 * step), (False, step), (False, 0.0), (False, 0.0)):
        last.bias.data.fill_(100.0 if sure else -100.0)
        before = network.p.item()
        for i in range(4):
            assert i == 0 or network.p.item() == before
            loss(network, pictures(), seeded())
        assert network.p.item() == pytest.approx(expected, abs=1e-9) and network.signs == 0


def test_augmentation_of_probability_0_changes_nothing_and_of_1_every_image() -> None:
    images = pictures(64)
    assert augment(images, 0.0, seeded()) is images
    changed = augment(images, 1.0, seeded())
    assert torch.equal(changed, augment(images, 1.0, seeded()))
    assert ((changed - images).abs().amax((1, 2, 3)) > 0.01).all()
    few = augment(images, 0.02, seeded())
    still = torch.isclose(few, images, atol=1e-4).all(1).all(1).all(1).float().mean().item()
    assert 0.5 < still < 0.95  # 0.98 to the power of the 13 transformations is 0.77


def test_augmentation_moves_plain_images_nowhere_and_keeps_grey_ones_grey() -> None:
    grey = torch.rand(16, 1, 1, 1, generator=seeded()).expand(-1, 3, SIZE, SIZE)
    changed = augment(grey, 1.0, seeded())
    assert torch.allclose(changed, changed[:, :1, :1, :1].expand_as(changed), atol=1e-5)


def test_colours_are_turned_about_the_greys_and_made_more_or_less_vivid_alike() -> None:
    for made in stylegan2_ada._colour(32, 1.0, seeded()).double():
        linear, axis = made[:3, :3], torch.full((3,), 3**-0.5, dtype=torch.float64)
        along = (axis @ linear @ axis).item()
        across = linear - along * torch.outer(axis, axis)
        assert torch.allclose(across @ axis, torch.zeros(3, dtype=torch.float64), atol=1e-6)
        # across the greys: a rotation, and one factor
        stretch = torch.linalg.svdvals(across)
        assert stretch[0].item() == pytest.approx(stretch[1].item(), rel=1e-5) and stretch[2] < 1e-6
        assert (torch.linalg.det(across + torch.outer(axis, axis)) > 0).item()
        assert torch.allclose(made[:3, 3], made[0, 3].expand(3), atol=1e-6)
        assert made[3].tolist() == [0, 0, 0, 1]


def test_quarter_turns_only_move_pixels() -> None:
    angle = torch.tensor([0.0, 0.5, 1.0, 1.5]) * torch.pi
    images = pictures(4)
    grid = F.affine_grid(stylegan2_ada._turned(angle)[:, :2], list(images.shape), align_corners=False)
    turned = F.grid_sample(images, grid, align_corners=False)
    for k in range(4):
        assert any(torch.allclose(turned[k], torch.rot90(images[k], way * k, (1, 2)), atol=1e-5) for way in (1, -1)), k


def trained(checkpoint: Path, steps: int, stop_at: int | None = None) -> dict[str, Tensor]:
    def counted(network: Any, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        if stop_at is not None and int(network.seen) == stop_at:
            raise KeyboardInterrupt
        return loss(network, pictures(), generator)

    network = after(14)
    network.p.fill_(0.3)  # so that augmentation is part of it, and the penalties of batch 16
    schedule = Schedule(steps, 1e-3, warmup=2, betas=(0.0, 0.99), hold=2)
    return train(network, counted, schedule, checkpoint=checkpoint, save_every_seconds=0).state_dict()


def test_a_killed_training_goes_on_with_all_that_it_had(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole.pt", 5)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut.pt", 5, stop_at=17)
    cut = trained(tmp_path / "cut.pt", 5)
    assert whole.keys() == cut.keys() and all(torch.equal(value, cut[key]) for key, value in whole.items())
    assert whole["seen"] == 14 + 5 and whole["paths"] > 0 and whole["p"] != 0.3


def test_a_checkpoint_of_another_length_is_refused(tmp_path: Path) -> None:
    trained(tmp_path / "short.pt", 3)
    with pytest.raises(ProbekitError, match=r"checkpoint '.*short.pt': of a training with 3 steps, seed 0 and .*; delete it"):
        trained(tmp_path / "short.pt", 5)


def test_a_rate_is_held_before_it_decays() -> None:
    schedule = Schedule(110, 1e-3, warmup=4, hold=50)
    assert [schedule.factor(step) for step in (0, 3, 4, 49, 50)] == [0.25, 1, 1, 1, 1]
    assert schedule.factor(80) == pytest.approx(0.5) and 0 < schedule.factor(109) < 1e-3
    at_once = Schedule(64, 1e-3, warmup=4)
    assert [at_once.factor(step) for step in range(4, 64)] == [schedule.factor(step) for step in range(50, 110)]
