"""The report of an interpolation: the frames from one picture to the other, and how even and exact each method's way is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from probekit.report.figures import data_url, render, save_figure, style
from probekit.report.findings import Findings, Table

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from probekit.runs.folder import Run


def findings(run: Run, rows: pd.DataFrame) -> Findings:
    """What a run's rows come to: one line a method, how far the way is, how even, and how exact its ends."""
    columns = ("method", "length (LPIPS)", "largest change of a frame", "error at the ends (RMS)")
    told = [(c["method"], f"{c['length']:.3f}", f"{c['largest']:.3f}", f"{c['error']:.2g}") for c in changes(rows)]
    table = Table("from one picture to the other", columns, told, text=("method",))
    return Findings(run, rows, [table], lambda: _page(run, rows), ("frames",), headline(rows))


def headline(rows: pd.DataFrame) -> str:
    """The finding in a sentence."""
    ways = changes(rows)
    shortest, exact = (min(ways, key=lambda way: way[key]) for key in ("length", "error"))
    if len(ways) == 1:
        return f"The way is {shortest['length']:.3f} long (LPIPS); its ends miss the images by {exact['error']:.2g} (RMS)."
    return (
        f"Between these two images the shortest way is that of {shortest['method']}, {shortest['length']:.3f} long (LPIPS); "
        f"the ends of {exact['method']} come nearest to them, which they miss by {exact['error']:.2g} (RMS). Of other images "
        "two cannot tell."
    )


def changes(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """For each method the way's length, its largest step from frame to frame (LPIPS both), and the error at its ends (RMS)."""
    return [
        {
            "method": str(method),
            "length": float(group.lpips.sum()),
            "largest": float(group.lpips.max()),
            "error": float(group.end_error.iloc[0]),
        }
        for method, group in rows.groupby("method", sort=False)
    ]


def _page(run: Run, rows: pd.DataFrame) -> bytes:
    ways, images = changes(rows), run.folder / "images"
    names = ["from", *(f"frame-{i}" for i in range(run.config["options"]["frames"])), "to"]
    save_figure(_strips(images, [way["method"] for way in ways], names), run.folder / "figures" / "frames")
    return render(
        "interpolation/page.html",
        run,
        ways=[way | {"frames": [data_url(images / way["method"] / f"{name}.png") for name in names]} for way in ways],
        headline=headline(rows),
    )


def _strips(images: Path, methods: list[str], names: list[str]) -> Figure:
    """A row a method: the one image, the frames from it to the other, the other image."""
    from matplotlib import pyplot as plt
    from PIL import Image

    with plt.rc_context(style()):
        figure, axes = plt.subplots(
            len(methods),
            len(names),
            figsize=(0.9 * len(names) + 1, 0.95 * len(methods) + 0.3),
            squeeze=False,
            layout="constrained",
        )
        for line, method in zip(axes, methods, strict=True):
            for ax, name in zip(line, names, strict=True):
                ax.imshow(Image.open(images / method / f"{name}.png"), interpolation="none")
                ax.set(xticks=[], yticks=[])
                ax.spines[:].set_visible(False)
            line[0].set_ylabel(method, rotation=0, ha="right", va="center", labelpad=8)
        for ax, title in ((axes[0][0], "from"), (axes[0][-1], "to")):
            ax.set_title(title)
        plt.close(figure)
    return figure
