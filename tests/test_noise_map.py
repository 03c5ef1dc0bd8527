"""The noise map, through the command line and from Python, on a tiny model."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline

from probekit import ProbekitError, load, seeds
from probekit.data.avatars import Avatars
from probekit.experiments import NoiseMapRun, noise_map_run
from probekit.images import as_pictures, load_png, to_uint8
from probekit.metrics import geometry
from probekit.metrics.distributions import share_interval
from probekit.metrics.geometry import matching_accuracy
from probekit.report.noise_map import PAPER, TO_NOISE, TO_SAMPLE, _mistakes, headline, second_moments
from probekit.runs.folder import Run, Stacked
from probekit.sampling import sample
from probekit.sampling.gaussian import Gaussian
from tests.conftest import killed, probekit, refused, tiny

N, SPLITS = 160, 8
RUN = ["noise-map", "run", "--model", "./tiny", "--n", str(N), "--steps", "3,30", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a tiny model lies, and `whole`, a run of it from the command line."""
    folder = tmp_path_factory.mktemp("noise-map")
    DDPMPipeline(tiny(), DDIMScheduler()).save_pretrained(folder / "tiny")
    done = probekit(*RUN, "--out", "whole", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "x0 -> xT" in done.stdout and "report: whole/report.html" in done.stdout
    return folder


def stacked(run: Path, steps: int, key: str) -> torch.Tensor:
    """The noises or samples of a run, all blocks."""
    blocks = sorted((run / "states").glob(f"samples-{steps}-*"))
    return torch.from_numpy(Stacked([block / f"{key}.npy" for block in blocks])[:])


@pytest.mark.slow
def test_second_moments_predict_the_map_as_the_best_denoiser_of_normal_data_makes_it(folder: Path) -> None:
    options = ["--steps", "3", "--theory", "avatars", "--out", "theory"]
    done = probekit(*RUN[:6], *options, "--device", "cpu", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "If avatars were normal with their mean and covariance" in done.stdout
    page = (folder / "theory" / "report.html").read_text()
    assert "second moments of the data" in page
    diffusion, rows = load(str(folder / "tiny"), device="cpu").diffusion, pd.read_parquet(folder / "theory" / "results.parquet")
    noise, schedule = diffusion.noise(range(N), 0), diffusion.schedule(3)
    data = Avatars(diffusion.image_size)
    for column, seen in {
        "predicted": data.images(data.split("train")[:2000]),
        "predicted_of_samples": stacked(folder / "theory", 3, "states"),
    }.items():
        mapped = sample(Gaussian.of(seen).denoiser(schedule), noise, schedule).end
        distance = torch.cdist(mapped.flatten(1).double(), noise.flatten(1).double())
        for row, answers in zip(rows.itertuples(), (distance.argmin(1), distance.argmin(0)), strict=True):
            own = 100 * (answers == torch.arange(N)).double().mean().item()
            assert getattr(row, column) == pytest.approx(own, abs=100 / N), (
                column,
                row.direction,
            )  # of ties one may fall otherwise
    whole = pd.read_parquet(folder / "whole" / "results.parquet")
    assert whole.predicted.isna().all()  # nobody knows what a folder's model was trained on
    assert "If " not in (folder / "whole" / "report.html").read_text()
    assert "data set 'nowhere': choose avatars" in refused(*RUN, "--theory", "nowhere", cwd=folder)
    assert NoiseMapRun(model="avatar-ldm", device="cpu").trained_on is not None
    assert NoiseMapRun(model="avatar-ldm", theory="none", device="cpu").trained_on is None


def test_what_is_beyond_second_moments_is_told_from_what_is_not() -> None:
    rows = pd.DataFrame(
        {
            "steps": [10, 10],
            "direction": [TO_NOISE, TO_SAMPLE],
            "accuracy": [33.0, 10.0],
            "low": [29.1, 7.7],
            "high": [37.2, 12.9],
            "predicted": [35.0, 30.0],
            "n": [512, 512],
        }
    )
    said = second_moments({"inputs": {"theory_data": "avatars"}}, rows)
    assert "35.0 % (measured 33.0 %) at 10" in said and "-20 points (xT -> x0, 10 steps)" in said and "x0 -> xT, 10" not in said
    assert "No measured share can be told" in second_moments(
        {"inputs": {"theory_data": "avatars"}}, rows.assign(predicted=rows.accuracy)
    )
    assert second_moments({"inputs": {}}, rows.assign(predicted=float("nan"))) == ""


@pytest.mark.slow
def test_the_rows_are_those_of_all_distances_between_what_is_stored(folder: Path) -> None:
    noise, diffusion = stacked(folder / "whole", 3, "noise"), load(str(folder / "tiny"), device="cpu").diffusion
    assert torch.equal(noise, diffusion.noise(range(N), 0))
    rows = pd.read_parquet(folder / "whole" / "results.parquet")
    ways = [(steps, way) for steps in (3, 30) for way in (TO_NOISE, TO_SAMPLE)]
    assert list(zip(rows.steps, rows.direction, strict=True)) == ways and set(rows.n) == {N}
    for (steps, way), row in zip(ways, rows.itertuples(), strict=True):
        sampled = stacked(folder / "whole", steps, "states")
        pair = (sampled, noise) if way == TO_NOISE else (noise, sampled)
        distance = torch.cdist(*(states.double().flatten(1) for states in pair))
        answers, own = distance.argmin(1), distance.diagonal().clone()
        right = answers == torch.arange(N)
        assert row.accuracy == pytest.approx(100 * right.double().mean()) and row.chance == pytest.approx(100 / N)
        assert row.std == pytest.approx(100 * matching_accuracy(answers, SPLITS)[1])
        assert (row.low, row.high) == pytest.approx([100 * v for v in share_interval(int(right.sum()), N)])
        assert (row.wrong, row.named) == (int((~right).sum()), len(set(answers[~right].tolist())))
        others = distance.fill_diagonal_(float("inf")).amin(1)  # all rows count: there are fewer than 256
        assert (row.own, row.other) == pytest.approx((float(own.mean()), float(others.mean())))
    # the noise is scaled up on the way: seen from it, the smallest sample is the nearest
    accuracy = rows.set_index(["steps", "direction"]).accuracy
    assert accuracy[30, TO_NOISE] == 100 and 0 < accuracy[30, TO_SAMPLE] < 10


def test_pictures_are_of_the_samples_and_noises_that_they_say(folder: Path) -> None:
    diffusion = load(str(folder / "tiny"), device="cpu").diffusion
    noise, sampled = (stacked(folder / "whole", 30, key) for key in ("noise", "states"))
    images = folder / "whole" / "images" / "steps-000030"
    names = sorted(path.stem.split("-") for path in images.iterdir())
    assert len(names) == 2 * noise_map_run.EXAMPLES * 3
    assert {int(row) for kind, row, *_ in names if kind == "found"} == set(range(6))
    distance = torch.cdist(noise.flatten(1), sampled.flatten(1))
    for kind, row, answer, part in names:
        number = int(answer) if part == "nearest" else int(row)
        if kind == "missed":
            assert row != answer and int(answer) == int(distance[int(row)].argmin())
        of_noise = (kind, part) in (("found", "own"), ("found", "nearest"), ("missed", "noise"))
        picture = noise[number] / 3 if of_noise else diffusion.decode(sampled[number][None])[0]
        assert (to_uint8(load_png(images / f"{kind}-{row}-{answer}-{part}.png")) == to_uint8(picture)).all(), (kind, row, part)


def test_the_report_is_one_page_that_fetches_nothing_and_can_be_shown_again(folder: Path) -> None:
    page = (folder / "whole" / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:|#|\$)|url\((?!#)|@import|fetch\(', page)
    assert "tiny is a diffusion model of pixels that predicts the noise" in page and "noise-map run --model ./tiny" in page
    figures = {f"{name}.{kind}" for name in ("accuracy", "nearest-3", "nearest-30") for kind in ("png", "svg")}
    assert {p.name for p in (folder / "whole" / "figures").iterdir()} == figures
    (folder / "whole" / "report.html").unlink()
    assert "xT -> x0" in probekit("describe", folder / "whole").stdout
    again = (folder / "whole" / "report.html").read_text()
    assert again == page


@pytest.mark.slow
def test_killed_and_started_again_finished_blocks_are_kept_and_the_result_is_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = folder / "killed" / "units"
    killed(*RUN, "--out", "killed", cwd=folder, when=lambda: any(units.glob("samples-30-*.parquet")))
    done = 64 * len(list(units.glob("samples-30-*.parquet")))
    assert 0 < done < N, "it was over before it could be killed"
    assert not (folder / "killed" / "results.parquet").exists()

    from probekit import sampling

    sampled: list[int] = []

    def counted(denoiser: Any, start: torch.Tensor, schedule: Any) -> Any:
        assert len(schedule) == 30  # 3 steps are finished
        sampled.append(len(start))
        return original(denoiser, start, schedule)

    original = sampling.sample
    monkeypatch.setattr(sampling, "sample", counted)
    before = {path: path.stat().st_mtime_ns for path in units.glob("*.parquet")}
    assert probekit(*RUN, "--out", "killed", cwd=folder).returncode == 0
    assert sum(sampled) == N - done and {path: path.stat().st_mtime_ns for path in before} == before
    names = ["results.parquet", "states/samples-30-0000128/states.npy", "figures/accuracy.svg"]
    for name in (*names, "images/steps-000030/found-0-0-own.png"):
        assert (folder / "killed" / name).read_bytes() == (folder / "whole" / name).read_bytes(), name
    assert "seed 0 there, 3 here" in refused(*RUN, "--seed", "3", "--out", "killed", cwd=folder)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--steps", "10,x"], "--steps '10,x'"),
        (["--steps", ""], "--steps ''"),
        (["--splits", "1"], "--splits 1: at least 2"),
        (["--n", "15"], "--n 15: at least 16, two for each of the 8 --splits\n"),
        (["--n", "-1"], "--n -1: at least 16"),
        (["--batch-size", "65"], "batch-size"),
        (["--steps", "10,1001"], "choose 1 to 1000"),
        (["--model", "random"], "makes no images from noise"),
        (["--prompt", "a dog"], "takes none"),
        (["--device", "nowhere"], "device 'nowhere'"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(folder: Path, options: list[str], said: str) -> None:
    assert said in refused("noise-map", "run", "--model", "./tiny", "--out", "refused", *options, cwd=folder)
    assert not (folder / "refused").exists()


def test_bad_options_are_refused_from_python_as_from_the_command_line() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"steps": "10,x"}, "--steps '10,x': write numbers of steps"),
        ({"steps": 10}, "--steps 10: text is needed"),
        ({"splits": 1}, "--splits 1: at least 2"),
        ({"n": 15}, "--n 15: at least 16, two for each of the 8 --splits"),
        ({"batch_size": 0}, "--batch-size 0: at least 1"),
        ({"guidance": -1}, "--guidance -1.0: at least 0"),
    ]
    for options, said in wrong:
        with pytest.raises(ProbekitError, match=re.escape(said)) as caught:
            NoiseMapRun(**options)
        assert "\n" not in str(caught.value)


def test_from_python_the_findings_are_those_of_the_command_line_and_nothing_is_done_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    before = {path: path.stat().st_mtime_ns for path in (folder / "whole" / "units").iterdir()}
    found = NoiseMapRun(model="./tiny", n=N, steps="3,30", batch_size=16, device="cpu").run(out="whole")
    assert {path: path.stat().st_mtime_ns for path in (folder / "whole" / "units").iterdir()} == before
    pd.testing.assert_frame_equal(found.rows, pd.read_parquet(folder / "whole" / "results.parquet"))
    html = found._repr_html_()
    assert html.count("<svg") == 1 and "Of 160 noises, the nearest to a sample" in html and "xT -&gt; x0" in html


# --- the same noise everywhere -----------------------------------------------------------------------------------------


def test_samples_are_those_of_the_space_of_noise_byte_for_byte(folder: Path) -> None:
    model = load(str(folder / "tiny"), device="cpu")
    run = Run.opened(folder / "whole")
    noise, states = (torch.from_numpy(run.arrays("samples-30-0000064")[key][:32]) for key in ("noise", "states"))
    decoded = model.space("noise:steps=30").decode(noise)  # 32 of one batch there, and here
    assert decoded.numpy().tobytes() == model.diffusion.decode(states).numpy().tobytes()


def test_noise_number_7_is_the_same_in_runs_pipelines_and_spaces(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = stacked(folder / "whole", 3, "noise")[7]
    assert torch.equal(kept, load(str(folder / "tiny"), device="cpu").diffusion.noise([7], 0)[0])
    assert torch.equal(kept, torch.randn(3, 8, 8, generator=seeds.numbered(0, 7)))
    model = load("mini-sd", device="cpu")
    noise, prompt = model.diffusion.noise([7], 0), "a large red fish at the left on a plain blue ground"
    assert torch.equal(
        noise[0], torch.randn(noise.shape[1:], generator=model.painter.row(prompt, noise=7, seed=0)["generator"])
    )
    begun: list[torch.Tensor] = []

    def first(unet: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        begun.append(arguments[0] if arguments else keywords["sample"])

    handle = model.denoiser.register_forward_pre_hook(first, with_kwargs=True)
    model.generate([prompt], [7], num_inference_steps=1, guidance_scale=1.0)
    # the space's picture is that of noise number 0 of its seed
    space, seed = model.space("text", steps=1, seed=3), 3
    space.decode(space.encode([prompt]))
    handle.remove()
    (of_pipeline, *_), of_space = begun[0], begun[-1][:1]
    assert torch.equal(of_pipeline, noise[0])  # the scheduler starts from noise as it is
    assert torch.equal(of_space, model.diffusion.noise([0], seed))


def test_a_latent_model_is_matched_in_its_latents_and_drawn_decoded(ldm_folder: Path, tmp_path: Path) -> None:
    run = ["noise-map", "run", "--model", ldm_folder, "--n", 16, "--splits", 2, "--steps", 2, "--out", tmp_path / "run"]
    assert probekit(*run).returncode == 0
    sampled = stacked(tmp_path / "run", 2, "states")
    assert sampled.shape == (16, 3, 8, 8)
    images = tmp_path / "run" / "images" / "steps-000002"
    (sample,) = images.glob("found-3-*-sample.png")
    diffusion = load(str(ldm_folder), device="cpu").diffusion
    assert (to_uint8(load_png(sample)) == to_uint8(diffusion.decode(sampled[3:4])[0])).all()
    assert "a diffusion model of latents" in (tmp_path / "run" / "report.html").read_text()
    shutil.rmtree(tmp_path / "run" / "images")  # shown again without its pictures it still has its numbers
    assert probekit("describe", tmp_path / "run").returncode == 0


def test_a_block_at_a_time_the_nearest_and_the_margin_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, candidates = (torch.randn(50, 3, 4, 4, generator=generator).numpy() for _ in range(2))
    distance = torch.cdist(*(torch.from_numpy(states).double().flatten(1) for states in (queries, candidates)))
    own, advanced = distance.diagonal()[:20].mean(), []
    monkeypatch.setattr(geometry, "_VALUES", 48 * 7)  # 7 rows
    found = geometry.nearest(queries, candidates, on_rows=advanced.append)
    assert torch.equal(found, distance.argmin(1)) and advanced == [*[7] * 7, 1]
    others = distance.fill_diagonal_(float("inf"))[:20].amin(1).mean()
    assert geometry.margin(queries, candidates, rows=20) == pytest.approx((float(own), float(others)))
    monkeypatch.setattr(geometry, "_VALUES", 1)  # less than a row
    assert torch.equal(geometry.nearest(queries, candidates), found)


def test_noise_of_any_shape_is_drawn_as_a_picture() -> None:
    noise = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(as_pictures(noise), (noise[:, :3] / 3).clamp(-1, 1))
    assert torch.equal(as_pictures(noise[:, :1]), (noise[:, [0, 0, 0]] / 3).clamp(-1, 1))
    tokens = noise.flatten(2).mT  # (2, 25, 4): a token a place, row by row
    assert torch.equal(as_pictures(tokens), as_pictures(noise))


def test_the_headline_says_the_numbers_the_kind_of_model_and_which_way_is_surer() -> None:
    def rows(*found: tuple[int, str, float, float, float]) -> pd.DataFrame:
        frame = pd.DataFrame(found, columns=["steps", "direction", "accuracy", "low", "high"])
        return frame.assign(n=2000, chance=0.05)

    config = {"options": {"model": "models/mine"}, "inputs": {"prediction": "flow", "space": "latents"}}
    ten = [(10, TO_NOISE, 100, 99.8, 100), (10, TO_SAMPLE, 100, 99.8, 100)]
    said = headline(config, rows(*ten, (1000, TO_NOISE, 99.97, 99.7, 100), (1000, TO_SAMPLE, 0.25, 0.1, 0.6)))
    assert said == (
        "mine is a rectified flow of latents. Of 2,000 noises, the nearest to a sample is the one it was made from in "
        "100 % of cases at 10 steps and 99.9 % at 1,000. Of 2,000 samples, the nearest to a noise is its own in "
        "100 % of cases at 10 steps and 0.25 % at 1,000. Chance is 0.05 %. "
        "From sample to noise is the surer way at 1,000 steps."
    )
    said = headline(config, rows((1, TO_NOISE, 50, 40, 60), (1, TO_SAMPLE, 55, 45, 65)))
    assert "50.0 % of cases at 1 step." in said and said.endswith("Neither way is clearly the surer one.")


def test_wrong_answers_are_told_with_how_many_they_name() -> None:
    def told(direction: str, wrong: int, named: int) -> str:
        return _mistakes(SimpleNamespace(direction=direction, wrong=wrong, named=named, n=2000))

    assert told(TO_NOISE, 0, 0) == "Every sample is nearest to its own noise."
    assert told(TO_SAMPLE, 1, 1) == "1 of 2,000 noises is nearer to another sample than to its own."
    assert told(TO_NOISE, 5, 1) == "5 of 2,000 samples are nearer to another noise than to their own, all to the same one."
    assert told(TO_SAMPLE, 5, 3).endswith("than to their own, to 3 different ones in all.")


def test_the_paper_s_numbers_are_those_of_its_poster() -> None:
    ddpm, ldm = PAPER["ImageNet DDPM"], PAPER["CelebA LDM"]
    assert (
        ddpm[TO_SAMPLE][100] == (59.0, 7.1)
        and ddpm[TO_NOISE][4000] == (99.5, 0.3)
        and list(ddpm[TO_NOISE]) == [10, 100, 1000, 4000]
    )
    assert all(by == {10: (100, 0), 100: (100, 0), 1000: (100, 0)} for by in ldm.values())
