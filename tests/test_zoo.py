from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from probekit import hooks, load
from probekit.bundled import GUIDANCE, MODELS, WEIGHTS, borrowed
from probekit.data.scenes import VALUES, all_scenes, labels, sample_scenes
from probekit.hooks.errors import ProbekitError
from probekit.locks import Lock
from probekit.metrics import readers
from probekit.models import saved
from probekit.zoo import (
    avatar_families,
    avatar_reader,
    mini_sd,
    planted_sd,
    recipes,
    scene_clip,
    scene_reader,
    scene_transformers,
    scene_vae,
)
from probekit.zoo.training import Schedule, train
from tests.conftest import imported, probekit

TRAINING = """
import torch
from pathlib import Path
from probekit.metrics.readers import SceneReader
from probekit.zoo.scene_reader import loss
from probekit.zoo.training import Schedule, train
torch.manual_seed(0)
schedule = Schedule(steps=24, learning_rate=1e-3, warmup=4, ema=0.9, bfloat16=dtype == "bfloat16")
reader = train(SceneReader(), loss, schedule, checkpoint=Path(folder) / "reader.pt", save_every_seconds=0)
torch.save(reader.state_dict(), Path(folder) / "done.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_training_killed_and_started_again_gives_the_weights_of_an_uninterrupted_one(tmp_path: Path, dtype: str) -> None:
    def start(name: str) -> Any:
        (tmp_path / name).mkdir(exist_ok=True)
        started = imported().Process(target=exec, args=(TRAINING, {"folder": str(tmp_path / name), "dtype": dtype}))
        started.start()
        return started

    def whole(name: str) -> None:
        started = start(name)
        started.join()
        assert started.exitcode == 0

    whole("whole")
    killed = start("killed")
    while not (tmp_path / "killed" / "reader.pt").exists() and killed.is_alive():
        time.sleep(0.005)
    time.sleep(0.3)
    killed.kill()
    killed.join()
    assert not (tmp_path / "killed" / "done.pt").exists(), "it was over before it could be killed"
    assert 0 < torch.load(tmp_path / "killed" / "reader.pt", weights_only=True)["step"] < 24
    whole("killed")
    one, two = (torch.load(tmp_path / name / "done.pt", weights_only=True) for name in ("whole", "killed"))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_training_in_bfloat16_goes_where_training_in_float32_goes(tmp_path: Path) -> None:
    # channels_last gradients once met contiguous weights in the fused optimizer, which mixed up every kernel's values
    def loss(network: torch.nn.Module, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        x = torch.randn(16, 4, 8, 8, generator=generator)
        made = network(x.to(next(network.parameters()).dtype)).float()
        return (made - x.roll(1, -1)[:, :, 1:-1, 1:-1]).square().mean(), {}

    def moved(bfloat16: bool) -> torch.Tensor:
        torch.manual_seed(0)
        network = torch.nn.Conv2d(4, 4, 3)
        before = network.weight.detach().clone()
        schedule = Schedule(steps=40, learning_rate=1e-2, warmup=2, ema=0.0, bfloat16=bfloat16)
        train(network, loss, schedule, checkpoint=tmp_path / f"{bfloat16}.pt")
        return (network.weight.detach() - before).flatten()

    assert torch.cosine_similarity(moved(True), moved(False), dim=0) > 0.99


def test_a_checkpoint_of_another_training_or_a_damaged_one_is_refused_in_one_line(tmp_path: Path) -> None:
    def loss(network: torch.nn.Module, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        return network(torch.ones(1, 2)).square().mean(), {}

    file, schedule = tmp_path / "some.pt", Schedule(steps=2, learning_rate=1e-2, warmup=1)
    train(torch.nn.Linear(2, 2), loss, schedule, checkpoint=file)
    with pytest.raises(ProbekitError, match="of a training with 2 steps, seed 0 and Schedule") as error:
        train(torch.nn.Linear(2, 2), loss, replace(schedule, learning_rate=1e-3), checkpoint=file)
    assert "\n" not in str(error.value)
    with pytest.raises(ProbekitError, match="damaged or of another network; delete it"):
        train(torch.nn.Linear(2, 3), loss, schedule, checkpoint=file)
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(ProbekitError, match="damaged or of another network; delete it"):
        train(torch.nn.Linear(2, 2), loss, schedule, checkpoint=file)


def test_a_training_goes_on_with_its_threads_and_its_random_numbers_and_has_one_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def loss(network: torch.nn.Module, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt
        return network(torch.rand(8, 4)).square().mean(), {}  # of torch's own numbers, as dropout's

    def trained(name: str) -> torch.Tensor:
        torch.manual_seed(0)
        options = {"checkpoint": tmp_path / name / "some.pt", "title": "some", "save_every_seconds": 0}
        return train(torch.nn.Linear(4, 4), loss, Schedule(steps=9, learning_rate=1e-2), **options).weight

    threads = torch.get_num_threads()
    left = 0
    whole = trained("whole")
    left = 6
    with pytest.raises(KeyboardInterrupt, match=r"interrupted: 5 of 9 steps are kept in .*some\.pt; the same command goes on"):
        trained("cut")
    with Lock(tmp_path / "cut" / "locks" / "some.pt") as other:
        assert other.take()
        with pytest.raises(ProbekitError, match=rf"some\.pt': process {os.getpid()} on .*; wait until it has ended"):
            trained("cut")
    try:
        torch.set_num_threads(threads + 1)
        left = 0
        assert torch.equal(trained("cut"), whole) and torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(threads)
    assert f"some: goes on with {threads} threads, as it was begun" in capsys.readouterr().out


def test_a_training_that_is_terminated_says_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(network: torch.nn.Module, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        if (tmp_path / "training" / "some.pt").exists():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        return network(torch.ones(1, 2)).square().mean(), {}

    def training(folder: Path, checkpoints: Path, seed: int) -> None:
        some = torch.nn.Linear(2, 2)
        train(some, loss, Schedule(steps=9, learning_rate=1e-2), checkpoint=checkpoints / "some.pt", save_every_seconds=0)

    monkeypatch.setitem(recipes.RECIPES, "scene-reader", recipes.Recipe("", training, scene_reader.evaluate))
    done = probekit("zoo", "train", "scene-reader", "--out", "out", "--checkpoints", "training", cwd=tmp_path)
    assert done.returncode == 143
    assert (
        done.stderr == "probekit: interrupted: 1 of 9 steps are kept in training/some.pt; the same command goes on from there\n"
    )


def test_the_same_network_is_saved_as_the_same_bytes(tmp_path: Path) -> None:
    for number in range(8):  # safetensors orders metadata anew in every call
        saved.save(torch.nn.Linear(3, 2, bias=False), tmp_path / str(number), "vae", 32)
    with safe_open(tmp_path / "0" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"family": "vae", "image_size": "32"} and file.get_tensor("weight").dtype == torch.float16
    headers = {(tmp_path / str(number) / "model.safetensors").read_bytes()[:-12] for number in range(8)}
    assert len(headers) == 1


@pytest.mark.slow
def test_every_recipe_starts_and_what_it_writes_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = Schedule(steps=2, learning_rate=1e-3, warmup=1)
    for module, names in {
        scene_reader: ["SCHEDULE"],
        scene_clip: ["SCHEDULE"],
        scene_vae: ["WINDOWS", "WHOLE"],
        mini_sd: ["SCHEDULE"],
        avatar_reader: ["SCHEDULE"],
        scene_transformers: ["READING"],
        planted_sd: ["SCHEDULE"],
    }.items():
        for name in names:
            monkeypatch.setattr(module, name, short)
        if hasattr(module, "BATCH"):
            monkeypatch.setattr(module, "BATCH", 4)
    families = {name: replace(f, schedule=short, batch=4, keep=(1,)) for name, f in avatar_families.FAMILIES.items()}
    monkeypatch.setattr(avatar_families, "FAMILIES", families)
    monkeypatch.setattr(scene_transformers, "SCHEDULES", dict.fromkeys(scene_transformers.SCHEDULES, short))
    few = all_scenes()[::500]
    monkeypatch.setattr(mini_sd, "split", lambda held_out: few)
    for name, recipe in recipes.RECIPES.items():
        recipe.train(tmp_path / name, tmp_path / "checkpoints", 0)
        if name in MODELS:
            made = load(tmp_path / name, device="cpu")
            assert (made.family, made.image_size) == (load(name, device="cpu").family, 32)
            assert load(tmp_path / name / "step-000001", device="cpu").family == made.family
    for name in ("mini-sd", *scene_transformers.LENDERS):
        assert load(tmp_path / name, device="cpu").generate(["a"], [0], num_inference_steps=1).shape == (1, 3, 64, 64)
    monkeypatch.setattr(readers, "weights", lambda name: tmp_path / name)
    for reader in (readers.scene_reader, readers.avatar_reader):
        assert all(torch.isfinite(p).all() for p in reader.__wrapped__().parameters())
    assert recipes.find("avatar-vae").about
    with pytest.raises(ProbekitError, match="zoo model 'avatar-vea': there is none; avatar-vae"):
        recipes.find("avatar-vea")


def test_all_weights_together_stay_below_96_mb() -> None:
    assert 0 < sum(f.stat().st_size for f in WEIGHTS.rglob("*") if f.is_file()) < 96e6


def test_every_word_of_a_caption_is_one_token() -> None:
    tokenizer = scene_clip.tokenizer()
    words = {word for scene in all_scenes() for word in scene.caption.split()}
    assert all(len(tokenizer(word).input_ids) == 3 for word in words)  # start, word, end
    assert max(len(tokenizer(s.caption).input_ids) for s in all_scenes()[::50]) <= scene_clip.MAX_TOKENS
    # other words are spelled, none is lost
    assert tokenizer.decode(tokenizer("astronaut").input_ids, skip_special_tokens=True).replace(" ", "") == "astronaut"


def test_the_scene_reader_reads_held_out_scenes() -> None:
    rows = scene_reader.evaluate(n=1000, seed=5)
    assert len(rows) == len(VALUES)
    for attribute, share, bar, _ in rows:
        assert bar is not None and share >= bar, attribute


def test_the_scene_clip_tells_captions_apart() -> None:
    rows = scene_clip.evaluate(n=300, seed=5)
    assert rows
    for what, share, *_ in rows:
        assert share > 0.8, what


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mini-sd", *scene_transformers.LENDERS])
def test_a_bundled_pipeline_paints_what_its_caption_says(name: str) -> None:
    """On 12 captions that training never saw, to within three standard errors of the bars that `zoo evaluate` prints."""
    model, reader = load(name, device="cpu"), readers.scene_reader()
    scenes = sample_scenes(12, torch.Generator().manual_seed(9), held_out=True)
    images = model.generate([s.caption for s in scenes], range(12), num_inference_steps=20, guidance_scale=GUIDANCE[name])
    assert images.shape == (12, 3, 64, 64) and images.min() >= -1 and images.max() <= 1
    seen, truth = reader.read(images), labels(scenes)
    for attribute, bar in {"kind": 0.9, "colour": 0.95, "place": 0.95, "ground": 0.95, "texture": 0.95}.items():
        share = (seen[attribute] == truth[attribute]).float().mean().item()
        assert share >= bar - 3 * (bar * (1 - bar) / 12) ** 0.5, attribute


@pytest.fixture(scope="module")
def few_scenes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[mini_sd.SceneCodes]:
    few = all_scenes()[::1000]
    vae = AutoencoderKL.from_pretrained(WEIGHTS / "mini-sd" / "vae")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mini_sd, "split", lambda held_out: few)
        yield mini_sd.SceneCodes(vae, tmp_path_factory.mktemp("codes") / "codes.safetensors")


def test_cells_around_the_object_count_more_only_where_the_caption_tells_of_it(few_scenes: mini_sd.SceneCodes) -> None:
    error, empty = torch.ones(2, 4, 16, 16), len(few_scenes.captions) - 1
    assert few_scenes.captions[empty] == ""
    inside = few_scenes.objects[3].float().mean().item()
    assert 0 < inside < 0.5
    told = few_scenes.mean(error, torch.tensor([3, empty])).item()
    assert told == pytest.approx((1 + (1 + (mini_sd.OBJECT_WEIGHT - 1) * inside)) / 2)


Losses = scene_transformers.Flowing | scene_transformers.Denoising


def _with_loss(name: str, scenes: mini_sd.SceneCodes) -> tuple[torch.nn.Module, Losses]:
    """A transformer that is past its beginning, where its gates are shut, and what it is trained by."""
    torch.manual_seed(0)
    words = CLIPTokenizer.from_pretrained(WEIGHTS / "mini-sd" / "tokenizer")
    if name == "mini-sd3":
        network = scene_transformers.sd3()
        network.set_attn_processor(scene_transformers._LastTokenRepeated())
        clip = CLIPTextModelWithProjection.from_pretrained(WEIGHTS / "scene-clip", dtype=torch.float32)
        made: tuple[torch.nn.Module, Losses] = network, scene_transformers.Flowing(clip, words, scenes)
    else:
        made = scene_transformers.dit(), scene_transformers.Denoising(scene_transformers.Reading(words).t5, words, scenes)
    for p in made[0].parameters():
        torch.nn.init.normal_(p, std=0.05)
    return made


@pytest.mark.parametrize("name", scene_transformers.LENDERS)
def test_a_transformers_loss_repeats_with_its_generator_and_reaches_all_that_is_read(
    name: str, few_scenes: mini_sd.SceneCodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mini_sd, "BATCH", 4)
    network, loss = _with_loss(name, few_scenes)
    one, two, other = (loss(network, torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)
    torch.autograd.backward(one)
    # the last block's text goes nowhere, so nobody reads what it asks for
    unread = "transformer_blocks.5.attn.add_q_proj"
    for key, p in network.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), key
        assert (name == "mini-sd3" and key.startswith(unread)) or p.grad.abs().max() > 0, key
    tokens = loss.tokens if isinstance(loss, scene_transformers.Flowing) else loss.told.input_ids
    tokens.copy_(tokens.roll(1, 0))
    assert not torch.equal(loss(network, torch.Generator().manual_seed(1))[0], one), "captions are not read"


def test_one_token_that_counts_for_many_is_the_same_as_many() -> None:
    torch.manual_seed(0)
    network = scene_transformers.sd3()
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.05)
    told = {"hidden_states": torch.randn(2, 4, 16, 16), "timestep": torch.tensor([900.0, 30.0]), "return_dict": False}
    told["pooled_projections"], text = torch.randn(2, 192), torch.randn(2, 20, 192)
    with torch.no_grad():
        many = network(encoder_hidden_states=torch.nn.functional.pad(text, (0, 0, 0, 256)), **told)[0]
        network.set_attn_processor(scene_transformers._LastTokenRepeated())
        padded = torch.nn.functional.pad(text, (0, 0, 0, 1))
        one, single = (
            network(encoder_hidden_states=padded, joint_attention_kwargs={"repeats": n}, **told)[0] for n in (256.0, 1.0)
        )
    torch.testing.assert_close(one, many, atol=1e-4, rtol=1e-4)
    assert (single - many).abs().max() > 0.01


@pytest.mark.parametrize("name", scene_transformers.LENDERS)
def test_a_pipeline_that_borrows_is_whole_where_it_is_loaded_and_where_it_is_saved(name: str, tmp_path: Path) -> None:
    lenders = borrowed(WEIGHTS / name)
    assert lenders == {part: WEIGHTS / place for part, place in scene_transformers.LENDERS[name].items()}
    assert not any((WEIGHTS / name / part).exists() for part in lenders)
    model = load(name, device="cpu")
    model.pipeline.save_pretrained(tmp_path)
    again = load(tmp_path, device="cpu")
    assert (tmp_path / "vae" / "config.json").exists() and again.weights == model.weights
    caption, options = all_scenes()[123].caption, {"num_inference_steps": 2, "guidance_scale": GUIDANCE[name]}
    assert torch.equal(again.generate([caption], [0], **options), model.generate([caption], [0], **options))


def test_a_prompt_is_encoded_once() -> None:
    model = load("mini-sd", device="cpu")
    calls = []
    handle = model.pipeline.text_encoder.register_forward_hook(lambda m, a, o: calls.append(1))
    fish, moon = all_scenes()[0].caption, all_scenes()[-1].caption
    model.sweep((fish, 0), (moon, 0), [[], []], num_inference_steps=1, guidance_scale=3.0)
    model.sweep((moon, 1), (fish, 1), [[]], num_inference_steps=1, guidance_scale=3.0)
    handle.remove()
    assert len(calls) == 3  # two prompts, and once the empty one for guidance


@pytest.mark.slow
def test_injecting_e_into_itself_gives_e_at_every_layer_of_mini_sd() -> None:
    model = load("mini-sd", device="cpu")
    caption = all_scenes()[123].caption
    rules = [[hooks.Injection(la.name)] for la in model.layers]
    swept = model.sweep((caption, 0), (caption, 0), rules, num_inference_steps=3, guidance_scale=3.0)
    assert all(torch.equal(image, swept.edit) for image in swept.images)
