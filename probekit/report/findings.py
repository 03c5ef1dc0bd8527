"""What an experiment found, told once for page, terminal and notebook."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from probekit.files import write_whole, writing

if TYPE_CHECKING:
    import pandas as pd

    from probekit.runs.folder import Run


@dataclass(frozen=True)
class Table:
    """A table as the terminal prints and a notebook shows it.

    columns: the headings; those in `text` stand at the left, numbers at the right. styles: rich's style of some rows' last
    cell, by the row's number.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: Sequence[str] = ()
    styles: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Findings:
    """What the rows of a run come to.

    run: its folder and config; rows: the tidy results. says: the finding in a sentence or two. tables: as numbers. figures:
    their files in figures/, without suffix, in the order of a notebook. page: draws the figures into figures/ and gives
    report.html.
    """

    run: Run
    rows: pd.DataFrame
    tables: Sequence[Table]
    page: Callable[[], bytes]
    figures: Sequence[str] = ()
    says: str = ""

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.run.folder

    def write(self) -> Path:
        """Write figures/ (PNG and SVG) and report.html; returns the page's path."""
        report = self.folder / "report.html"
        with writing(self.folder):
            (self.folder / "figures").mkdir(exist_ok=True)
            write_whole(report, self.page())
        return report

    def show(self) -> None:
        """Print the tables, what they say, and where the page is."""
        from probekit.report.terminal import console, print_table

        for table in self.tables:
            print_table(table)
        if self.says:
            console().print(f"\n{self.says}", markup=False, highlight=False)
        # as it is: a folder's name may hold brackets, and a line break would not be part of it
        console().print(f"\nreport: {self.folder / 'report.html'}", markup=False, highlight=False, soft_wrap=True)

    def _repr_html_(self) -> str:
        """The sentence, the figures and the tables, for a notebook."""
        parts = [f"<p>{html.escape(self.says)}</p>"] if self.says else []
        for name in self.figures:
            file = self.folder / "figures" / f"{name}.svg"
            if file.exists():
                svg = file.read_text()
                parts.append(svg[svg.index("<svg") :])
        for table in self.tables:
            head = "".join(f"<th>{html.escape(heading)}</th>" for heading in table.columns)
            body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
            parts.append(
                f"<details><summary>{html.escape(table.title)}</summary><table><thead><tr>{head}</tr></thead>"
                f"<tbody>{body}</tbody></table></details>"
            )
        return "\n".join(parts)
