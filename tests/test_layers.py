from __future__ import annotations

from typing import Any

import pytest
import torch

from probekit import hooks
from tests.conftest import embedded


def whole(model: torch.nn.Module) -> list[str]:
    return [la.name for la in hooks.layers(model) if la.inside is None]


RED = "a large red fish at the top left on a striped blue ground"


def test_unet_layers_stand_in_the_order_in_which_they_run(tiny_sd: Any) -> None:
    known = hooks.layers(tiny_sd.unet)
    modules = dict(tiny_sd.unet.named_modules())
    ran: list[str] = []
    handles = [modules[la.name].register_forward_hook(lambda m, a, o, n=la.name: ran.append(n)) for la in known]
    tiny_sd(RED, num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    for handle in handles:
        handle.remove()
    assert ran == [la.name for la in known]
    whole = [la for la in known if la.inside is None]
    assert [la.order for la in whole] == list(range(len(whole)))
    # what lies inside another runs before that one is done, and after what stands before it
    orders = {la.name: la.order for la in known}
    assert sorted(orders.values()) == list(orders.values())
    assert all(orders[la.inside] - 1 < la.order < orders[la.inside] for la in known if la.inside is not None)


@pytest.mark.parametrize("name", ["tiny_sd3", "tiny_flux"])
def test_transformer_layers_stand_in_the_order_in_which_they_run(name: str, request: pytest.FixtureRequest) -> None:
    pipeline = request.getfixturevalue(name)
    known = hooks.layers(pipeline.transformer)
    modules = dict(pipeline.transformer.named_modules())
    ran: list[str] = []
    handles = [modules[la.name].register_forward_hook(lambda m, a, o, n=la.name: ran.append(n)) for la in known]
    row = embedded(0, negative=name == "tiny_sd3")
    options = {"height": 16, "width": 16, "num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
    pipeline(**hooks.stack([row]), **options)
    for handle in handles:
        handle.remove()
    assert ran == [la.name for la in known]


def test_streams_are_those_of_each_architecture(tiny_sd: Any, tiny_sd3: Any, tiny_flux: Any) -> None:
    unet = {la.name: list(la.streams) for la in hooks.layers(tiny_sd.unet)}
    # an attention layer of the encoder feeds the skip, the resnet before it only that attention
    assert unet["down_blocks.0.resnets.0"] == ["main"]
    assert unet["down_blocks.0.attentions.0"] == ["both", "main", "skip"]
    assert unet["down_blocks.1.resnets.1"] == ["both", "main", "skip"]
    assert unet["conv_in"] == ["both", "main", "skip"]
    assert unet["up_blocks.0.resnets.0"] == unet["mid_block"] == ["main"]
    sd3 = {la.name: list(la.streams) for la in hooks.layers(tiny_sd3.transformer)}
    assert sd3["transformer_blocks.0"] == ["image", "text", "both"]
    assert sd3["transformer_blocks.2"] == ["image"]  # SD3's last block returns no text
    flux = {la.name: list(la.streams) for la in hooks.layers(tiny_flux.transformer)}
    assert flux["single_transformer_blocks.1"] == ["image", "text", "both"]


def test_other_denoisers_of_diffusers_are_known() -> None:
    from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    names = whole(unet)
    assert names[:3] == ["conv_in", "down_blocks.0.resnets.0", "down_blocks.0.downsamplers.0"]
    assert "down_blocks.1.attentions.0" in names and names[-1] == "conv_out"
    small = {"num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 4, "num_layers": 2, "sample_size": 4}
    dit = DiTTransformer2DModel(**small, norm_num_groups=4)
    assert whole(dit) == ["pos_embed", "transformer_blocks.0", "transformer_blocks.1", "proj_out_2"]
    pixart = PixArtTransformer2DModel(**small, cross_attention_dim=8, caption_channels=8, norm_num_groups=4, out_channels=8)
    assert whole(pixart) == ["pos_embed", "transformer_blocks.0", "transformer_blocks.1", "proj_out"]
    with pytest.raises(hooks.ProbekitError, match=r"Linear is no denoiser known here.*FluxTransformer2DModel"):
        hooks.layers(torch.nn.Linear(1, 1))


def test_an_injection_into_a_unet2dmodel_called_without_a_pipeline() -> None:
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()
    x = torch.randn(3, 3, 8, 8)
    plain = unet(x, 500).sample
    for stream in ("main", "skip", "both"):
        rule = {1: [hooks.Injection("down_blocks.1.attentions.0", stream=stream)]}
        with hooks.inject(unet, rule, schedule=[900, 500, 100], rows=3):
            injected = unet(x, 500).sample
        # oneDNN may order the sums of a padded batch differently: the untouched rows are equal to float tolerance
        assert torch.allclose(injected[[0, 2]], plain[[0, 2]], atol=1e-6)
        assert not torch.allclose(injected[1], plain[1], atol=1e-4)


def test_globs_groups_and_names_select_and_a_miss_names_the_nearest(tiny_sd: Any) -> None:
    known = hooks.layers(tiny_sd.unet)
    assert [la.name for la in hooks.select(known, ["mid_block.resnets.*"])] == ["mid_block.resnets.0", "mid_block.resnets.1"]
    assert {la.kind for la in hooks.select(known, ["@attentions"])} == {"attention"}
    assert hooks.select(known, ["@all"]) == [la for la in known if la.inside is None]
    both = hooks.select(known, ["conv_out", "conv_in", "conv_in"])
    assert [la.name for la in both] == ["conv_in", "conv_out"]
    with pytest.raises(hooks.ProbekitError, match=r"mid_block\.resnets\.5.*nearest: mid_block\.resnets"):
        hooks.select(known, ["mid_block.resnets.5"])
    with pytest.raises(hooks.ProbekitError, match="@resnets, @attentions"):
        hooks.select(known, ["@resnet"])


def test_shapes_are_those_of_the_outputs_and_no_hook_stays(tiny_sd: Any) -> None:
    known = hooks.layers(tiny_sd.unet)
    shapes = hooks.output_shapes(
        tiny_sd.unet, known, lambda: tiny_sd(RED, num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    )
    assert shapes["conv_in"] == (1, 8, 16, 16)
    assert shapes["down_blocks.0"] == (1, 8, 8, 8)
    assert shapes["mid_block"] == (1, 16, 8, 8)
    assert shapes["conv_out"] == (1, 4, 16, 16)
    assert not any(m._forward_hooks for m in tiny_sd.unet.modules())
