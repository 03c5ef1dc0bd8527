from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from probekit.hooks.errors import ProbekitError
from probekit.latents import LatentSpace
from probekit.models.families.glow import Glow, as_model, config_of, nll
from probekit.models.model import Model
from probekit.models.papers import checkpoint
from probekit.models.papers.rosinality import from_rosinality, matches
from tests.conftest import golden

KINDS = list(product([True, False], [True, False]))  # affine, lu


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(n: int, size: int, seed: int = 0) -> Tensor:
    """Smooth 8-bit pictures in [-1, 1]."""
    coarse = torch.rand(n, 3, 4, 4, generator=seeded(seed))
    fine = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)
    return (fine * 255).round() / 127.5 - 1


def glow(*, affine: bool = True, lu: bool = True, flows: int = 2, blocks: int = 3, width: int = 16, size: int = 32) -> Glow:
    """A network whose every part has an effect: initialised, then moved off its zeros."""
    torch.manual_seed(0)
    network = Glow(in_channels=3, flows=flows, blocks=blocks, affine=affine, lu=lu, width=width)
    generator = seeded(1)
    with torch.no_grad():
        network(pictures(4, size, seed=5) / 2 + 0.02 * torch.randn(4, 3, size, size, generator=generator))
        for p in network.parameters():
            p += 0.03 * torch.randn(p.shape, generator=generator)
    return network


def reference(kind: str) -> tuple[Glow, dict[str, Tensor]]:
    """Rosinality's network, and what it gave."""
    state, case, _ = golden(f"glow_{kind}")
    network = Glow(**config_of(state))
    network.load_state_dict(state, strict=True)
    return network, case


@pytest.mark.parametrize("kind", ["affine", "additive"])
@torch.no_grad()
def test_golden_forward_and_reconstruction(kind: str) -> None:
    network, case = reference(kind)
    log_p, logdet, zs = network(case["x"])
    assert log_p.shape == logdet.shape == (4,)
    torch.testing.assert_close(log_p, case["log_p"], rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(logdet, case["logdet"].expand(4), rtol=1e-6, atol=1e-4)
    for i, z in enumerate(zs):
        torch.testing.assert_close(z, case[f"z{i}"], rtol=0, atol=1e-5)
    given = [case["z0"], case["z1"]]
    torch.testing.assert_close(network.reverse(given, reconstruct=True), case["reverse_reconstruct"], rtol=0, atol=1e-4)


@torch.no_grad()
def test_golden_sample_of_additive_couplings() -> None:
    network, case = reference("additive")
    torch.testing.assert_close(network.reverse([case["eps0"], case["eps1"]]), case["sample"], rtol=0, atol=1e-5)


@torch.no_grad()
def test_golden_sample_of_affine_couplings() -> None:
    """The random weights blow it up in the reference too: most of it is infinite or no number, the rest as large as 1e27."""
    network, case = reference("affine")
    made, expected = network.reverse([case["eps0"], case["eps1"]]), case["sample"]
    torch.testing.assert_close(made.isnan(), expected.isnan())
    torch.testing.assert_close(made.isinf(), expected.isinf())
    finite = expected.isfinite()
    torch.testing.assert_close(made[finite], expected[finite], rtol=5e-3, atol=1e-4)
    # where it does not blow up: the eps of the golden z must bring back the golden image
    eps = [level.eps for level in network.levels(case["x"])]
    torch.testing.assert_close(network.reverse(eps), case["reverse_reconstruct"], rtol=0, atol=1e-4)


def assert_exact(space: LatentSpace, images: Tensor) -> None:
    latents = space.encode(images)
    assert latents.shape == (len(images), images[0].numel()) and latents.dtype == torch.float32
    torch.testing.assert_close(space.decode(latents), images, rtol=0, atol=1e-4)
    alone = torch.cat([space.decode(latent[None]) for latent in latents])
    torch.testing.assert_close(alone, space.decode(latents), rtol=0, atol=1e-5)
    torch.testing.assert_close(alone, images, rtol=0, atol=1e-4)
    torch.testing.assert_close(space.encode(images[1:2]), latents[1:2], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("affine", "lu"), KINDS)
def test_decoding_inverts_encoding_before_and_after_training(affine: bool, lu: bool) -> None:
    torch.manual_seed(0)
    network = Glow(in_channels=3, flows=3, blocks=3, affine=affine, lu=lu, width=16)
    images, generator = pictures(6, 32), seeded(0)
    nll(network, images, generator)
    for space in as_model(network, "flow", 32).spaces.values():
        assert_exact(space, images)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(5):
        optimizer.zero_grad()
        nll(network, images, generator).backward()
        optimizer.step()
    z, eps = (space.encode(images) for space in as_model(network, "flow", 32).spaces.values())
    assert (z - eps).abs().max() > 0.01
    for space in as_model(network, "flow", 32).spaces.values():
        assert_exact(space, images)


def test_the_first_batch_and_no_other_normalises() -> None:
    torch.manual_seed(0)
    network = Glow(in_channels=3, flows=1, blocks=2, affine=True, lu=True, width=8)
    images = pictures(4, 16) / 2 + 0.01 * torch.randn(4, 3, 16, 16, generator=seeded(0))
    outputs: list[Tensor] = []
    actnorm: Any = network.blocks[0].flows[0].actnorm
    actnorm.register_forward_hook(lambda module, given, made: outputs.append(made[0].detach()))
    with torch.no_grad():
        network(images)
        once = {key: value.clone() for key, value in network.state_dict().items()}
        network(2 * images)
    torch.testing.assert_close(outputs[0].mean((0, 2, 3)), torch.zeros(12), rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs[0].std((0, 2, 3)), torch.ones(12), rtol=0, atol=1e-3)
    assert once["blocks.0.flows.0.actnorm.initialized"].item() == 1
    torch.testing.assert_close(network.state_dict(), once, rtol=0, atol=0)


@pytest.mark.parametrize(("affine", "lu"), KINDS)
def test_logdet_is_that_of_the_jacobian(affine: bool, lu: bool) -> None:
    network = glow(affine=affine, lu=lu, flows=2, blocks=2, width=8, size=4).double()
    image = (pictures(1, 4, seed=3) / 2).double()

    def latents(x: Tensor) -> Tensor:
        return torch.cat([z.flatten() for z in network(x)[2]])

    jacobian: Any = torch.autograd.functional.jacobian(latents, image)
    expected = torch.linalg.slogdet(jacobian.reshape(48, 48)).logabsdet
    torch.testing.assert_close(network(image)[1][0], expected, rtol=0, atol=1e-5)


def test_log_p_is_that_of_the_normalised_latents() -> None:
    network, images = glow().double(), pictures(3, 32).double() / 2
    with torch.no_grad():
        levels = network.levels(images)
        log_p = network(images)[0]
    # dz = exp(log_sd) d eps, and z is affine in eps: sd is what reverse does to a unit of eps
    eps = [level.eps for level in levels]
    with torch.no_grad():
        last = network.z_of([*eps[:-1], eps[-1] + 1])[-1] - levels[-1].z
        other = [network.z_of([*eps[:i], eps[i] + 1, *eps[i + 1 :]])[i] - levels[i].z for i in (0, 1)]
    standard = torch.distributions.Normal(0, 1)
    expected = sum((standard.log_prob(e) - sd.log()).flatten(1).sum(1) for e, sd in zip(eps, [*other, last], strict=True))
    torch.testing.assert_close(log_p, expected, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize(("affine", "lu"), KINDS)
def test_gradients_reach_every_weight(affine: bool, lu: bool) -> None:
    network = glow(affine=affine, lu=lu)
    nll(network, pictures(2, 32), seeded(0)).backward()
    for key, p in network.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, key


def test_nll_falls_in_training() -> None:
    torch.manual_seed(0)
    network = Glow(in_channels=3, flows=2, blocks=2, affine=True, lu=True, width=16)
    images, generator = pictures(8, 16), seeded(0)
    nll(network, images, generator)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nll(network, images, generator)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("bits", [5, 8])
def test_nll_of_a_known_density(bits: int) -> None:
    """A flow of 1x1 rotations and a standard normal prior: its density of an image is that of the noisy pixels themselves."""
    torch.manual_seed(0)
    network = Glow(in_channels=3, flows=1, blocks=1, affine=False, lu=True, width=4)
    for key, buffer in network.named_buffers():
        if key.endswith("initialized"):
            buffer.fill_(1)
    levels = torch.arange(256).repeat(3)[None].view(1, 3, 16, 16)
    x = (levels // 2 ** (8 - bits) + torch.rand(1, 3, 16, 16, generator=seeded(4))) / 2**bits - 0.5
    dimensions = x.numel()
    log_density = (-0.5 * math.log(2 * math.pi) * dimensions - 0.5 * x.square().sum()) / dimensions
    expected = (bits * math.log(2) - log_density) / math.log(2)
    # as a PNG's pixels come: rounding errors must not drop a value into the bin below
    found = nll(network, levels.float() / 255 * 2 - 1, seeded(4), bits)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_nll_draws_its_noise_from_the_generator() -> None:
    network, images = glow(), pictures(2, 32)
    with torch.no_grad():
        first, again, other = (nll(network, images, seeded(s)) for s in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize(("affine", "lu"), KINDS)
def test_config_is_read_from_the_state(affine: bool, lu: bool) -> None:
    config = {"in_channels": 3, "flows": 3, "blocks": 2, "affine": affine, "lu": lu, "width": 20}
    network = Glow(**config)
    assert config_of(network.state_dict()) == config
    # rosinality leaves the last block's convolutions decomposed
    assert ("blocks.0.flows.0.invconv.weight" in network.state_dict()) == (not lu)
    assert "blocks.1.flows.0.invconv.w_p" in network.state_dict()


def test_width_is_512_as_in_rosinality_unless_told() -> None:
    assert config_of(Glow(in_channels=1, flows=1, blocks=1, affine=True, lu=True).state_dict())["width"] == 512


def test_latent_shapes_are_those_of_the_latents() -> None:
    network = glow()
    assert network.latent_shapes(32) == [tuple(z.shape[1:]) for z in network(pictures(1, 32))[2]]
    assert network.latent_shapes(64) == [(6, 32, 32), (12, 16, 16), (48, 8, 8)]
    assert sum(math.prod(shape) for shape in network.latent_shapes(64)) == 12288
    with pytest.raises(ProbekitError, match="image size 36: a Glow of 3 blocks takes multiples of 8"):
        network.latent_shapes(36)


def test_spaces() -> None:
    made = as_model(glow(), "flow", 32)
    assert (made.family, made.image_size, made.space().name) == ("glow", 32, "z")
    assert {space.name: space.shape for space in made.spaces.values()} == {"z": (3072,), "eps": (3072,)}


def test_samples_of_z_decode_to_what_their_eps_give() -> None:
    network = glow()
    made = as_model(network, "flow", 32)
    eps = 0.7 * torch.randn(5, 3072, generator=seeded(9))
    parts = [
        part.unflatten(1, shape) for part, shape in zip(eps.split([1536, 768, 768], 1), network.latent_shapes(32), strict=True)
    ]
    with torch.no_grad():
        expected = (2 * network.reverse(parts)).clamp(-1, 1)
    z = made.space("z").sample(5, seeded(9))
    assert (z - eps).abs().max() > 0.01
    torch.testing.assert_close(made.space("z").decode(z), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(made.space("eps").sample(5, seeded(9)), eps)
    torch.testing.assert_close(made.space("eps").decode(eps), expected, rtol=0, atol=1e-5)


def test_z_holds_the_levels_in_order_of_images_at_half_their_range() -> None:
    network, images = glow(), pictures(2, 32)
    with torch.no_grad():
        expected = torch.cat([z.flatten(1) for z in network(images / 2)[2]], 1)
    torch.testing.assert_close(as_model(network, "flow", 32).space("z").encode(images), expected, rtol=0, atol=0)


def test_decoded_images_stay_in_range() -> None:
    decoded = as_model(glow(), "flow", 32).space("z").decode(20 * torch.randn(2, 3072, generator=seeded(0)))
    assert decoded.min() == -1 and decoded.max() == 1
    burst = as_model(glow(), "flow", 32).space("z").decode(torch.full((1, 3072), float("inf")))
    assert torch.isfinite(burst).all()  # what overflows is still a picture


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ProbekitError, match=r"model 'flow': images of shape \(3, 16, 16\), it takes \(3, 32, 32\)"):
        as_model(glow(), "flow", 32).space().encode(pictures(1, 16))


def test_a_network_that_is_not_initialised_has_no_spaces() -> None:
    with pytest.raises(ProbekitError, match="model 'flow': its ActNorm layers are not initialised"):
        as_model(Glow(in_channels=3, flows=1, blocks=1, affine=True, lu=True, width=4), "flow", 32)


@pytest.mark.parametrize(("affine", "lu"), KINDS)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_file_of_rosinality_gives_the_same_images(tmp_path: Path, prefix: str, affine: bool, lu: bool) -> None:
    network = glow(affine=affine, lu=lu, size=64)
    path = tmp_path / "model_000001.pt"
    torch.save({f"{prefix}{key}": value for key, value in network.state_dict().items()}, path)
    random = torch.get_rng_state()
    content = checkpoint.read(path)
    assert matches(content)
    read, expected = from_rosinality(content, "flow"), as_model(network, "flow", 64)
    assert torch.equal(random, torch.get_rng_state())
    assert isinstance(read, Model) and read.image_size == 64 and read.digest == expected.digest
    z = expected.space().sample(2, seeded(0))
    assert torch.equal(read.space().sample(2, seeded(0)), z)
    assert torch.equal(read.space().decode(z), expected.space().decode(z))


def spoilt(name: str) -> Any:
    state: dict[Any, Any] = dict(glow(width=4, blocks=2).state_dict())
    match name:
        case "list":
            return [1, 2]
        case "optimizer":
            return {"state": {0: {"step": 1}}, "param_groups": [{"lr": 1e-4}]}
        case "numbered":
            return {0: torch.zeros(2)}
        case "missing":
            del state["blocks.1.prior.scale"]
        case "more":
            state["blocks.0.flows.0.attention.weight"] = torch.zeros(2)
        case "shape":
            state["blocks.1.flows.0.coupling.net.2.weight"] = torch.zeros(5, 4, 1, 1)
        case "flat":
            state["blocks.0.flows.0.actnorm.loc"] = torch.zeros(12)
        case "channels":
            state["blocks.0.flows.0.actnorm.loc"] = torch.zeros(1, 3, 1, 1)
        case "grey":
            return Glow(in_channels=1, flows=1, blocks=1, affine=True, lu=True, width=4).state_dict()
    return state


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("list", "a list that is no state dict"),
        ("optimizer", "is no Glow, it has no blocks.0.flows.0.actnorm.loc"),
        ("numbered", "a dict that is no state dict"),
        ("missing", "lacks blocks.1.prior.scale"),
        ("more", "has, beyond a Glow's weights, blocks.0.flows.0.attention.weight"),
        ("shape", r"blocks.1.flows.0.coupling.net.2.weight has shape \(5, 4, 1, 1\), a Glow's is \(4, 4, 1, 1\)"),
        ("flat", "too few dimensions"),
        ("channels", "its first flow has 3 channels"),
        ("grey", "a Glow of 1 channels, images have 3"),
    ],
)
def test_what_is_no_glow_is_refused_in_one_line(name: str, said: str) -> None:
    with pytest.raises(ProbekitError, match=said) as error:
        from_rosinality(spoilt(name), "flow")
    assert str(error.value).startswith("model 'flow': ") and "\n" not in str(error.value)


def test_other_networks_do_not_match() -> None:
    assert not matches([])
    assert not matches(["encoder.0.weight", "blocks.0.flows.0.actnorm.loc"])
    assert not matches(torch.nn.Linear(2, 2).state_dict())
