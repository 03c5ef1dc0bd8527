"""The inspector's page in a real browser: what a user does, and what is seen then."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from probekit import load
from probekit.experiments import InjectImage
from probekit.inspector.desk import SCENES
from probekit.inspector.preview import url
from probekit.inspector.server import Inspector, open_inspector
from probekit.models import Model
from tests.conftest import probekit

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: the page is not looked at"), pytest.mark.slow]

MIDDLE, DECODER, LAST = "mid_block.attentions.0", "up_blocks.2.attentions.0", "up_blocks.2.attentions.1"
WAIT = 120_000  # ms, on a machine that is busy
PAIR = {"num_steps": 2}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    # without what it would ask of its makers' servers
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=quiet)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "sweep"
    swept = ["--pairs", 1, "--factors", "content,surface", "--num-steps", 2, "--by-time", "--windows", 2]
    done = probekit("inject", "sweep", *swept, "--layers", "@mid", "--layers", "up_blocks.2.*", "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def opened() -> Iterator[Inspector]:
    made = open_inspector(mini_sd())
    yield made
    made.close()


@pytest.fixture(scope="module")
def run_alone(sweep: Path) -> Iterator[str]:
    made = open_inspector(runs=[sweep])
    yield made.url
    made.close()


@pytest.fixture
def page(browser: Any, opened: Inspector) -> Iterator[Callable[..., Any]]:
    """Opens pages of the inspector, in contexts of their own, and sees to it that none of them had an error or left home."""
    contexts, wrong = [], list[str]()

    def open_page(question: dict[str, Any] | None = None, width: int = 1280, at: str | None = None, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        made = context.new_page()
        made.set_default_timeout(WAIT)
        made.on("pageerror", lambda error: wrong.append(str(error)))
        made.on("request", lambda request: None if _is_home(request.url) else wrong.append(request.url))
        address = f"#{quote(json.dumps(PAIR | (question or {})))}"
        made.goto(at or f"{opened.url}{address}")
        return made

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong, wrong


@functools.cache
def mini_sd() -> Model:
    return load("mini-sd", device="cpu")


def _is_home(url: str) -> bool:
    return url.startswith(("http://127.0.0.1:", "data:", "blob:", "file:"))


def tile(page: Any, layer: str) -> Any:
    return page.locator(f"[data-layer='{layer}']").first


def answered(page: Any, before: str | None = None) -> tuple[str, str]:
    """The id and the picture of the answer, once there is one other than `before`."""
    shown = page.locator("[data-answer][data-id]")
    page.wait_for_function(
        """before => {
          const image = document.querySelector("[data-answer][data-id]");
          return image && image.dataset.id && image.dataset.id !== before;
        }""",
        arg=before,
    )
    return shown.get_attribute("data-id"), shown.get_attribute("src")


def expected(**told: Any) -> bytes:
    """The picture that `inject image` gives to the first question of the page; that its run has it too, test_inspector says."""
    options = {"prompt_original": SCENES[0], "prompt_edit": SCENES[1], "guidance": 3.0} | PAIR | told
    asked = InjectImage(**options, device="cpu")
    asked.__dict__["loaded"] = mini_sd()
    return url(asked.answer("together").pictures["result"]).encode()


def test_a_click_asks_and_the_answer_says_what_came_over(page: Callable[..., Any]) -> None:
    shown = page()
    tile(shown, LAST).click()
    _, picture = answered(shown)
    assert picture.encode() == expected(layers=[LAST])
    said = shown.locator("[data-part='answer']").inner_text()
    assert "are E's" in said


def test_two_layers_a_step_range_and_a_link_that_gives_the_same_bytes(page: Callable[..., Any]) -> None:
    shown = page()
    tile(shown, MIDDLE).click()
    first, _ = answered(shown)
    tile(shown, DECODER).click(modifiers=["Shift"])
    second, both = answered(shown, first)
    assert both.encode() == expected(layers=[MIDDLE, DECODER])
    # the range's first handle, by the keyboard
    handle = shown.get_by_label("first step")
    handle.focus()
    handle.press("ArrowRight")
    _, late = answered(shown, second)
    assert late.encode() == expected(layers=[MIDDLE, DECODER], steps="1")
    again = page(at=shown.url)
    _, linked = answered(again)
    assert linked == late


def test_a_mask_is_painted_and_the_keyboard_does_it_all(page: Callable[..., Any]) -> None:
    shown = page()
    tile(shown, DECODER).focus()
    shown.keyboard.press("Enter")
    first, whole = answered(shown)
    assert whole.encode() == expected(layers=[DECODER])
    shown.locator("[data-part='how'] summary", has_text="Area").click()
    grid = shown.locator(".pi-mask-row > :first-child")
    box = grid.bounding_box()
    shown.mouse.move(box["x"] + 2, box["y"] + 2)
    shown.mouse.down()
    shown.mouse.move(box["x"] + box["width"] - 2, box["y"] + 2, steps=20)
    shown.mouse.up()
    _, masked = answered(shown, first)
    assert masked.encode() == expected(layers=[DECODER], mask="16x16:ffff" + "0" * 60)


def test_a_sweep_fills_tiles_and_is_stopped_half_way(page: Callable[..., Any]) -> None:
    shown = page()
    shown.get_by_role("button", name="Sweep this pair").click()
    shown.wait_for_function("() => document.querySelectorAll('[data-layer] img[src]').length >= 2")
    shown.get_by_role("button", name="Stop").click()
    shown.get_by_role("button", name="Sweep this pair").wait_for()
    filled = shown.locator("[data-layer] img[src]").count()
    assert 2 <= filled < 18
    strip = shown.locator(".pi-strip li button")
    assert strip.count() == 1 and strip.get_attribute("title") == f"stopped at {filled} of 18"
    # the server is free again
    tile(shown, LAST).click()
    answered(shown)


def test_a_finished_run_opens_with_its_pairs_and_windows(page: Callable[..., Any], sweep: Path, run_alone: str) -> None:
    for address in (run_alone, (sweep / "report.html").as_uri()):
        shown = page(at=address)
        run = shown.locator(".pi-runs")
        selects = run.locator("select")
        before = run.locator(f"[data-layer='{LAST}'] img").first.get_attribute("src")
        assert before.startswith("data:image/png")
        selects.first.select_option(index=1)
        shown.wait_for_function(
            """([layer, before]) =>
              document.querySelector(`.pi-runs [data-layer="${layer}"] img`).getAttribute("src") !== before""",
            arg=[LAST, before],
        )
        run.locator(f"[data-layer='{LAST}']").first.click()
        assert "too few pairs to tell" in run.inner_text().lower()


def test_a_wrong_address_and_markup_are_text(page: Callable[..., Any]) -> None:
    markup = "<img src=x onerror=\"document.title='taken'\"> [/b] $\\frac$"
    shown = page({"prompt_edit": markup, "layers": [MIDDLE]})
    answered(shown)
    assert markup in shown.locator("probekit-inspector").inner_text() or shown.locator("textarea").last.input_value() == markup
    assert shown.title() != "taken" and shown.locator("img[src=x]").count() == 0
    for odd in ({"layers": ["nowhere"]}, {"num_steps": "many", "layers": [MIDDLE]}, {"unheard": 1, "layers": [MIDDLE]}):
        wrong = page(odd)
        alert = wrong.get_by_role("alert").first
        alert.wait_for()
        said = alert.inner_text()
        assert said and "\n" not in said.strip() and "Traceback" not in said
    damaged = page(at=f"{shown.url.split('#')[0]}#%7Bnonsense")
    damaged.get_by_role("alert").first.wait_for()
    tile(damaged, LAST).click()  # and it lives on
    answered(damaged)


def test_two_tabs_at_once_each_get_their_answer(page: Callable[..., Any]) -> None:
    one, two = page(), page()
    tile(one, LAST).click()
    tile(two, DECODER).click()
    shown = [answered(one)[1], answered(two)[1]]  # both, before anything else uses the model
    assert [picture.encode() for picture in shown] == [expected(layers=[LAST]), expected(layers=[DECODER])]


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_sticks_out_at_either_width(page: Callable[..., Any], width: int, scheme: str) -> None:
    shown = page({"layers": [LAST]}, width, color_scheme=scheme)
    answered(shown)
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    paper = shown.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(int(part) for part in paper.removeprefix("rgb(").rstrip(")").split(",")) > 3 * 128
    assert light == (scheme == "light")
