"""The inspector's server: one page, the answers of a `Desk` line by line, and finished runs; on this machine alone, unless told
otherwise."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probekit.hooks.errors import ProbekitError
from probekit.inspector.desk import Desk
from probekit.models import Model
from probekit.runs.folder import Run

HOST = "127.0.0.1"


@dataclass(frozen=True, eq=False)
class Inspector:
    """An inspector that is open. url: where. It closes with `close`, and with the process."""

    url: str
    _undone: contextlib.ExitStack

    def close(self) -> None:
        """End the server and what it computes, and delete its temporary files."""
        self._undone.close()

    def _repr_html_(self) -> str:
        """The page, inline."""
        return f'<iframe src="{self.url}" style="width: 100%; height: 900px; border: 0" title="probekit inspect"></iframe>'


def open_inspector(
    model: Model | None = None,
    runs: Sequence[Path] = (),
    *,
    dtype: str = "auto",
    engine: str = "local",
    host: str = HOST,
    port: int | None = None,
) -> Inspector:
    """Open the inspector of a model, of one or two finished runs, or of both; it answers in the background.

    port: a free one by default. Raises ProbekitError for a model that takes no prompt, for runs that are not finished or of
    other experiments, and where the port is not to be had.
    """
    gradio = _gradio()
    if len(runs) > 2:
        raise ProbekitError(f"run {str(runs[2])!r}: two runs stand side by side, not {len(runs)}")
    seen = [_seen(folder) for folder in runs]
    _check_address(host, port)
    with contextlib.ExitStack() as undone:
        folder = Path(undone.enter_context(tempfile.TemporaryDirectory(prefix="probekit-inspect-")))
        desk = None if model is None else Desk(model, folder, dtype, engine)
        if desk is not None:
            undone.callback(desk.close)
            _ = desk.about  # refuses what cannot be inspected
        app = gradio.Server(title="probekit inspect", docs_url=None, redoc_url=None, openapi_url=None)
        from probekit.inspector.routes import LARGEST, add_routes

        add_routes(app, desk, seen)
        try:
            _, url, _ = app.launch(
                server_name=host,
                server_port=port,
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                inbrowser=False,
                inline=False,
                max_file_size=LARGEST,
                ssr_mode=False,
                mcp_server=False,
                pwa=False,
                enable_monitoring=False,
            )
        except OSError as error:
            raise ProbekitError(f"--host {host} --port {port}: cannot be listened on ({error})") from error
        undone.callback(app.blocks.close, verbose=False)
        return Inspector(url, undone.pop_all())


def _check_address(host: str, port: int | None) -> None:
    """Raises ProbekitError where nothing can listen: the server's own thread would complain, and be waited for."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port or 0), family=family).close()
    except (OSError, UnicodeError) as error:
        raise ProbekitError(f"--host {host!r} --port {port or 'any'}: cannot be listened on ({error})") from error


def _gradio() -> Any:
    # it would ask its makers' servers for news, and tell them of this one
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError as error:
        raise ProbekitError("inspect: needs the package gradio; pip install 'probekit[inspect]'") from error
    return gradio


def _seen(folder: Path) -> dict[str, Any]:
    """A finished run of injections, for the page."""
    from probekit.report import injection, picture

    run = Run.opened(folder)
    rows = run.results()
    match run.config["experiment"]:
        case "inject-sweep":
            return injection.seen(run, injection.Summary.of(run.config["inputs"]["swept_windows"], rows))
        case "inject-image" | "inject-script" if run.config["options"]["apart"]:
            return picture.seen(run, rows)
        case other:
            raise ProbekitError(
                f"run {str(folder)!r}: of {other}; inspect shows runs of inject sweep, and of inject image --apart"
            )
