from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch

from probekit.data.scenes import all_scenes, render
from probekit.metrics.descriptors import Descriptor, clip_descriptor, paper_descriptors, reader_descriptor
from probekit.metrics.lpips import distance, features, network
from probekit.metrics.roles import EVERYTHING, NO_ROLE, damage, interval, roles, summarise, transfer
from probekit.bundled import weights


def lpips(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.tensor([distance(x, y) for x, y in zip(features(a), features(b), strict=True)])


SCENES = all_scenes()[::3001]


def pictures(seed: int = 0) -> torch.Tensor:
    return render(SCENES, torch.Generator().manual_seed(seed))


def everything_that_describes() -> list[Descriptor]:
    return [*paper_descriptors(), clip_descriptor(str(weights("scene-clip"))), reader_descriptor(["kind", "place"])]


@pytest.mark.parametrize("descriptor", everything_that_describes(), ids=lambda d: d.name)
def test_a_distance_is_zero_to_itself_symmetric_and_not_negative(descriptor: Descriptor) -> None:
    seen = descriptor.features(pictures())
    distances = np.array([[descriptor.distance(a, b) for b in seen] for a in seen])
    known = ~np.isnan(distances)
    assert known.any()
    assert np.allclose(np.diag(distances)[~np.isnan(np.diag(distances))], 0, atol=1e-5)
    # SIFT's ratio test asks for a second-best match on one side only
    assert descriptor.name == "sift" or np.allclose(distances[known], distances.T[known], atol=1e-5)
    assert (distances[known] >= -1e-6).all() and np.nanmax(distances) > 0.05


def test_lpips_equals_the_lpips_package_with_the_same_trunk_in_torchvision() -> None:
    import lpips as package
    from safetensors.torch import load_file
    from torchvision.models import alexnet

    trunk = load_file(weights("lpips-alexnet") / "model.safetensors")
    whole = alexnet(weights=None)
    features = {f"features.{name.split('.', 1)[1]}": value for name, value in trunk.items()}
    missing = whole.load_state_dict(features, strict=False)
    assert not missing.unexpected_keys and all(k.startswith("classifier") for k in missing.missing_keys)
    reference = package.LPIPS(net="alex", pnet_rand=True, verbose=False)
    # the package's trunk is torchvision's `features`, cut into slices
    for i, module in enumerate(whole.features[:12]):
        part = next(s for s in (getattr(reference.net, f"slice{k}") for k in range(1, 6)) if str(i) in s._modules)
        part._modules[str(i)] = module
    a, b = pictures(), pictures(1).flip(0)
    with torch.no_grad():
        expected = reference(a, b).flatten()
    assert torch.allclose(lpips(a, b), expected, atol=1e-5)
    assert expected.max() > 0.1
    assert all(p.dtype == torch.float32 for p in network().parameters())


def test_the_shipped_trunk_is_the_one_that_lpips_linear_layers_were_fitted_to() -> None:
    # an untrained trunk, or one whose channels stand in another order, does not rank distortions as the paper's does
    a = pictures()
    blurred = torch.nn.functional.avg_pool2d(a, 5, 1, 2, count_include_pad=False)
    brighter = (a + 0.05).clamp(-1, 1)
    other = a.roll(1, 0)
    assert (lpips(a, brighter) < lpips(a, blurred)).all() and (lpips(a, blurred) < lpips(a, other)).float().mean() > 0.7


def test_transfer_and_damage_at_their_ends() -> None:
    assert transfer(0.0, 2.0, 2.0) == 0 and transfer(2.0, 0.0, 2.0) == 1 and transfer(1.0, 1.0, 1.0) == 0.5
    assert math.isnan(transfer(1.0, 1.0, 0.0))  # O and E are alike: nothing could come over
    assert math.isnan(transfer(0.0, 0.0, 1.0))  # no metric says so, but SIFT may: it counts the points that match
    assert damage(0.0, 2.0, 2.0) == 0 and damage(3.0, 2.0, 2.0) == 1
    assert math.isnan(damage(1.0, 1.0, 0.0))


def test_an_interval_holds_its_mean_narrows_with_pairs_and_leaves_nan_out() -> None:
    rng = np.random.default_rng(0)
    few, many = rng.random(6), rng.random(200)
    for values in (few, many):
        mean, low, high = interval(values.tolist())
        assert low < mean < high and mean == pytest.approx(values.mean())
    assert interval(many.tolist())[2] - interval(many.tolist())[1] < interval(few.tolist())[2] - interval(few.tolist())[1]
    assert interval([0.5, math.nan, 0.5, 0.5]) == (0.5, 0.5, 0.5)
    assert interval([0.7]) == (0.7, 0.0, 1.0) and interval([1.0, 1.0]) == (1.0, 0.0, 1.0)
    assert all(math.isnan(v) for v in interval([math.nan]))
    assert interval(few.tolist()) == interval(few.tolist())


def test_the_bootstrap_covers_the_true_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        _, low, high = interval(rng.normal(0.5, 0.2, 30).tolist(), resamples=400)
        covered += low <= 0.5 <= high
    assert 0.88 <= covered / 200 <= 0.99


def made_up(scores: dict[str, tuple[float, float]], null: float = 0.1) -> pd.DataFrame:
    """Rows of eight pairs a factor, one layer, with the given mean transfers and spreads."""
    rng = np.random.default_rng(0)
    place = {"descriptor": "reader", "window": "all", "order": 0, "layer": "mid_block", "seed": 0, "damage": 0.0}
    rows = []
    for factor, (mean, spread) in scores.items():
        for i in range(8):
            for donor, value in (("edit", mean), ("unrelated", null)):
                score = float(np.clip(value + spread * rng.normal(), 0, 1))
                rows.append(place | {"factor": factor, "pair": f"{factor}{i}", "donor": donor, "transfer": score})
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("scores", "null", "role"),
    [
        ({"structure": (0.9, 0.02), "content": (0.1, 0.02), "surface": (0.2, 0.02)}, 0.1, "structure"),
        ({"structure": (0.6, 0.3), "content": (0.5, 0.3), "surface": (0.5, 0.3)}, 0.1, NO_ROLE),
        ({"structure": (0.1, 0.02), "content": (0.1, 0.02), "surface": (0.1, 0.02)}, 0.1, NO_ROLE),
        ({"structure": (1.0, 0.0), "content": (1.0, 0.0), "surface": (1.0, 0.0)}, 0.1, EVERYTHING),
        # it moves, but no more than any donor would make it move
        ({"structure": (0.6, 0.02), "content": (0.1, 0.02), "surface": (0.2, 0.02)}, 0.62, NO_ROLE),
        # one factor alone has nothing to be clear of
        ({"structure": (1.0, 0.0)}, 0.1, NO_ROLE),
    ],
)
def test_a_role_follows_only_where_intervals_separate(scores: dict[str, tuple[float, float]], null: float, role: str) -> None:
    found = roles(summarise(made_up(scores, null)))
    assert found.role.tolist() == [role]
