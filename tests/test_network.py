"""What the inspector is told of a network, of the real layers of several architectures and of names alone."""

from __future__ import annotations

from typing import Any

import pytest

from probekit import hooks
from probekit.experiments import InjectSweep
from probekit.models import load
from probekit.report.network import drawn, drawn_by_name, form, form_by_name


@pytest.mark.parametrize(("model", "shape"), [("mini-sd", "u"), ("mini-sd3", "lanes"), ("mini-dit", "column")])
def test_layers_are_drawn_where_they_stand(model: str, shape: str) -> None:
    pipeline: Any = load(model).pipeline
    layers = [*hooks.text_layers(pipeline), *hooks.layers(hooks.denoiser(pipeline))]
    told = drawn(layers)
    assert form(layers) == shape
    assert [each["name"] for each in told] == [layer.name for layer in layers]
    assert len({each["short"] for each in told}) == len(told)  # no two tiles are called the same
    assert {each["part"] for each in told} == {"text"} | ({"encoder", "middle", "decoder"} if shape == "u" else {"stack"})
    for each, layer in zip(told, layers, strict=True):
        assert each["streams"][0] == next(iter(layer.streams)) and set(each["words"]) <= set(each["streams"])
        assert each["inside"] is None or each["inside"] in {other["name"] for other in told}
    assert any(each["words"] for each in told if each["part"] != "text")


def test_a_u_goes_down_to_the_middle_and_up_again() -> None:
    told = {each["name"]: each for each in drawn(hooks.layers(load("mini-sd").denoiser))}
    down, up = ([told[f"{side}_blocks.{k}"]["level"] for k in range(3)] for side in ("down", "up"))
    assert down == up[::-1] == [0, 1, 2] and told["mid_block"]["level"] > 2


def test_of_a_run_of_two_streams_both_lanes_are_drawn() -> None:
    layers = hooks.select(hooks.layers(load("mini-sd3").denoiser), ["@blocks"])
    inputs = InjectSweep(model="mini-sd3", pairs=1, num_steps=1).inputs()
    assert inputs["swept_layers"] == [layer.name for layer in layers]
    assert inputs["carry_text"] == inputs["swept_layers"][:-1]  # SD3's last block gives the image alone
    assert form_by_name(inputs["swept_layers"], inputs["carry_text"]) == form(layers) == "lanes"
    told = drawn_by_name(inputs["swept_layers"], inputs["carry_text"])
    assert [each["streams"] for each in told] == [["image", "text"]] * 5 + [[]]
    assert "carry_text" not in InjectSweep(pairs=1, num_steps=1, layers=["mid_block"]).inputs()


def test_by_name_alone_a_network_is_drawn_as_by_its_layers() -> None:
    layers = hooks.layers(load("mini-sd").denoiser)
    names = [layer.name for layer in layers]
    places = ("name", "short", "part", "level")
    for by_name, known in zip(drawn_by_name(names), drawn(layers), strict=True):
        assert {key: by_name[key] for key in places} == {key: known[key] for key in places}
        # by name the innermost layer is told, where a layer knows the one that is a tile of its own
        assert (by_name["inside"] is None) == (known["inside"] is None)
    assert form_by_name(names) == "u" and form_by_name(["transformer_blocks.0"]) == "column"
