"""The VAE of DiffuseVAE, the VQ-VAE of diffusers and the random encoder."""

from __future__ import annotations

import argparse
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from probekit.hooks.errors import ProbekitError
from probekit.models.families import random, vae, vqvae
from probekit.models.papers import checkpoint, diffusevae
from tests.conftest import golden

PLAN = {
    "enc_blocks": "16x1,16d2,16t8,8d2,8t4,4x1,4d4,4t1,1x2",
    "enc_channels": "16:16,8:16,4:8,1:12",
    "dec_blocks": "1x1,1u4,1t4,4u2,4t8,8x2,8u2,8t16,16x1",
    "dec_channels": "16:8,8:16,4:16,1:12",
    "input_size": 16,
}
STRINGS = {
    "enc_blocks": "enc_block_str",
    "enc_channels": "enc_channel_str",
    "dec_blocks": "dec_block_str",
    "dec_channels": "dec_channel_str",
}
HYPER_PARAMETERS = {theirs: PLAN[ours] for ours, theirs in STRINGS.items()} | {"input_res": 16, "alpha": 1.0, "lr": 1e-4}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(n: int, size: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=seeded(seed)) * 2 - 1


def one_line(error: pytest.ExceptionInfo[ProbekitError]) -> bool:
    return "\n" not in str(error.value)


# --- the VAE


@pytest.fixture(scope="module")
def network() -> vae.VAE:
    torch.manual_seed(0)
    return vae.VAE(**PLAN)


def test_vae_equals_the_reference():
    state, values, _ = golden("diffusevae")
    model = diffusevae.from_diffusevae(state, "golden")
    images = values["x"] * 2 - 1
    with torch.no_grad():
        mean, log_variance = model.network.encode(images)
    torch.testing.assert_close(mean, values["mu"].flatten(1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(log_variance, values["logvar"].flatten(1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(model.space("mean").encode(images), values["mu"].flatten(1), atol=1e-6, rtol=1e-5)
    decoded = model.space("mean").decode(values["mu"].flatten(1))
    torch.testing.assert_close((decoded + 1) / 2, values["decode_mu"], atol=1e-6, rtol=1e-5)


def test_plan_derived_from_the_reference_tensors_is_the_reference_plan():
    state, _, config = golden("diffusevae")
    derived = vae.config_of(state)
    assert derived.pop("input_size") == config["input_res"]
    assert derived == {ours: config[theirs] for ours, theirs in STRINGS.items()}


@pytest.mark.parametrize(
    "plan",
    [
        PLAN,
        {
            "enc_blocks": "64x7,64d2,64t32,32x4,32d2,32t16,16x7,16d2,16t8,8x3,8d2,8t4,4x3,4d4,4t1,1x2",
            "enc_channels": "64:64,32:128,16:256,8:256,4:256,1:512",
            "dec_blocks": "1x1,1u4,1t4,4x2,4u2,4t8,8x3,8u2,8t16,16x7,16u2,16t32,32x8,32u2,32t64,64x10",
            "dec_channels": "64:64,32:128,16:256,8:256,4:256,1:512",
            "input_size": 64,
        },
        {
            "enc_blocks": "8d2,8t4,4d4,4t1",
            "enc_channels": "8:6,4:4,1:10",
            "dec_blocks": "1u4,1t4,4u2,4t8",
            "dec_channels": "8:4,4:2,1:10",
            "input_size": 8,
        },
    ],
)
def test_plan_survives_the_tensors(plan):
    with torch.device("meta"):
        state = vae.VAE(**plan).state_dict()
    assert vae.config_of(state) == plan


def test_spaces(network):
    model, images = vae.as_model(network, "small"), pictures(3)
    assert (model.family, model.image_size, list(model.spaces)) == ("vae", 16, ["sample", "mean"])
    assert model.space().name == "sample"
    with torch.no_grad():
        mean, log_variance = network.encode(images)
    assert torch.equal(model.space("mean").encode(images), mean)
    draws = torch.stack([model.space().encode(images, seeded(seed)) for seed in range(200)])
    assert torch.equal(draws[7], model.space().encode(images, seeded(7)))
    # means within 5 standard errors, deviations within 25%, which is as much
    deviation = (0.5 * log_variance).exp()
    assert ((draws.mean(0) - mean).abs() < 5 * deviation / 200**0.5).all()
    torch.testing.assert_close(draws.std(0), deviation, rtol=0.25, atol=0)
    for space in model.spaces.values():
        assert space.shape == (12,)
        decoded = space.decode(draws[0])
        assert decoded.shape == images.shape
        assert decoded.min() >= -1
        assert decoded.max() <= 1
        drawn = space.sample(5000, seeded())
        assert drawn.shape == (5000, 12)
        assert drawn.mean().abs() < 0.02
        assert abs(drawn.std() - 1) < 0.02


def test_images_of_another_size_are_refused(network):
    with pytest.raises(ProbekitError, match=r"\(3, 32, 32\): the VAE takes \(3, 16, 16\)"):
        vae.as_model(network, "small").space().encode(pictures(1, 32))


def test_vae_loss_is_the_reference_objective_a_mean_over_images(network):
    images = pictures(4)
    with torch.no_grad():
        value, numbers = vae.loss(network, images, seeded(3), beta=0.5)
        # the reference: sums over everything, images in [0, 1]
        mean, log_variance = network.enc((images + 1) / 2)
        z = mean + (0.5 * log_variance).exp() * torch.randn(4, 12, generator=seeded(3))[..., None, None]
        error = torch.nn.MSELoss(reduction="sum")(network.dec(z), (images + 1) / 2)
        divergence = torch.distributions.kl_divergence(
            torch.distributions.Normal(mean, (0.5 * log_variance).exp()), torch.distributions.Normal(0, 1)
        ).sum()
    torch.testing.assert_close(value, (error + 0.5 * divergence) / 4)
    assert numbers == pytest.approx({"squared_error": error.item() / 4, "kl": divergence.item() / 4}, rel=1e-4)


def test_vae_learns():
    torch.manual_seed(0)
    network, images = vae.VAE(**PLAN), pictures(8)
    images = images.mean((2, 3), keepdim=True).sign().expand_as(images)  # plain colours
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    losses = []
    for step in range(20):
        value, _ = vae.loss(network, images, seeded(step))
        optimizer.zero_grad()
        value.backward()
        assert all(p.grad is not None for p in network.parameters())
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"enc_blocks": "16x1,16u2,16t1"}, "'16u2' is none of"),
        ({"dec_blocks": "1u16,1t16,16q3"}, "'16q3' is none of"),
        ({"enc_blocks": "16x1,16d0,16t1"}, "'16d0' is none of"),
        ({"enc_channels": "16:16,8:16,4:8"}, "enc_channels: no width for 1 pixels"),
        ({"dec_channels": "16-8,1:12"}, "dec_channels '16-8,1:12': is no list"),
        ({"enc_blocks": "16x1,16d2,16t1"}, "leads from 16 pixels to 8"),
        ({"dec_blocks": "1u8,1t8,8x1"}, "leads from 1 pixel to 8, images have 16"),
        ({"dec_channels": "16:8,8:16,4:16,1:6"}, "takes codes of 6 values, the encoder gives 12"),
    ],
)
def test_plans_that_cannot_be_are_refused(change, message):
    with pytest.raises(ProbekitError, match=message) as error:
        vae.VAE(**PLAN | change)
    assert one_line(error)


@pytest.fixture
def lightning(monkeypatch):
    """Stand-ins for the classes that Lightning and pathlib leave in a checkpoint; removed again by calling the result."""
    names = (
        "pytorch_lightning",
        "pytorch_lightning.utilities",
        "pytorch_lightning.utilities.parsing",
        "pytorch_lightning.callbacks",
    )
    modules = {name: types.ModuleType(name) for name in names}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    for module, name, bases in ((names[2], "AttributeDict", (dict,)), (names[3], "ModelCheckpoint", ())):
        setattr(modules[module], name, type(name, bases, {"__module__": module}))

    def remove():
        for name in names:
            monkeypatch.delitem(sys.modules, name)

    return types.SimpleNamespace(
        AttributeDict=modules[names[2]].AttributeDict, ModelCheckpoint=modules[names[3]].ModelCheckpoint, remove=remove
    )


@pytest.mark.parametrize("kind", ["dict", "Namespace", "AttributeDict", "without input_res", "absent"])
@pytest.mark.parametrize("prefix", ["", "module.", "vae."])
def test_lightning_checkpoint(tmp_path, network, lightning, kind, prefix):
    # the tensors of this plan do not tell it: it enlarges in two steps before one transition
    odd = PLAN | {"dec_blocks": "1x1,1u2,1u2,1t4,4u2,4t8,8x2,8u2,8t16,16x1"}
    if kind != "absent":
        torch.manual_seed(1)
        network = vae.VAE(**odd)
    hyper_parameters = HYPER_PARAMETERS | {"dec_block_str": odd["dec_blocks"]}
    held = {
        "dict": hyper_parameters,
        "Namespace": argparse.Namespace(**hyper_parameters),
        "AttributeDict": lightning.AttributeDict(hyper_parameters),
        "without input_res": {key: value for key, value in hyper_parameters.items() if key != "input_res"},
        "absent": None,
    }[kind]
    content = {
        "epoch": 3,
        "pytorch-lightning_version": "1.4.9",
        "state_dict": {f"{prefix}{key}": value for key, value in network.state_dict().items()},
        "callbacks": {lightning.ModelCheckpoint: {"best_model_score": torch.tensor(1.0), "dirpath": Path("/results")}},
        "hparams_name": "kwargs",
    } | ({"hyper_parameters": held} if held is not None else {})
    if prefix == "vae.":  # a stage-2 checkpoint has the diffusion model beside the VAE
        content["state_dict"]["online_network.decoder.conv.weight"] = torch.zeros(2)
    torch.save(content, tmp_path / "vae.ckpt")
    lightning.remove()

    read = checkpoint.read(tmp_path / "vae.ckpt")
    assert diffusevae.matches(read)
    model = diffusevae.from_diffusevae(read, "celeba")
    images = pictures(2)
    assert torch.equal(model.space("mean").encode(images), vae.as_model(network, "").space("mean").encode(images))
    code = torch.randn(2, 12, generator=seeded())
    assert torch.equal(model.space().decode(code), vae.as_model(network, "").space().decode(code))


def test_bare_state_in_safetensors(tmp_path, network):
    save_file(network.state_dict(), tmp_path / "vae.safetensors")
    read = checkpoint.read(tmp_path / "vae.safetensors")
    assert diffusevae.matches(read)
    assert diffusevae.from_diffusevae(read, "bare").digest == vae.as_model(network, "x").digest


def test_plan_that_nothing_tells_is_refused():
    odd = vae.VAE(**PLAN | {"dec_blocks": "1x1,1u2,1u2,1t4,4u2,4t8,8x2,8u2,8t16,16x1"})
    with pytest.raises(
        ProbekitError, match=r"model 'odd': the plan cannot be told .* hyper_parameters lacks one of enc_block_str"
    ) as error:
        diffusevae.from_diffusevae({"state_dict": odd.state_dict()}, "odd")
    assert one_line(error)


@pytest.mark.parametrize("hyper_parameters", [HYPER_PARAMETERS, None])
def test_incomplete_tensors_are_refused(network, hyper_parameters):
    state = network.state_dict()
    del state["enc.block_mod.0.c3.bias"]
    with pytest.raises(
        ProbekitError, match=r"model 'cut': tensor 'enc.block_mod.0.c3.bias' is None, its plan says \(8,\)"
    ) as error:
        diffusevae.from_diffusevae({"state_dict": state, "hyper_parameters": hyper_parameters}, "cut")
    assert one_line(error)


@pytest.mark.parametrize(
    "content", [None, [], {}, {"state_dict": None}, {"state_dict": {"enc.in_conv.weight": torch.zeros(1)}}, {"epoch": 1}]
)
def test_other_files_do_not_match(content):
    assert not diffusevae.matches(content)


# --- the VQ-VAE

VQ = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 3,
    "num_vq_embeddings": 32,
    "norm_num_groups": 4,
    "sample_size": 16,
}


def tiny_vq(**options):
    from diffusers import VQModel

    torch.manual_seed(0)
    network = VQModel(**VQ | options)
    torch.nn.init.normal_(network.quantize.embedding.weight)  # a codebook as wide as a trained one's
    return network.eval()


@pytest.fixture(scope="module")
def vq():
    return tiny_vq()


def test_vqvae_spaces(vq):
    model, images = vqvae.as_model(vq, "vq"), pictures(4)
    assert (model.family, model.image_size, list(model.spaces)) == ("vqvae", 16, ["grid", "quantized"])
    grid, quantized = (model.space(name).encode(images) for name in ("grid", "quantized"))
    assert model.space().name == "grid"
    assert (
        model.space().shape
        == model.space("quantized").shape
        == tuple(grid.shape[1:])
        == tuple(quantized.shape[1:])
        == (3, 8, 8)
    )
    with torch.no_grad():
        assert torch.equal(grid, vq.encode(images).latents)
        reference = vq(images).sample.clamp(-1, 1)
        again = vq.quantize(quantized)[0]
    assert not torch.allclose(grid, quantized)
    codes = set(map(tuple, vq.quantize.embedding.weight.tolist()))
    assert set(map(tuple, quantized.permute(0, 2, 3, 1).reshape(-1, 3).tolist())) <= codes
    assert torch.equal(again, quantized)
    torch.testing.assert_close(model.space("grid").decode(grid), reference)
    torch.testing.assert_close(model.space("quantized").decode(quantized), reference, atol=1e-5, rtol=1e-5)
    # decoding the quantized space takes what it is given as it is
    assert not torch.allclose(model.space("quantized").decode(grid), reference, atol=1e-3)


def test_vqvae_has_no_prior(vq):
    with pytest.raises(ProbekitError, match="'vq:grid': has no prior"):
        vqvae.as_model(vq, "vq").space().sample(1, seeded())


def test_vqvae_at_another_size(vq):
    model = vqvae.as_model(vq, "vq", 32)
    assert model.space().encode(pictures(1, 32)).shape[1:] == model.space().shape == (3, 16, 16)
    with pytest.raises(ProbekitError, match=r"\(3, 16, 16\): model 'vq' takes \(3, 32, 32\)"):
        model.space().encode(pictures(1, 16))
    with pytest.raises(ProbekitError, match="17 pixels; it takes multiples of 2"):
        vqvae.as_model(vq, "vq", 17)


def test_vqvae_of_other_channels_is_refused():
    with pytest.raises(ProbekitError, match="model 'grey': takes 1 and gives 1 channels") as error:
        vqvae.as_model(tiny_vq(in_channels=1, out_channels=1), "grey")
    assert one_line(error)


@pytest.mark.parametrize(
    "options",
    [{}, {"norm_type": "spatial", "block_out_channels": (32, 32)}, {"lookup_from_codebook": True}, {"vq_embed_dim": 5}],
)
def test_both_spaces_decode_alike_whatever_the_config(options):
    model, images = vqvae.as_model(tiny_vq(**options), "vq"), pictures(2)
    grid, quantized = (space.decode(space.encode(images)) for space in model.spaces.values())
    torch.testing.assert_close(grid, quantized, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("part", [".", "vqvae"])
def test_vqvae_folder(tmp_path, vq, part):
    vq.save_pretrained(tmp_path / part)
    if part == "vqvae":
        (tmp_path / "model_index.json").write_text(
            json.dumps({"_class_name": "LDMPipeline", "vqvae": ["diffusers", "VQModel"]})
        )
    model = vqvae.load_folder(tmp_path, "saved")
    assert model.digest == vqvae.as_model(vq, "x").digest
    assert model.image_size == 16


def test_vqvae_folder_with_the_names_of_old_diffusers(tmp_path, vq):
    vq.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state, old = load_file(file), {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, name in old.items():
        state = {key.replace(f".{new}.", f".{name}."): value for key, value in state.items()}
    assert sum(".proj_attn." in key for key in state) == 4
    save_file(state, file, {"format": "pt"})
    assert vqvae.load_folder(tmp_path, "old").digest == vqvae.as_model(vq, "x").digest


def test_other_folders_are_refused(tmp_path, vq):
    from diffusers import AutoencoderKL

    def refused(path, message):
        with pytest.raises(ProbekitError, match=message) as error:
            vqvae.load_folder(path, "folder")
        assert one_line(error)

    refused(tmp_path / "nowhere", "neither a folder nor a hub id")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "model 'folder': no VQModel in .*config.json")
    AutoencoderKL(block_out_channels=(4,), norm_num_groups=2).save_pretrained(tmp_path / "kl")
    refused(tmp_path / "kl", "it holds a AutoencoderKL")
    vq.save_pretrained(tmp_path / "vq")
    (tmp_path / "vq" / "config.json").rename(tmp_path / "config.json")
    (tmp_path / "vq" / "config.json").write_text("{")
    refused(tmp_path / "vq", "no VQModel in .*JSON")
    (tmp_path / "config.json").rename(tmp_path / "vq" / "config.json")
    file = tmp_path / "vq" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    save_file({key: value for key, value in state.items() if key != "quantize.embedding.weight"}, file, {"format": "pt"})
    refused(tmp_path / "vq", "weights lack 1 tensors, 'quantize.embedding.weight'")
    file.write_bytes(file.read_bytes()[:1000])
    refused(tmp_path / "vq", "could not be loaded")
    file.unlink()
    refused(tmp_path / "vq", "could not be loaded")


def test_vqvae_loss_has_the_papers_terms(vq):
    images = pictures(4)
    vq.zero_grad()
    value, numbers = vqvae.loss(vq, images, seeded())
    value.backward()
    with torch.no_grad():
        grid = vq.encode(images).latents
        flat = grid.permute(0, 2, 3, 1).reshape(-1, 3)
        distance, nearest = torch.cdist(flat, vq.quantize.embedding.weight).min(1)
        squared = distance.square().mean().item() / 3
        error = (vq(images).sample - images).square().mean().item()
    assert value.item() == pytest.approx(error + 1.25 * squared, rel=1e-4)
    assert numbers == pytest.approx(
        {"squared_error": error, "codebook": squared, "commitment": squared, "used": len(set(nearest.tolist())) / 32}, rel=1e-4
    )
    # the codebook moves towards its own vectors with weight one, not beta, and feels nothing of the decoder
    codebook = vq.quantize.embedding.weight
    expected = torch.zeros_like(codebook).index_add_(0, nearest, 2 * (codebook.detach()[nearest] - flat)) / flat.numel()
    torch.testing.assert_close(codebook.grad, expected, atol=1e-7, rtol=1e-4)


def test_gradients_pass_the_quantization_unchanged(vq):
    images = pictures(2)
    grid = vq.encode(images).latents.detach()
    quantized = vq.quantize(grid)[0].detach().requires_grad_()
    torch.nn.functional.mse_loss(vq.decode(quantized, force_not_quantize=True).sample, images).backward()
    vq.zero_grad()
    seen = []
    hook = vq.quant_conv.register_full_backward_hook(lambda module, gradient_in, gradient_out: seen.append(gradient_out[0]))
    vqvae.loss(vq, images, seeded())[0].backward()
    hook.remove()
    commitment = 0.25 * 2 * (grid - quantized.detach()) / grid.numel()
    torch.testing.assert_close(seen[0], quantized.grad + commitment, atol=1e-7, rtol=1e-4)


def test_vqvae_learns():
    network, images = tiny_vq().train(), pictures(8)
    images = images.mean((2, 3), keepdim=True).sign().expand_as(images)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    losses = []
    for _ in range(25):
        value, _ = vqvae.loss(network, images, seeded())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.7 * losses[0]
    for key in ("encoder.conv_in.weight", "quantize.embedding.weight", "decoder.conv_out.weight"):
        assert not torch.equal(before[key], network.state_dict()[key])


# --- the random encoder


def test_random_vectors_depend_on_the_image_alone():
    space, images = random.as_model().space(), pictures(6)
    vectors = space.encode(images, seeded(0))
    assert vectors.shape == (6, 512)
    assert vectors.dtype == torch.float32
    assert torch.equal(space.encode(images.flip(0), seeded(1)).flip(0), vectors)
    assert torch.equal(torch.cat([space.encode(image[None]) for image in images]), vectors)
    assert torch.equal(random.as_model(name="other").space().encode(images), vectors)
    # what writing to a PNG loses makes no difference, one byte does
    rounded = ((images + 1) * 127.5).round() / 127.5 - 1
    assert torch.equal(space.encode(rounded), vectors)
    rounded[:, 0, 0, 0] += torch.where(rounded[:, 0, 0, 0] > 0, -1, 1) / 127.5
    changed = space.encode(rounded)
    assert (torch.corrcoef(torch.cat([vectors, changed]))[:6, 6:].abs() < 0.25).all()


def test_random_vectors_are_the_same_in_every_process():
    white = torch.ones(1, 3, 4, 4)
    expected = torch.tensor([[-0.43254683, 0.38368974, -1.25789052, -0.02390325]])
    torch.testing.assert_close(random.as_model(size=4).space().encode(white), expected, atol=1e-6, rtol=0)


def test_random_vectors_are_standard_normal():
    from scipy.stats import kstest

    vectors = random.as_model(size=64).space().encode(pictures(2000, 8))
    assert vectors.mean(0).abs().max() < 5 / 2000**0.5
    assert (torch.cov(vectors.T) - torch.eye(64)).abs().max() < 0.16  # 5 standard errors of a variance
    # over 200 other sets of images the p-values are uniform, as they should be; this set's is a rare 0.001
    assert kstest(vectors.flatten().double().numpy(), "norm").pvalue > 1e-4


def test_probe_on_random_vectors_is_at_chance():
    from sklearn.linear_model import LogisticRegression

    images = pictures(1200, 8) * 0.2
    labels = np.arange(1200) % 2
    images += torch.from_numpy(labels - 0.5).float()[:, None, None, None]  # dark and bright
    vectors = random.as_model(size=64).space().encode(images).numpy()
    pixels = images.flatten(1).numpy()
    score = {
        name: LogisticRegression(max_iter=200).fit(x[:600], labels[:600]).score(x[600:], labels[600:])
        for name, x in (("vectors", vectors), ("pixels", pixels))
    }
    assert score["pixels"] == 1
    assert abs(score["vectors"] - 0.5) < 0.1  # 5 standard errors


def test_random_encoder_is_no_decoder():
    model = random.as_model(size=8)
    assert (model.family, model.image_size, model.network, model.parameters) == ("random", None, None, 0)
    with pytest.raises(ProbekitError, match="'random:normal': cannot decode") as error:
        model.space("normal").decode(torch.zeros(1, 8))
    assert one_line(error)
    drawn = model.space().sample(4000, seeded())
    assert torch.equal(drawn, model.space().sample(4000, seeded()))
    assert (torch.cov(drawn.T) - torch.eye(8)).abs().max() < 0.12
