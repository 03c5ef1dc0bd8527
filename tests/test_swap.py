"""A swap: O and E made once, O with layers of E the same to the byte whatever else was asked, and as a sweep has it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from probekit import ProbekitError, hooks
from probekit.hooks import Injection, Steps
from probekit.models.families import text_to_image
from probekit.models.model import Model
from probekit.models.swap import Swap
from tests.pipelines import MOON, PIPELINES, RED, build

ORIGINAL, EDIT = (RED, 0), (MOON, 1)


@pytest.fixture(params=["sd", "sd3", "flux_true"], scope="module")
def model(request: pytest.FixtureRequest) -> Model:
    return painted(request.param)


def painted(name: str) -> Model:
    return text_to_image.as_model(build(name), name)


def swap_of(model: Model) -> Swap:
    return model.swap(ORIGINAL, EDIT, **options(model))


def options(model: Model) -> dict[str, Any]:
    tiny = PIPELINES[model.name]
    return tiny.options | tiny.guided | {"num_inference_steps": 3}


def rules(model: Model) -> dict[str, list[Injection]]:
    """Everything that can be asked, at places that every one of these models has."""
    last = hooks.select(model.layers, hooks.default_layers(model.denoiser))[-1]
    attentions = ("cross-attention", "joint-attention")
    attention = next(la for la in reversed(model.layers) if la.kind in attentions and "text" in la.streams)
    mask = torch.zeros(4, 4)
    mask[:2] = 1
    return {
        "whole": [Injection(last.name)],
        "late": [Injection(last.name, steps=Steps(indices=(2,)))],
        "blended": [Injection(last.name, operation=hooks.blend(0.5))],
        "masked": [Injection(last.name, mask=mask)],
        "inside": [Injection(attention.name)],
        "words": [Injection(attention.name, stream="text", tokens=(1, 2))],
        "left out": [Injection(attention.name, hooks.Nothing())],
        "two": [Injection(last.name), Injection(attention.name)],
    }


@pytest.mark.slow
def test_a_picture_is_the_sweeps_and_does_not_depend_on_what_was_asked_before(model: Model) -> None:
    asked = rules(model)
    swap = swap_of(model)
    made = {name: swap(rule) for name, rule in asked.items()}
    swept = model.sweep(ORIGINAL, EDIT, [[], *asked.values()], **options(model))
    torch.testing.assert_close(swap.original, swept.images[0], atol=2e-4, rtol=0)
    torch.testing.assert_close(swap.edit, swept.edit, atol=2e-4, rtol=0)
    for (name, picture), image in zip(made.items(), swept.images[1:], strict=True):
        torch.testing.assert_close(picture, image, atol=2e-4, rtol=0, msg=name)
    assert any((picture - swap.original).abs().max() > 0.01 for picture in made.values())
    for name, rule in reversed(asked.items()):
        assert torch.equal(swap_of(model)(rule), made[name]), name


def test_a_text_encoders_layer_is_taken_from_e() -> None:
    model = painted("sd")
    rule = [Injection(next(la.name for la in model.layers if la.name.startswith("text_encoder")))]
    swap = swap_of(model)
    swept = model.sweep(ORIGINAL, EDIT, [rule], **options(model))
    torch.testing.assert_close(swap(rule), swept.images[0], atol=2e-4, rtol=0)
    assert (swap(rule) - swap.original).abs().max() > 0.01


@pytest.mark.slow
def test_layers_are_captured_once_and_in_as_many_runs_as_memory_needs(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [la.name for la in hooks.select(model.layers, hooks.default_layers(model.denoiser))]
    roomy, tight = swap_of(model), swap_of(model)
    ends: dict[str, list[int]] = {"roomy": [], "tight": []}
    for _ in range(2):
        roomy.take([(name, None) for name in layers], lambda step, state: ends["roomy"].append(step))
    assert ends["roomy"] == [0, 1, 2]  # one run of E, and none the second time
    assert torch.equal(roomy.edit, tight.edit)  # that run's picture is E
    monkeypatch.setattr(Swap, "_room", property(lambda self: 1))
    tight.take([(name, None) for name in layers], lambda step, state: ends["tight"].append(step))
    assert ends["tight"] == [0, 1, 2] * len(layers)
    assert torch.equal(tight([Injection(layers[0])]), roomy([Injection(layers[0])]))


def test_steps_are_told_and_what_is_raised_there_ends_it() -> None:
    swap = swap_of(painted("sd"))
    told: list[tuple[int, tuple[int, ...] | None]] = []
    swap([Injection("mid_block")], lambda step, state: told.append((step, None if state is None else tuple(state.shape))))
    assert [step for step, _ in told] == [-1, -1, -1, 0, 1, 2]  # E's run first, then O's
    assert all((shape is None) == (step < 0) for step, shape in told)

    def stop(step: int, state: Any) -> None:
        raise KeyError

    with pytest.raises(KeyError):
        swap([Injection("mid_block")], stop)
    assert not any(module._forward_hooks for module in swap.painter.pipeline.unet.modules())


def test_other_rows_than_e_are_refused() -> None:
    swap = swap_of(painted("sd"))
    for source in (hooks.Row(1), hooks.Mean((0,)), torch.zeros(1)):
        with pytest.raises(ProbekitError, match="layers of E"):
            swap([Injection("mid_block", source)])


def test_words_stand_where_the_tokenizer_puts_them() -> None:
    pipeline, prompt = build("sd"), f"{RED}  {MOON}"
    words = painted("sd").painter.words(prompt)
    assert [word for word, _ in words] == prompt.split()
    ids = pipeline.tokenizer(prompt).input_ids
    assert [pipeline.tokenizer.decode([ids[token] for token in at]).strip() for _, at in words] == prompt.split()
    assert painted("sana").painter.words(prompt) == []  # where they stand in its embeddings is not known
