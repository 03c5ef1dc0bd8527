from __future__ import annotations

import math
import re

import numpy as np
import pandas as pd
import pytest
import torch

from probekit.bundled import weights
from probekit.data.scenes import all_scenes, render
from probekit.metrics.descriptors import Descriptor, clip_descriptor, general_descriptors, paper_descriptors, reader_descriptor
from probekit.metrics.lpips import distance, features, network
from probekit.metrics.roles import EVERYTHING, NO_ROLE, damage, interval, roles, summarise, transfer
from probekit.report.injection import Summary, says


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


def test_a_clip_that_is_not_there_is_left_out() -> None:
    known = [d.name for d in paper_descriptors()]
    assert [d.name for d in general_descriptors(str(weights("scene-clip")))] == [*known, "clip"]
    assert [d.name for d in general_descriptors("nobody/no-clip")] == known


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


def made_up(
    scores: dict[str, tuple[float, float]], null: float = 0.1, *, layer: str = "mid_block", pairs: int = 8
) -> pd.DataFrame:
    """Rows of so many pairs a factor, one layer, with the given mean transfers and spreads."""
    rng = np.random.default_rng(0)
    place = {"descriptor": "reader", "window": "all", "order": 0, "layer": layer, "noise": 0, "damage": 0.0}
    rows = []
    for factor, (mean, spread) in scores.items():
        for i in range(pairs):
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


def of(structure: float, content: float, surface: float) -> dict[str, tuple[float, float]]:
    return {"structure": (structure, 0.02), "content": (content, 0.02), "surface": (surface, 0.02)}


def test_what_is_said_names_who_carries_what_and_what_no_layer_carries() -> None:
    layers = {
        "a": of(0.9, 0.1, 0.2),
        "b": of(0.7, 0.1, 0.2),
        "c": of(0.2, 0.1, 0.8),
        "d": of(0.95, 0.95, 0.96),
        "e": of(0.1, 0.1, 0.1),
    }
    rows = pd.concat([made_up(scores, layer=layer).assign(order=i) for i, (layer, scores) in enumerate(layers.items())])
    summary = Summary.of(["all"], rows)
    assert [summary.role_of["all", la] for la in "abcde"] == ["structure", "structure", "surface", EVERYTHING, NO_ROLE]
    told = {c["role"]: [k["layer"] for k in c["carriers"]] for c in summary.carriers()}
    assert told == {"structure": ["a", "b"], "content": [], "surface": ["c"], EVERYTHING: ["d"]}
    said = re.sub(r"0\.\d\d", "#", says(summary))
    assert said == (
        "By the scene reader, structure comes over with a (#) and b (#); surface comes over with c (#); "
        "everything comes over with d (#); no layer is shown to carry content alone."
    )
    both = pd.concat([rows, rows.assign(window="0%-50%")])
    assert says(Summary.of(["all", "0%-50%"], both)).startswith("At all steps, by the scene reader, structure")
    assert says(Summary.of(["0%-50%", "all"], both)).startswith("At steps 0%-50%, by the scene reader, structure")
    many = [made_up(of(0.9, 0.1, 0.2), layer=f"layer{i}").assign(order=i) for i in range(6)]
    assert "and 3 others; no layer is shown to carry content or surface alone." in says(Summary.of(["all"], pd.concat(many)))


def test_what_is_said_of_few_pairs_one_factor_and_no_role_at_all() -> None:
    few = says(Summary.of(["all"], made_up(of(0.9, 0.1, 0.2), pairs=4)))
    assert few.endswith("With only 4 pairs a factor, intervals are coarse.")
    one = says(Summary.of(["all"], made_up(of(1.0, 0.1, 0.2), pairs=1)))
    assert one.startswith("No layer can have a role: one pair of a factor")
    nothing = says(Summary.of(["all"], made_up(of(0.1, 0.1, 0.1))))
    assert nothing == "By the scene reader, no layer is shown to carry structure, content or surface alone."
    two = [made_up({"own": (mean, 0.02)}, layer=layer) for layer, mean in (("a", 0.3), ("b", 0.8))]
    alone = says(Summary.of(["all"], pd.concat(two)))
    assert alone.startswith("By the scene reader, most comes over with b (0.") and "One factor alone gives no roles" in alone
    equal = made_up({"own": (0.3, 0.02)}).assign(transfer=math.nan, damage=math.nan)
    assert says(Summary.of(["all"], equal)).startswith("By the scene reader, O and E do not differ: nothing could come over.")


def test_avatars_show_a_face_and_faceless_heads_none() -> None:
    from probekit.data.avatars import Avatars
    from probekit.metrics.readers import show_faces, without_faces

    data = Avatars()
    index = data.split("test")[:200]
    images = data.images(index)
    assert show_faces(images).float().mean() >= 0.97
    assert show_faces(without_faces(images, index)).float().mean() <= 0.02
    assert not show_faces(torch.zeros(1, 3, 32, 32)).any()
