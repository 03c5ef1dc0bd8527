"""What all reports share: how figures look and are written, and how a command is told."""

from __future__ import annotations

import base64
import io
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from probekit.runs.folder import Run


def style() -> dict[str, Any]:
    """matplotlib's settings for every figure."""
    return {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#8a8880",
        "xtick.color": "#3b3a36",
        "ytick.color": "#3b3a36",
        "text.color": "#26251f",
        "axes.labelcolor": "#26251f",
        "svg.fonttype": "path",
        "text.parse_math": False,  # labels, layers and files are called what they are called
        "svg.hashsalt": "probekit",
    }


def save_figure(figure: Figure, path: Path) -> str:
    """Write PNG and SVG; returns the SVG's markup. Nothing in either depends on the time of writing."""
    from matplotlib import pyplot as plt

    with plt.rc_context(style()):  # its salt makes the ids in the SVG the same every time
        figure.savefig(path.with_suffix(".png"), dpi=160, metadata={"Software": None})
        figure.set_layout_engine("none")  # both have the same layout, which takes as long as to draw
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    svg = path.with_suffix(".svg").read_text()
    return svg[svg.index("<svg") :]


def data_url(path: Path) -> str:
    """A picture inside the page: pictures above 192 pixels are made smaller, as JPEG."""
    from PIL import Image

    content, kind = path.read_bytes(), "png"
    picture = Image.open(io.BytesIO(content))
    if max(picture.size) > 192:
        picture.thumbnail((192, 192))
        buffer, kind = io.BytesIO(), "jpeg"
        picture.save(buffer, "JPEG", quality=88)
        content = buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def command_line(command: list[str]) -> str:
    """The command as one would type it."""
    return shlex.join(command)


def render(template: str, run: Run, **given: Any) -> bytes:
    """A page of this folder's templates; each is given the run's config, options, inputs and command, and more."""
    config = run.config
    told = {key: config[key] for key in ("options", "inputs")} | {"config": config, "command": command_line(config["command"])}
    return _page(template, told | given)


def inspector_page(data: dict[str, Any], *, live: bool) -> bytes:
    """The inspector by itself, of a model and runs as its element reads them. live: with a server behind it."""
    return _page("inspect.html", {"data": data, "live": live})


def _page(template: str, given: dict[str, Any]) -> bytes:
    import jinja2

    here = Path(__file__).parent
    templates = jinja2.Environment(loader=jinja2.FileSystemLoader(here), autoescape=True)
    templates.globals |= {f"inspector_{kind}": (here / f"inspector.{kind}").read_text() for kind in ("css", "js")}
    return templates.get_template(template).render(**given).encode()
