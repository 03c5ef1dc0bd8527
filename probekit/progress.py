"""How far a command is: the one progress bar, and what is kept where it is stopped."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress(title: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
    """A progress bar with the time that has passed and the time that is left, and the function that advances it.

    The function takes how far, and if there is something to say, that: `advance(1, "loss 0.2")`.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[said]}", markup=False),
    )
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task(title, total=total, completed=done, said="")
        yield lambda count, said="": bar.update(task, advance=count, said=said)


@contextlib.contextmanager
def telling(kept: Callable[[], str]) -> Iterator[None]:
    """Have an interruption (SIGINT, or a command's SIGTERM) say what is kept."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        stopped.args = stopped.args or (kept(),)
        raise
