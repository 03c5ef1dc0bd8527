from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probekit.hooks.errors import ProbekitError
from probekit.models.families import stylegan2
from probekit.models.families.stylegan2 import Discriminator, Generator
from probekit.models.papers import checkpoint, stylegan2_ada
from tests.conftest import SOURCE, golden

SMALL: dict[str, Any] = {
    "z_dim": 12,
    "w_dim": 16,
    "image_size": 16,
    "mapping_layers": 2,
    "channels": [10, 8, 6],
    "conv_clamp": 256.0,
    "c_dim": 0,
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(**changes: Any) -> Generator:
    """A generator whose noise, mean w and biases all have an effect, and whose images stay in [-1, 1]."""
    torch.manual_seed(0)
    made = Generator(**SMALL | changes).eval()
    with torch.no_grad():
        for name, p in made.named_parameters():
            if name.endswith(("noise_strength", "bias")):
                p += 0.3 * torch.randn(p.shape)
            if "torgb.weight" in name:
                p *= 0.05
        made.mapping.w_avg += 0.5 * torch.randn(made.w_dim)
    return made


@torch.no_grad()
def test_the_networks_give_what_the_reference_gives() -> None:
    state, case, _ = golden("stylegan2_ada")
    assert stylegan2.is_state(state)
    made = Generator(**stylegan2.config_of(state)).eval()
    made.load_state_dict(state)
    assert torch.allclose(made.mapping(case["z"]), case["ws"], atol=1e-5)
    assert torch.allclose(made.mapping(case["z"], 0.7), case["ws_truncated_0.7"], atol=1e-5)
    for noise in ("const", "none"):
        images = made(case["z"], noise=noise)
        assert torch.allclose(images, case[f"image_noise_{noise}"], atol=2e-5)
    w = stylegan2.as_model(made, "own").space("w")
    assert torch.allclose(w.decode(case["ws"][:, 0]), case["image_noise_const"].clamp(-1, 1), atol=2e-5)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("protocol", [3, 4])  # the defaults of Python 3.7 and of 3.8 on
def test_an_ada_pickle_gives_the_images_of_the_network_in_it(
    reference: Callable[..., bytes], tmp_path: Path, protocol: int
) -> None:
    original = network()
    content = checkpoint.read(write(tmp_path / "network.pkl", reference(original, protocol=protocol)))
    assert stylegan2_ada.matches(content)
    loaded = stylegan2_ada.from_ada(content, "faces")
    assert (loaded.name, loaded.family, loaded.image_size) == ("faces", "stylegan2", 16)
    state, expected = loaded.network.state_dict(), original.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    z = torch.randn(3, 12, generator=seeded(1))
    with torch.no_grad():
        images = original(z)
    assert torch.equal(loaded.space("z").decode(z), images.clamp(-1, 1))
    assert loaded.digest == stylegan2.as_model(original, "other").digest


@pytest.mark.parametrize("clamp", [None, 0.02])
def test_the_clamp_of_a_pickle_is_kept(reference: Callable[..., bytes], tmp_path: Path, clamp: float | None) -> None:
    original = network(conv_clamp=clamp)
    loaded = stylegan2_ada.from_ada(checkpoint.read(write(tmp_path / "n.pkl", reference(original, clamp=clamp))), "n")
    z = torch.randn(2, 12, generator=seeded(1))
    with torch.no_grad():
        images = original(z)
        assert torch.equal(loaded.network(z), images)
        # of three to-RGB outputs; up-sampling adds nothing to their range
        assert (images.abs().max() <= 3 * 0.02 + 1e-6) == (clamp is not None)


def test_the_source_in_a_pickle_never_runs(reference: Callable[..., bytes], tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    source = f"open({str(marker)!r}, 'w').close()\n" + SOURCE
    exec(source, {})  # it does what it is feared to do
    marker.unlink()
    content = checkpoint.read(write(tmp_path / "network.pkl", reference(network(), source=source)))
    stylegan2_ada.from_ada(content, "faces").space().sample(1, seeded(0))
    assert stylegan2_ada.matches(content)
    assert not marker.exists()


def test_a_pickle_that_runs_a_command_is_refused(reference: Callable[..., bytes], tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Bad:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {marker}",)

    def poison(generator: Any) -> None:
        generator.synthesis.b4.conv1.extra = Bad()

    path = write(tmp_path / "network.pkl", reference(network(), change=poison))
    with pytest.raises(ProbekitError, match=r"network\.pkl.*system") as error:
        checkpoint.read(path)
    assert "\n" not in str(error.value)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Bad()))
    assert marker.exists()  # the very same object does run where a pickle may


def _conditional(generator: Any) -> None:
    generator.mapping.embed = generator.mapping.fc0


def _lose(generator: Any) -> None:
    del generator.synthesis.b8.torgb


def _sigmoid(generator: Any) -> None:
    generator.synthesis.b4.conv1.activation = "sigmoid"


def _faster(generator: Any) -> None:
    generator.mapping.fc0.bias_gain = 1.0


def _headless(generator: Any) -> None:
    del generator._modules["synthesis"]


def _bad_clamp(generator: Any) -> None:
    generator.synthesis.b4.conv1.conv_clamp = "a\nlot"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_conditional, "conditional"),
        (_lose, r"synthesis\.b8\.torgb"),
        (_sigmoid, "activation"),
        (_faster, "bias_gain"),
        (_headless, "synthesis"),
        (_bad_clamp, "conv_clamp"),
    ],
)
def test_a_pickle_of_another_generator_is_refused_in_one_line(
    reference: Callable[..., bytes], tmp_path: Path, change: Callable[[Any], None], says: str
) -> None:
    content = checkpoint.read(write(tmp_path / "n.pkl", reference(network(), change=change)))
    with pytest.raises(ProbekitError, match=f"model 'faces'.*{says}") as error:
        stylegan2_ada.from_ada(content, "faces")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [{}, {"G_ema": None}, {"G_ema": {"state": {}}}, {"state_dict": {}}, [1], None])
def test_what_is_no_stylegan2_is_not_taken_for_one(content: Any) -> None:
    assert not stylegan2_ada.matches(content) and not stylegan2.is_state(content)
    with pytest.raises(ProbekitError, match=r"model 'x'.*G_ema"):
        stylegan2_ada.from_ada(content, "x")


def test_a_pickle_that_holds_itself_is_refused() -> None:
    meta: dict[str, Any] = {"state": {"_parameters": {}, "_buffers": {}}}
    item = type("X", (checkpoint.Foreign,), {"name": "torch_utils.persistence._reconstruct_persistent_obj"})(meta)
    meta["state"]["_modules"] = dict.fromkeys(("synthesis", "b4", "conv1", "mapping", "fc0"), item)
    with pytest.raises(ProbekitError, match="'G_ema' is no StyleGAN2 generator"):
        stylegan2_ada.from_ada({"G_ema": item}, "x")


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        SMALL | {"z_dim": 20, "w_dim": 9, "image_size": 64, "mapping_layers": 5, "channels": [12, 12, 10, 7, 5]},
    ],
)
def test_the_config_is_read_from_the_weights(config: dict[str, Any]) -> None:
    state = Generator(**config).state_dict()
    assert stylegan2.is_state(state)
    assert stylegan2.config_of(state) == config
    Generator(**stylegan2.config_of(state)).load_state_dict(state)


def test_weights_that_are_no_rgb_generator_are_refused() -> None:
    state = network().state_dict()
    gray = state | {"synthesis.b4.torgb.weight": torch.zeros(1, 10, 1, 1)}
    gap = {key: value for key, value in state.items() if ".b8." not in key}
    conditional = state | {"mapping.embed.weight": torch.zeros(16, 5)}
    for wrong, says in ((gray, "1 channels"), (gap, r"\[4, 16\]"), (conditional, "conditional"), ({}, "none")):
        with pytest.raises(ProbekitError, match=says):
            stylegan2.config_of(wrong)


@pytest.mark.parametrize(
    ("change", "says"),
    [({"image_size": 48}, "image_size 48"), ({"channels": [8, 8]}, r"channels \[8, 8\].*needs 3"), ({"c_dim": 10}, "c_dim 10")],
)
def test_sizes_that_do_not_fit_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ProbekitError, match=says):
        Generator(**SMALL | change)


@torch.no_grad()
def test_truncation_goes_from_the_mean_image_to_none() -> None:
    made = network()
    z = torch.randn(4, 12, generator=seeded(0))
    assert torch.equal(made(z, 1.0), made.synthesis(made.mapping(z)))
    mean = made.synthesis(made.mapping.w_avg.expand(4, made.num_ws, -1))
    assert torch.equal(made(z, 0.0), mean)
    assert not torch.allclose(made(z, 0.5), mean, atol=1e-3)
    drawn = stylegan2.samples(made, 3, seeded(0), truncation=0.0)
    assert torch.equal(drawn, mean[:3].clamp(-1, 1))


def test_noise_is_none_fixed_or_drawn_from_the_generator() -> None:
    made = network()
    const, none, drawn = (stylegan2.samples(made, 3, seeded(5), noise=noise) for noise in ("const", "none", "random"))
    for noise, images in (("const", const), ("none", none), ("random", drawn)):
        assert images.shape == (3, 3, 16, 16)
        assert images.abs().max() <= 1
        torch.manual_seed(9)  # the global generator has no say
        assert torch.equal(stylegan2.samples(made, 3, seeded(5), noise=noise), images)
    for one, other in ((const, none), (const, drawn), (none, drawn)):
        assert (one - other).abs().amax((1, 2, 3)).min() > 1e-3
    with torch.no_grad():
        z = torch.randn(1, 12, generator=seeded(5)).expand(2, -1)
        same, other = made(z, noise="random", generator=seeded(1))
        fixed = made(z, noise="const")
    assert not torch.allclose(same, other, atol=1e-3)  # each image has noise of its own
    assert torch.allclose(fixed[0], fixed[1], atol=1e-6)
    with pytest.raises(ProbekitError, match="noise 'loud': choose const, none, random"):
        stylegan2.samples(made, 1, seeded(0), noise="loud")
    with pytest.raises(ProbekitError, match=r"noise 'random': needs a torch\.Generator"):
        made(torch.randn(1, 12), noise="random")


def test_the_spaces_agree() -> None:
    model = stylegan2.as_model(network().train(), "gan")
    before = model.network.mapping.w_avg.clone()
    assert list(model.spaces) == ["w", "z", "w+"]
    w, z, each = (model.space(name) for name in ("w", "z", "w+"))
    assert model.space().name == "w" and model.space().digest == w.digest
    assert (w.shape, z.shape, each.shape) == ((16,), (12,), (6, 16))
    drawn = {space.name: space.sample(3, seeded(2)) for space in (w, z, each)}
    images = w.decode(drawn["w"])
    assert images.shape == (3, 3, 16, 16)
    assert images.dtype == torch.float32
    assert images.std() > 0.05
    assert torch.allclose(z.decode(drawn["z"]), images, atol=1e-6)
    assert torch.allclose(each.decode(drawn["w"].unsqueeze(1).expand(-1, 6, -1)), images, atol=1e-6)
    assert torch.equal(each.sample(3, seeded(2)), drawn["w"].unsqueeze(1).expand(-1, 6, -1))
    assert torch.equal(stylegan2.samples(model.network, 3, seeded(2)), z.decode(drawn["z"]))
    assert torch.equal(w.decode(drawn["w"]), images)
    mixed = drawn["w+"].clone()
    mixed[:, 3:] = mixed[:1, 3:]
    assert not torch.allclose(each.decode(mixed)[1:], images[1:], atol=1e-3)
    assert torch.equal(model.network.mapping.w_avg, before)  # to use a model does not train it


def test_a_spaces_truncation_is_that_of_its_samples() -> None:
    model = stylegan2.as_model(network(), "gan")
    for name in ("w", "z", "w+"):
        made = [space.decode(space.sample(3, seeded(2))) for space in (model.space(name, truncation=psi) for psi in (1, 0.7))]
        expected = [stylegan2.samples(model.network, 3, seeded(2), truncation=psi) for psi in (1.0, 0.7)]
        for images, wanted in zip(made, expected, strict=True):
            assert torch.allclose(images, wanted, atol=1e-6)
        assert not torch.allclose(*made, atol=1e-3)
        assert model.space(f"{name}:truncation=0.7").digest != model.space(name).digest
        for wrong in ("1.1", "-0.1", "nan"):
            with pytest.raises(ProbekitError, match=rf"^space 'gan:{re.escape(name)}:truncation={wrong}': .*choose 0 to 1$"):
                model.space(f"{name}:truncation={wrong}")


def test_a_gan_cannot_encode() -> None:
    model = stylegan2.as_model(network(), "gan")
    for space in model.spaces.values():
        with pytest.raises(ProbekitError, match=r"space 'gan:.*cannot encode") as error:
            space.encode(torch.zeros(1, 3, 16, 16))
        assert "\n" not in str(error.value)


def test_a_modulated_layer_is_a_convolution_with_each_images_own_weights() -> None:
    # equation 1 and 3 of the paper, an image at a time, up-sampled before the convolution
    layer = network().synthesis.b8.conv0
    x, w = torch.randn(2, 10, 4, 4, generator=seeded(0)), torch.randn(2, 16, generator=seeded(1))
    with torch.no_grad():
        made = layer(x, w, "none", None)
        style = layer.affine(w)
        for i in range(2):
            weight = layer.weight * style[i, :, None, None]
            weight = weight / (weight.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
            spread = torch.zeros(10, 1, 8, 8)
            spread[:, 0, ::2, ::2] = x[i]
            taps = torch.outer(*[torch.tensor([1.0, 3, 3, 1]) / 4] * 2)
            wide = F.conv2d(F.pad(spread, (3, 2, 3, 2)), taps[None, None])[:, 0]
            expected = F.conv2d(wide[None], weight.flip(2, 3)) + layer.bias[:, None, None]
            assert torch.allclose(made[i], F.leaky_relu(expected[0], 0.2) * 2**0.5, atol=1e-5)


def test_the_mean_w_follows_training() -> None:
    made = network().train()
    before, z = made.mapping.w_avg.clone(), torch.randn(8, 12, generator=seeded(0))
    w = made.mapping(z)[:, 0]
    assert torch.allclose(made.mapping.w_avg, 0.995 * before + 0.005 * w.detach().mean(0), atol=1e-6)
    after = made.mapping.w_avg.clone()
    made.eval().mapping(z)
    assert torch.equal(made.mapping.w_avg, after)


@pytest.mark.parametrize("n", [1, 4, 6])
def test_the_discriminator_gives_one_number_an_image(n: int) -> None:
    torch.manual_seed(0)
    judge = Discriminator(32, [8, 8, 6, 4])
    images = torch.randn(n, 3, 32, 32, generator=seeded(0))
    assert judge(images).shape == (n, 1)


def test_the_discriminator_sees_how_much_a_group_varies() -> None:
    torch.manual_seed(0)
    judge = Discriminator(16, [8, 6, 4])
    images = torch.randn(4, 3, 16, 16, generator=seeded(0))
    alike = images[:1].repeat(4, 1, 1, 1)
    with torch.no_grad():
        assert (judge(images)[0] - judge(alike)[0]).abs() > 1e-4
        # every fourth of a batch of eight makes a group with the first, as in the reference
        groups = torch.stack([images, alike], 1).flatten(0, 1)
        assert torch.allclose(judge(groups)[::2], judge(images), atol=1e-5)
        assert torch.allclose(judge(groups)[1::2], judge(alike), atol=1e-5)


def test_one_step_of_training_changes_every_weight() -> None:
    torch.manual_seed(0)
    made, judge = network().train(), Discriminator(16, [10, 8, 6])
    real, z, noise = torch.randn(4, 3, 16, 16), torch.randn(4, 12), seeded(0)

    def step(module: nn.Module, loss: Tensor) -> None:
        before = {name: p.detach().clone() for name, p in module.named_parameters()}
        optimizer = torch.optim.Adam(module.parameters(), lr=2e-3, betas=(0.0, 0.99))
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
        optimizer.step()
        assert all(not torch.equal(p, before[name]) for name, p in module.named_parameters())

    # generator: non-saturating loss with path length, a second-order gradient
    ws = made.mapping(z)
    images = made.synthesis(ws, "random", noise)
    (pull,) = torch.autograd.grad((images * torch.randn_like(images)).sum() / 16, ws, create_graph=True)
    lengths = pull.square().sum(2).mean(1).sqrt()
    step(made, F.softplus(-judge(images)).mean() + (lengths - 0.1).square().mean())

    # discriminator: logistic loss with R1
    fake = made(z, noise="random", generator=noise).detach()
    real.requires_grad_(True)
    logits = judge(real)
    (slope,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
    step(judge, (F.softplus(judge(fake)) + F.softplus(-logits)).mean() + 5 * slope.square().sum((1, 2, 3)).mean())
    assert slope.abs().max() > 0
