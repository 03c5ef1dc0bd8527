"""Given pictures: inverted under their captions, made again by the pipeline's own sampling, and swept as any pair."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import diffusers
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor

from probekit import ProbekitError, hooks
from probekit.data import scenes
from probekit.data.scenes import Scene
from probekit.experiments import InjectSweep
from probekit.experiments.inject_sweep import APART, Pair, Starts, read_pairs, starts_of
from probekit.images import load_png, save_png
from probekit.models import Model, given, load
from probekit.models.families.text_to_image import as_model
from probekit.report.injection.given import MadeAgain
from probekit.runs.folder import Run
from probekit.sampling.inversions import restored
from tests.conftest import killed_once, probekit, refused
from tests.pipelines import build

FISH = "a large red fish at the left on a plain blue ground"
STAR = "a large yellow star at the right on a dotted green ground"
STEPS = 4


@pytest.fixture(scope="module")
def mini() -> Model:
    return load("mini-sd", device="cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pictures of the captions, and what is none."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, caption in {"fish": FISH, "star": STAR}.items():
        save_png(scenes.render([Scene.parse(caption)], torch.Generator().manual_seed(3))[0], folder / f"{name}.png")
    (folder / "notes.png").write_text("no picture")
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-sd"
    build("sd").save_pretrained(folder)
    return folder


def pair(image_original: Path | None = None, image_edit: Path | None = None) -> Pair:
    images = [None if file is None else str(file) for file in (image_original, image_edit)]
    return Pair("own-00", "own", FISH, STAR, "a small black cross", 5, *images)


# --- a picture is made again ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux", "pixart", "hunyuan_dit"])
def test_the_pipelines_own_sampling_is_the_way_back_of_the_inversion(family: str, guidance: float) -> None:
    # a tiny network's steps may have no solution; the way back from wherever the inversion ends is the pipeline's all the same
    pipeline = copy.copy(build(family))
    if family == "flux":
        pipeline.default_sample_size = 16  # 128 by default, which takes its time
    model = given.invertible(as_model(pipeline, family))
    diffusion = model.conditioned(prompt=FISH, guidance=guidance).diffusion
    picture = torch.rand(3, diffusion.image_size, diffusion.image_size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = given.invert(model, picture, FISH, steps=3, guidance=guidance, method="plain")
    back = diffusion.decode(restored(diffusion, "plain", found.latent, diffusion.schedule(3)))
    made = model.painter.generate([FISH], [found.latent], num_inference_steps=3, guidance_scale=guidance)
    assert torch.allclose(made, back, atol=1e-4)
    noise = model.painter.generate([FISH], [0], num_inference_steps=3, guidance_scale=guidance)
    assert not torch.allclose(made, noise, atol=1e-2)  # where it starts matters


@pytest.mark.slow
def test_without_guidance_it_comes_as_near_as_the_autoencoder_and_its_latent_is_as_wide_as_noise(
    mini: Model, files: dict[str, Path]
) -> None:
    picture, _ = given.read(files["star"], 64)
    made: dict[float, dict[str, float]] = {}
    for guidance in (1.0, 3.0):
        found = given.invert(mini, picture, STAR, steps=3, guidance=guidance)
        options = {"num_inference_steps": 3, "guidance_scale": guidance}
        rebuilt = mini.painter.generate([STAR], [found.latent], **options)[0]
        made[guidance] = found.errors(rebuilt)
        if guidance == 1:
            assert (rebuilt - found.coded).abs().max() < 0.15  # after three steps; after twenty the two are 70 dB apart
    assert made[1.0]["psnr"] > made[1.0]["coded_psnr"] - 0.5 and made[1.0]["lpips"] < 0.01
    assert made[1.0]["psnr"] > made[3.0]["psnr"] + 3  # which is why none is the default
    assert abs(made[1.0]["spread"] - 1) < 0.25 < made[3.0]["spread"] - 1


def test_errors_are_those_of_the_pictures() -> None:
    grey = torch.zeros(3, 64, 64)
    told = given.Given(grey, grey + 0.02, torch.randn(1, 4, 8, 8)).errors(grey + 0.2)
    assert told["psnr"] == pytest.approx(20.0, abs=1e-4) and told["coded_psnr"] == pytest.approx(40.0, abs=1e-3)
    assert 0 < told["coded_lpips"] < told["lpips"]


@pytest.mark.parametrize(
    ("psnr", "lpips", "coded", "said"),
    [(40.0, 0.05, 0.0, ""), (20.0, 0.2, 0.02, "--inversion fixed-point"), (15.0, 0.3, 0.25, "knows no such pictures")],
)
def test_a_picture_that_is_another_is_warned_of_with_what_is_to_blame(
    psnr: float, lpips: float, coded: float, said: str
) -> None:
    warning = MadeAgain("own-00", "O", "pics/cat.png", psnr, lpips, 40.0, coded, 1.0).warning
    assert said in warning and bool(warning) == bool(said) and ("cat.png" in warning or not said)


# --- what rows start from ---------------------------------------------------------------------------------------------------


def test_a_prompt_beside_a_picture_starts_from_its_latent_or_from_noise_of_its_own(files: dict[str, Path]) -> None:
    tiny = as_model(build("sd"), "tiny")
    fish, star = files["fish"], files["star"]

    def noise(number: int) -> Tensor:
        return given.numbered(tiny, number, 0)

    def starts(asked: Pair, separate: bool) -> Starts:
        return starts_of(tiny, asked, seed=0, steps=2, guidance=None, method="plain", separate=separate)

    both = starts(pair(fish, star), False)
    latents = {side: both.given[side].latent for side in ("original", "edit")}
    for asked, separate, expected in [
        (pair(fish, star), False, (latents["original"], latents["edit"], noise(5))),
        (pair(fish), False, (latents["original"],) * 3),
        (pair(fish), True, (latents["original"], noise(5 + APART), noise(5 + APART))),
        (pair(None, star), False, (latents["edit"], latents["edit"], noise(5))),
        (pair(None, star), True, (noise(5), latents["edit"], noise(5 + APART))),
    ]:
        found = starts(asked, separate)
        for have, want in zip((found.original, found.edit, found.unrelated), expected, strict=True):
            assert isinstance(have, Tensor) and torch.equal(have, want), (asked, separate)
    alone = starts(pair(), True)  # prompts alone have numbers, as ever
    assert (alone.original, alone.edit, alone.unrelated, alone.given) == (5, 5 + APART, 5 + APART, {})


def test_numbered_noise_as_a_latent_is_the_noise_of_that_number(mini: Model) -> None:
    options = {"num_inference_steps": 2, "seed": 4}
    by_number, as_latent = (mini.painter.generate([FISH], [noise], **options) for noise in (7, given.numbered(mini, 7, 4)))
    assert torch.equal(by_number, as_latent)


@pytest.mark.slow
def test_a_given_picture_into_itself_stays_and_the_sweeps_o_is_what_was_made_again(mini: Model, files: dict[str, Path]) -> None:
    itself = Pair("own-00", "own", FISH, FISH, "a moon", 0, str(files["fish"]), str(files["fish"]))
    found = starts_of(mini, itself, seed=0, steps=STEPS, guidance=None, method=None)
    rules = [[], *([hooks.Injection(la.name)] for la in hooks.select(mini.layers, ["@mid", "@attentions"]))]
    options: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 1.0}
    swept = mini.painter.sweep((FISH, found.original), (FISH, found.edit), rules, **options)
    assert all(torch.equal(image, swept.edit) for image in swept.images)
    alone = mini.painter.generate([FISH], [found.original], **options)[0]
    assert torch.allclose(swept.images[0], alone, atol=1e-4)
    assert found.errors({"original": alone, "edit": alone})["original_lpips"] < 0.01


# --- schedulers -------------------------------------------------------------------------------------------------------------


def with_scheduler(kind: str, **options: Any) -> Model:
    pipeline = copy.copy(build("sd"))
    pipeline.scheduler = getattr(diffusers, kind).from_config(pipeline.scheduler.config, **options)
    return as_model(pipeline, "tiny")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNDMScheduler", {"skip_prk_steps": True}),
        ("EulerDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {}),
        ("UniPCMultistepScheduler", {}),
        ("DDIMScheduler", {"clip_sample": True}),
    ],
)
def test_a_scheduler_that_draws_no_noise_gives_way_to_ddim_of_its_noise_levels(kind: str, options: dict[str, Any]) -> None:
    model = with_scheduler(kind, **options)
    own = model.pipeline.scheduler
    other = given.invertible(model)
    assert model.pipeline.scheduler is own and other.digest != model.digest  # the model is as it was, the twin another one
    assert other.pipeline.unet is model.pipeline.unet
    scheduler = other.pipeline.scheduler
    assert type(scheduler) is diffusers.DDIMScheduler and not scheduler.config.clip_sample
    assert torch.equal(scheduler.alphas_cumprod, own.alphas_cumprod)
    assert given.invertible(other) is other


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("DDPMScheduler", {}),
        ("EulerAncestralDiscreteScheduler", {}),
        ("KDPM2AncestralDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("LCMScheduler", {}),
    ],
)
def test_a_scheduler_that_draws_noise_is_refused_by_name(kind: str, options: dict[str, Any]) -> None:
    before = torch.get_rng_state()
    with pytest.raises(ProbekitError, match=f"'tiny': its {kind} draws noise"):
        given.invertible(with_scheduler(kind, **options))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_whose_latents_are_not_known_is_refused_by_name() -> None:
    with pytest.raises(ProbekitError, match=r"model 'if': a IFPipeline, which has no VAE known"):
        given.invertible(as_model(build("deepfloyd"), "if"))


# --- the commands -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_of_given_pictures_from_start_to_report(files: dict[str, Path], tmp_path: Path) -> None:
    out, options = tmp_path / "run", ["--num-steps", STEPS, "--layers", "mid_block"]
    both = ["--image-original", files["fish"], "--prompt-original", FISH, "--image-edit", files["star"], "--prompt-edit", STAR]
    done = probekit("inject", "sweep", *both, *options, "--out", out)  # of mini-sd
    assert done.returncode == 0, done.stderr
    rows = pd.read_parquet(out / "results.parquet")
    assert (rows.original_psnr > 30).all() and (rows.edit_psnr > 30).all() and (rows.edit_lpips < 0.01).all()
    assert "Made again: O at" in done.stdout and "fish.png" in done.stdout and "Warning" not in done.stdout
    for side, file in (("O", files["fish"]), ("E", files["star"])):
        as_given, again = (load_png(out / "images" / "own-00" / f"{name}.png") for name in (f"{side}_given", side))
        assert torch.equal(as_given, load_png(file))  # of the model's size already
        square = (as_given - again).square().mean()
        told = rows[{"O": "original_psnr", "E": "edit_psnr"}[side]].iloc[0]
        assert 10 * torch.log10(4 / square) == pytest.approx(told, abs=0.5)  # pictures are rounded to bytes
    config = json.loads((out / "config.json").read_text())
    assert config["inputs"]["guidance_scale"] == 1 and config["inputs"]["inverted_by"] == "fixed-point"
    assert set(config["inputs"]["picture_digests"]) == {str(files["fish"]), str(files["star"])}
    page = (out / "report.html").read_text()
    assert "The given pictures" in page and 'alt="E, made again"' in page and "made from numbered noise" in page


def test_another_picture_under_the_same_name_is_another_run(tiny_folder: Path, files: dict[str, Path], tmp_path: Path) -> None:
    changed = tmp_path / "fish.png"
    changed.write_bytes(files["star"].read_bytes())
    prompts = {"prompt_original": FISH, "prompt_edit": STAR}
    options: dict[str, Any] = {"model": str(tiny_folder), "num_steps": 2, "inversion": "plain", "layers": ["mid_block"]}
    sweep = InjectSweep(image_original=changed, **prompts, **options)
    first, folder = sweep.inputs(), sweep.default_folder(sweep.inputs())
    Run(tmp_path / "run", sweep.name, sweep.options, first)
    changed.write_bytes(files["fish"].read_bytes())
    again = sweep.inputs()
    assert sweep.default_folder(again) != folder
    with pytest.raises(ProbekitError, match=r"another config \(picture_digests\)"):
        Run(tmp_path / "run", sweep.name, sweep.options, again)


@pytest.mark.slow
def test_one_injection_into_a_photograph_warns_that_mini_sd_knows_none(files: dict[str, Path], tmp_path: Path) -> None:
    from skimage.data import chelsea

    Image.fromarray(chelsea()).save(tmp_path / "cat.jpg")
    asked = ["--image-original", "cat.jpg", "--prompt-original", "a cat", "--layers", "mid_block", "--num-steps", STEPS]
    done = probekit("inject", "image", *asked, "--prompt-edit", FISH, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"Made again: O at \d+\.\d dB of cat\.jpg", done.stdout)
    assert "not cat.jpg but another picture" in done.stdout and "autoencoder alone" in done.stdout


def test_a_script_is_given_the_activations_of_given_pictures(tiny_folder: Path, files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def operation(target, source, context):\n    return source\n")
    asked = ["--model", tiny_folder, "--layers", "up_blocks.1.attentions.2", "--num-steps", 2, "--inversion", "plain"]
    prompts = ["--prompt-original", FISH, "--prompt-edit", STAR]
    for flag in ("--image-original", "--image-edit"):
        told = [*asked, *prompts, flag, files["fish"], "--out", flag.strip("-")]
        done = probekit("inject", "script", "mine.py", *told, cwd=tmp_path)
        assert done.returncode == 0 and "Made again: " in done.stdout, done.stderr
        made = tmp_path / flag.strip("-") / "images" / "together"
        o, e, result = (load_png(made / f"{name}.png") for name in ("O", "E", "result"))
        # from one start the last layer is everything
        assert (result - e).abs().max() < 0.02 < (result - o).abs().max()


def test_pairs_name_pictures_beside_their_file(files: dict[str, Path]) -> None:
    listed = files["fish"].parent / "pairs.yaml"
    listed.write_text(f"- {{original: {FISH}, edit: {STAR}, image_original: fish.png}}\n- {{original: a, edit: b}}\n")
    first, second = read_pairs(listed)
    assert first.images == {"original": (str(files["fish"]), FISH)} and second.images == {}
    sweep = InjectSweep(pairs_file=listed, num_steps=STEPS)
    assert sweep.guidance_scale == 1.0 and InjectSweep(pairs_file=listed, guidance=2.0).guidance_scale == 2.0
    told = [set(told) & {"image_original", "image_edit"} for told in sweep.inputs()["swept_pairs"]]
    assert told == [{"image_original"}, set()]


@pytest.mark.slow
def test_a_killed_run_of_given_pictures_goes_on_to_the_same_bytes(
    tiny_folder: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    listed = tmp_path / "pairs.yaml"
    listed.write_text("".join(f"- {{original: fish {n}, edit: {STAR}, image_edit: {files['star']}}}\n" for n in range(3)))
    sweep = ["inject", "sweep", "--model", tiny_folder, "--pairs-file", listed, "--num-steps", 2, "--layers", "@mid"]
    sweep += ["--inversion", "plain"]
    killed_once(sweep, tmp_path, "killed")
    assert probekit(*sweep, "--out", tmp_path / "whole").returncode == 0
    results = [(tmp_path / out / "results.parquet").read_bytes() for out in ("killed", "whole")]
    assert results[0] == results[1]
    both = [sorted((tmp_path / out / "images").rglob("*.png")) for out in ("killed", "whole")]
    assert len(both[0]) == len(both[1]) and "E_given.png" in {path.name for path in both[0]}
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*both, strict=True))


# --- bad input --------------------------------------------------------------------------------------------------------------


def test_bad_pictures_are_refused_in_one_line_before_anything_is_written(
    tiny_folder: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    fish, notes, nowhere = files["fish"], files["notes"], tmp_path / "nowhere.png"
    prompts = ["--prompt-original", FISH, "--prompt-edit", STAR]
    sweep = ["inject", "sweep", "--model", tiny_folder, "--num-steps", 2, "--out", tmp_path / "run"]
    image = ["inject", "image", "--model", tiny_folder, "--num-steps", 2, "--layers", "@mid", *prompts]
    listed, odd, none = (tmp_path / f"{name}.yaml" for name in ("listed", "odd", "none"))
    listed.write_text("- {original: a, edit: b}\n- {original: a, edit: b, image_edit: nowhere.png}\n")
    odd.write_text("- {original: a, edit: b, image_edit: 3}\n")
    none.write_text("- {original: a, edit: b}\n")
    ancestral = tmp_path / "ancestral"
    pipeline = with_scheduler("EulerAncestralDiscreteScheduler").pipeline
    pipeline.save_pretrained(ancestral)
    before = sorted(tmp_path.rglob("*"))
    pictured = ["--image-original", fish]
    for arguments, said in [
        ([*sweep, *prompts, "--image-original", nowhere], f"--image-original {str(nowhere)!r}: cannot be read (No such file"),
        ([*sweep, *prompts, "--image-edit", notes], f"--image-edit {str(notes)!r}: is no PNG, JPEG, WebP or BMP"),
        ([*sweep, *prompts, "--image-edit", tmp_path], f"--image-edit {str(tmp_path)!r}: cannot be read (it is a folder"),
        ([*sweep, "--prompt-edit", STAR, *pictured], "goes with --prompt-original, the caption that it is inverted under"),
        ([*sweep, "--prompt-original", FISH, "--image-edit", fish], "goes with --prompt-edit"),
        ([*sweep, *pictured], "goes with --prompt-original"),
        ([*sweep, "--pairs", 2, *pictured], "goes with --prompt-original"),
        ([*sweep, *prompts, "--pairs", 2, *pictured], "--pairs 2: is for controlled pairs"),
        ([*sweep, "--pairs-file", listed, *pictured], "pairs of --pairs-file name pictures of theirs"),
        ([*sweep, "--pairs-file", listed], f"pair 2: image_edit {str(nowhere)!r}: cannot be read"),
        ([*sweep, "--pairs-file", odd], "pair 1: image_edit 3 must be text"),
        ([*sweep, "--pairs-file", none, "--inversion", "plain"], "no pair of --pairs-file names a picture"),
        ([*sweep, *prompts, "--inversion", "plain"], "--inversion 'plain': is for given pictures"),
        (
            [*sweep, *prompts, *pictured, "--inversion", "edict"],
            "--inversion 'edict': choose fixed-point, newton, renoise, plain",
        ),
        ([*sweep, *prompts, *pictured, "--image-edit", fish, "--separate-noise"], "--separate-noise: is for prompts"),
        ([*sweep, *prompts, *pictured, "--guidance", 0.5], "--guidance 0.5: text-to-image pipelines are guided from 1"),
        ([*sweep, *prompts, *pictured, "--num-steps", 5000], "steps 5000"),
        ([*sweep, *prompts, *pictured, "--model", ancestral], "EulerAncestralDiscreteScheduler draws noise on the way"),
        ([*image, *pictured, "--model", ancestral], f"--image-original {str(fish)!r}: model {str(ancestral)!r}: its Euler"),
        ([*image, "--image-edit", notes], f"--image-edit {str(notes)!r}: is no PNG"),
        ([*image, "--inversion", "renoised", *pictured], "--inversion 'renoised': choose fixed-point, newton, renoise, plain"),
        ([*image, "--inversion", "plain"], "is for given pictures"),
        ([*image, *pictured, "--model", "avatar-vae"], "takes no prompt"),
    ]:
        assert said in refused(*arguments, cwd=tmp_path), (said, arguments)
    assert sorted(tmp_path.rglob("*")) == before


def test_options_of_pictures_are_refused_from_python_too(files: dict[str, Path]) -> None:
    with pytest.raises(ProbekitError, match="goes with --prompt-original"):
        InjectSweep(image_original=files["fish"], prompt_edit="b")
    with pytest.raises(ProbekitError, match="choose fixed-point, newton, renoise, plain"):
        InjectSweep(image_original=files["fish"], prompt_original="a", prompt_edit="b", inversion="edict")
