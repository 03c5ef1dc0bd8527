"""The inspector's desk and server: what is asked, one at a time, and whom it answers."""

from __future__ import annotations

import base64
import io
import json
import runpy
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image

from probekit import ProbekitError, load
from probekit.experiments import InjectImage
from probekit.inspector import inspect
from probekit.inspector.desk import Desk
from probekit.inspector.preview import Preview
from probekit.inspector.server import Inspector, open_inspector
from probekit.models.swap import Swap
from probekit.runs.folder import Run
from tests.conftest import probekit, process, refused

LAYER = "up_blocks.2.attentions.0"
CROSS = "up_blocks.1.attentions.0.transformer_blocks.0.attn2"


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    made = Desk(load("mini-sd", device="cpu"), tmp_path_factory.mktemp("desk"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inspector]:
    made = open_inspector(load("mini-sd", device="cpu"))
    yield made
    made.close()


def question(desk: Desk, **told: Any) -> dict[str, Any]:
    return desk.first | {"num_steps": 2} | told


def pixels(url: str) -> bytes:
    """The PNG file in a data URL."""
    kind, _, content = url.partition(",")
    assert kind == "data:image/png;base64"
    return base64.b64decode(content)


def answer(desk: Desk, tab: str = "a", **told: Any) -> dict[str, Any]:
    events = list(desk.ask(tab, question(desk, **told)))
    assert "answer" in events[-1], events[-1]
    return events[-1]["answer"]


# --- answers -----------------------------------------------------------------------------------------------------------

ASKED: dict[str, dict[str, Any]] = {
    "two layers, blended, late": {"layers": [LAYER, "mid_block"], "operation": "blend", "weight": 0.5, "steps": "1"},
    "words": {"layers": [CROSS], "stream": "text", "words": "red fish"},
    "a mask, another noise": {"layers": [LAYER], "mask": "2x2:8", "noise": 3, "noise_edit": 4, "seed": 5},
    "left out, no guidance": {"layers": [CROSS], "operation": "bypass", "guidance": 1.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ASKED)
def test_a_copied_command_and_a_copied_script_give_exactly_that_picture(
    desk: Desk, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = answer(desk, **ASKED[name])
    monkeypatch.chdir(tmp_path)
    command = shlex.split(told["command"])
    assert command[:3] == ["probekit", "inject", "image"]
    done = probekit(*command[1:], "--out", "run")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "images" / "together" / "result.png").read_bytes() == pixels(told["picture"])
    assert told["says"] in done.stdout.replace("\n", " ")
    (tmp_path / "copied.py").write_text(told["python"])
    runpy.run_path("copied.py")
    assert (tmp_path / "picture.png").read_bytes() == pixels(told["picture"])


@pytest.mark.slow
def test_the_same_question_gives_the_same_bytes_whatever_was_asked_before(desk: Desk, tmp_path: Path) -> None:
    first = answer(desk, layers=[LAYER])["picture"]
    answer(desk, layers=["mid_block"])
    answer(desk, layers=[LAYER], prompt_edit="a small blue tree at the top on a plain red ground")
    assert answer(desk, layers=[LAYER])["picture"] == first
    fresh = Desk(load("mini-sd", device="cpu"), tmp_path)
    assert answer(fresh, layers=[LAYER])["picture"] == first
    fresh.close()


def test_o_and_e_are_made_once_and_previews_come_at_every_step(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    paint = Swap._paint
    monkeypatch.setattr(Swap, "_paint", lambda self, which, *rest: runs.append(which) or paint(self, which, *rest))
    pair = {"prompt_original": "a small green ring at the top on a plain red ground", "num_steps": 3}
    events = list(desk.ask("a", question(desk, layers=[], **pair)))
    assert [next(iter(event)) for event in events] == ["start", "ready"] and runs == [0, 1]
    events = list(desk.ask("a", question(desk, layers=[LAYER], **pair)))
    assert [next(iter(event)) for event in events] == ["start", "step", "step", "step", "answer"] and runs == [0, 1, 0]
    small = [Image.open(io.BytesIO(pixels(event["step"] and event["picture"]))) for event in events[1:-1]]
    assert {picture.size for picture in small} == {(16, 16)}
    told = events[-1]["answer"]
    assert told["O"] == events[0]["start"]["O"] and told["E"] == events[0]["start"]["E"] and told["O"] != told["picture"]


def test_a_preview_finds_a_linear_map() -> None:
    generator = torch.Generator().manual_seed(0)
    latents, mixing = torch.randn(2, 4, 16, 16, generator=generator), torch.rand(3, 4, generator=generator) / 8
    images = torch.einsum("dc,nchw->ndhw", mixing, latents) + 0.1
    preview = Preview()
    assert preview(latents[:1]) is None
    preview.fit(latents, images.repeat_interleave(4, 2).repeat_interleave(4, 3))
    seen = torch.tensor(list(Image.open(io.BytesIO(pixels(preview(latents[1:]) or ""))).getdata())).float()
    assert (seen.reshape(16, 16, 3).permute(2, 0, 1) / 127.5 - 1 - images[1]).abs().max() < 1.5 / 127.5


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"layers": ["nowhere"]}, "no layer 'nowhere'"),
        ({"layers": [LAYER], "steps": "9"}, "steps 9: the schedule has steps 0 to 1"),
        ({"layers": [LAYER], "words": "zebra"}, "--words 'zebra'"),
        ({"layers": [LAYER], "stream": "text"}, "stream 'text'"),
        ({"layers": [LAYER], "num_steps": "many"}, "--num-steps 'many': a whole number is needed"),
        ({"layers": [LAYER], "mask": "1x1:0"}, "nothing lies inside"),
        ({"layers": [LAYER], "image_edit": "unknown"}, "this picture is not here"),
        ({"layers": [5]}, "--layers 5: text is needed"),
        ({"layers": [LAYER], "model": "other"}, "unknown key 'model'"),
        ({"layers": [LAYER], "device": "cuda"}, "unknown key 'device'"),
    ],
)
def test_what_cannot_be_asked_is_one_line(desk: Desk, told: dict[str, Any], said: str) -> None:
    (*_, last) = desk.ask("a", question(desk, **told))
    assert said in last["error"] and "\n" not in last["error"], last


# --- one at a time -----------------------------------------------------------------------------------------------------


class Held:
    """Swap._paint, held until it is let go, with how many run at a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.begun, self.running, self.most = threading.Event(), threading.Event(), 0, 0
        paint = Swap._paint

        def held(swap: Swap, *arguments: Any) -> Any:
            self.running += 1
            self.most = max(self.most, self.running)
            self.begun.set()
            assert self.go.wait(60)
            try:
                return paint(swap, *arguments)
            finally:
                self.running -= 1

        monkeypatch.setattr(Swap, "_paint", held)


def until(come: Callable[[], bool]) -> None:
    """Wait for it, a minute at most."""
    for _ in range(6000):
        if come():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come")


def in_background(events: Iterator[dict[str, Any]]) -> tuple[threading.Thread, list[dict[str, Any]]]:
    found: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: found.extend(events))
    thread.start()
    return thread, found


def test_a_newer_question_takes_the_place_of_a_tabs_older_ones_and_another_tab_waits(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(desk, layers=[LAYER])  # O and E are there
    held = Held(monkeypatch)
    computing = in_background(desk.ask("one", question(desk, layers=[LAYER])))
    assert held.begun.wait(60)
    waiting = in_background(desk.ask("one", question(desk, layers=["mid_block"])))
    until(lambda: "one" in desk._newest)
    other = in_background(desk.ask("two", question(desk, layers=[LAYER])))
    until(lambda: "two" in desk._newest)
    ticket = desk._newest["one"]
    newest = in_background(desk.ask("one", question(desk, layers=["mid_block.resnets.0"])))
    until(lambda: desk._newest["one"] is not ticket)
    held.go.set()
    for thread, _ in (computing, waiting, other, newest):
        thread.join(60)
    assert computing[1][-1] == {"replaced": True} and waiting[1][-1] == {"replaced": True}
    assert other[1][0] == {"waiting": True} and "answer" in other[1][-1] and "answer" in newest[1][-1]
    assert held.most == 1 and desk._newest == {}


def test_a_page_that_goes_stops_what_it_asked(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = desk.ask("gone", question(desk, layers=[LAYER]))
    next(lines)
    lines.close()  # as the server does when the connection ends
    assert "gone" not in desk._newest
    assert "answer" in list(desk.ask("gone", question(desk, layers=[LAYER])))[-1]


# --- sweeps and runs ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_stopped_half_way_is_kept_and_its_command_goes_on(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiles = []
    for event in desk.sweep("a", question(desk)):
        if "tile" in event:
            tiles.append(event["tile"])
            if len(tiles) == 3:
                desk.stop("a")
    stopped = event["stopped"]
    assert stopped["done"] == 3 and stopped["of"] == len(desk.about["default_layers"])
    assert [tile["layer"] for tile in tiles] == desk.about["default_layers"][:3]
    folder = desk.save(stopped["id"])
    run = Run.opened(folder)
    done = probekit(*run.config["command"][1:])
    assert done.returncode == 0, done.stderr
    assert len([*(folder / "units").glob("*")]) == stopped["of"]
    for tile in tiles:
        assert run.picture(f"all_{tile['layer']}", "result").read_bytes() == pixels(tile["picture"])
        # the tile's picture is the answer to the same question
    assert answer(desk, layers=[tiles[2]["layer"]])["picture"] == tiles[2]["picture"]


def test_a_sweep_by_time_tells_of_every_window_and_layer(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = ["mid_block.resnets.0", "up_blocks.2.attentions.1"]
    monkeypatch.setitem(desk.__dict__, "_default_layers", layers)
    events = list(desk.sweep("a", question(desk, operation="blend", weight=0.9), 2))
    tiles = [event["tile"] for event in events if "tile" in event]
    windows = ["all", "0%-50%", "50%-100%"]
    assert [(tile["window"], tile["layer"]) for tile in tiles] == [(w, layer) for w in windows for layer in layers]
    assert "--apart" in events[-1]["done"]["command"] and "--windows 2" in events[-1]["done"]["command"]
    (*_, refused) = desk.sweep("a", question(desk, steps="1"), 2)  # parts of steps are told in percents
    assert "percents" in refused["error"]


@pytest.mark.slow
def test_an_answer_saved_as_a_run_is_described(desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told = answer(desk, layers=[LAYER], steps="1")
    folder = desk.save(told["id"])
    shown = probekit("describe", folder)
    assert shown.returncode == 0 and told["says"] in shown.stdout, shown.stderr
    assert desk.save(told["id"]) == folder  # again is no harm
    with pytest.raises(ProbekitError, match="not kept"):
        desk.save("a9999")


@pytest.mark.slow
def test_ray_sweeps_to_the_same_pictures_and_is_stopped(tmp_path: Path, desk: Desk) -> None:
    by_ray = Desk(load("mini-sd", device="cpu"), tmp_path, engine="ray")
    made = []
    for asked in (desk, by_ray):
        tiles = [event["tile"] for event in asked.sweep("a", question(asked)) if "tile" in event]
        pictures = {tile["layer"]: Image.open(io.BytesIO(pixels(tile["picture"]))) for tile in tiles}
        made.append({layer: torch.tensor(list(picture.getdata())).int() for layer, picture in pictures.items()})
    assert made[0].keys() == made[1].keys() == set(desk.about["default_layers"])
    # a worker may have another number of threads, which rounds otherwise
    assert all((made[0][layer] - made[1][layer]).abs().max() <= 1 for layer in made[0])
    assert any(not torch.equal(made[0][layer], made[0]["mid_block.resnets.0"]) for layer in made[0])
    by_ray.close()


# --- the server --------------------------------------------------------------------------------------------------------


def lines(opened: Inspector, path: str, body: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in httpx.post(f"{opened.url}{path}", json=body, timeout=120).text.splitlines()]


@pytest.mark.slow
def test_a_question_over_http_and_by_gradio_client(opened: Inspector, desk: Desk) -> None:
    from gradio_client import Client

    asked = question(desk, layers=[LAYER])
    over_http = lines(opened, "ask", {"tab": "a", "question": asked})[-1]["answer"]
    by_client = Client(opened.url, verbose=False).predict(asked, api_name="/ask")["answer"]
    assert over_http["picture"] == by_client["picture"] == answer(desk, layers=[LAYER])["picture"]


def test_others_are_refused(opened: Inspector, tmp_path: Path) -> None:
    url = opened.url
    assert url.startswith("http://127.0.0.1:")
    for method, path, headers in [
        ("GET", "", {"Host": "evil.example"}),
        ("GET", "", {"Host": "127.0.0.1.evil.example:7860"}),
        ("POST", "ask", {"Origin": "http://evil.example"}),
        ("POST", "stop", {"Origin": "null"}),
        ("POST", "ask", {"Sec-Fetch-Site": "cross-site"}),
        ("GET", "gradio_api/file=/etc/passwd", {}),
        ("GET", f"gradio_api/file={Path(__file__)}", {}),
        ("POST", "gradio_api/upload", {}),
        ("GET", "gradio_api/proxy=http://example.com", {}),
        ("GET", "run/../../../etc/passwd", {}),
        ("GET", "theme.css", {}),
        ("GET", "docs", {}),
    ]:
        answered = httpx.request(method, f"{url}{path}", headers=headers)
        assert answered.status_code in (403, 404), (path, headers, answered.text[:200])
        assert "root:" not in answered.text
    page = httpx.get(url)
    assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]
    assert not [part for part in ("http://", "https://") if part in page.text.replace("http://www.w3.org/", "")]


@pytest.mark.parametrize(
    ("path", "content", "said"),
    [
        ("ask", b"nonsense", "is no JSON"),
        ("ask", b"[1]", "no JSON object"),
        ("ask", b"[" * 100_000, "is no JSON"),
        ("sweep", b'{"question": {}, "windows": "x"}', "windows x"),
        ("sweep", b'{"question": {}, "windows": 1000}', "windows 1000"),
        ("save", b'{"id": "../../etc"}', "is not kept"),
        ("picture", b"no picture", "is no PNG"),
        ("picture", b"x" * (33 << 20), "larger than 32 MiB"),
        ("words", b"5", "no JSON object"),
    ],
)
def test_bad_input_is_one_line_and_the_server_lives_on(opened: Inspector, path: str, content: bytes, said: str) -> None:
    answered = httpx.post(f"{opened.url}{path}", content=content, timeout=60)
    told = json.loads(answered.text.splitlines()[-1])["error"]
    assert said in told and "\n" not in told and "/tmp" not in told, told
    assert httpx.post(f"{opened.url}stop", json={"tab": "a"}).json() == {}


@pytest.mark.slow
def test_pictures_that_are_given_are_inverted(opened: Inspector, desk: Desk) -> None:
    from probekit.data.scenes import Scene, render
    from probekit.inspector.preview import png

    captions = {"original": desk.first["prompt_original"], "edit": desk.first["prompt_edit"]}
    asked = question(desk, layers=[LAYER], num_steps=4, guidance=1.0)
    for side, caption in captions.items():
        drawn = render([Scene.parse(caption)], torch.Generator().manual_seed(3))[0]
        given = httpx.post(f"{opened.url}picture", content=png(drawn), headers={"X-Name": f"..%2F{side}.png"}).json()
        assert given["name"] == f"{side}.png" and pixels(given["url"]) == png(drawn)
        asked[f"image_{side}"] = given["id"]
    told = lines(opened, "ask", {"tab": "a", "question": asked})[-1]["answer"]
    assert "--image-original original.png" in told["command"] and "InjectImage(" in told["python"]
    seen = {one["attribute"]: one["original"] for one in told["read"]}
    assert seen["kind"] == "moon" and seen["ground"] == "green"


# --- runs, and the end -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    pair = {"prompt_original": "a red fish", "prompt_edit": "a blue star", "num_steps": 2}
    InjectImage(**pair, layers=["mid_block.*"], apart=True).run(out=folder / "apart")
    InjectImage(**pair, layers=["@mid"]).run(out=folder / "together")
    done = probekit("inject", "sweep", "--pairs", 1, "--factors", "content", "--num-steps", 2, "--out", folder / "sweep")
    assert done.returncode == 0, done.stderr
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.slow
def test_finished_runs_are_served_whole_and_what_is_none_is_refused(finished: dict[str, Path], tmp_path: Path) -> None:
    two = inspect(finished["sweep"], str(finished["apart"]))
    try:
        runs = [httpx.get(f"{two.url}run/{number}").json() for number in (0, 1)]
        assert [len(run["layers"]) for run in runs] == [18, 3]
        for run in runs:
            for pair in run["pairs"]:
                assert set(pair["pictures"]) == set(run["windows"]) and pixels(pair["O"])
        assert "one_pair" in runs[1] and httpx.get(f"{two.url}run/2").status_code == 403
        assert "name a model" in lines(two, "ask", {"tab": "a", "question": {}})[0]["error"]
    finally:
        two.close()
    for arguments, said in [
        ([finished["together"]], "inspect shows runs of inject sweep"),
        ([tmp_path], "neither"),
        ([finished["sweep"]] * 3, "two runs stand side by side"),
        (["mini-sd", "mini-sd"], "two models"),
        (["avatar-vae"], "takes no prompt"),
        (["mini-sd", "--engine", "slurm"], "--engine 'slurm'"),
        ([finished["sweep"], "--port", "0"], "--port"),
    ]:
        told = refused("inspect", *arguments, "--no-browser", cwd=tmp_path)
        assert said in told, told


@pytest.mark.slow
def test_it_ends_with_its_temporary_files(finished: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    running = process("inspect", finished["apart"], "--no-browser", cwd=tmp_path)
    assert running.stdout is not None
    url = next(line for line in running.stdout if "inspector: " in line).split()[1]
    assert httpx.get(url).status_code == 200 and [*tmp_path.glob("probekit-inspect-*")]
    running.send_signal(signal.SIGINT)
    assert running.wait(60) == 0
    assert not [*tmp_path.glob("probekit-inspect-*")]


@pytest.mark.slow
def test_in_a_notebook_they_show_themselves(opened: Inspector, finished: dict[str, Path]) -> None:
    assert f'<iframe src="{opened.url}"' in opened._repr_html_()
    model = load("mini-sd", device="cpu")
    run = Run.opened(finished["sweep"])
    assert run._repr_html_().count("<svg") == 2 and "inject sweep" in run._repr_html_()
    assert "mid_block.attentions.0" in model.layers._repr_html_()
    original, edit = ("a red fish", 0), ("a blue star", 0)
    assert model.sweep(original, edit, [[], []], num_inference_steps=1)._repr_html_().count("<img") == 3
