"""What the inspector's server answers, and whom: the page, questions line by line, finished runs; and only its own pages."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import unquote, urlsplit

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse

from probekit.hooks.errors import ProbekitError
from probekit.inspector.desk import Desk
from probekit.report.figures import inspector_page

LARGEST = 32 * 2**20
"""Bytes of a picture that may be given, and of everything else that is sent."""

_LOCAL = ("127.0.0.1", "localhost", "::1")
_GRADIO = ("/config", "/gradio_api/info", "/gradio_api/startup-events", "/gradio_api/queue/", "/gradio_api/call/")
"""What of Gradio's own is open: its queue, for `gradio_client`; none of its files, uploads and proxies."""

_OURS = ("/", "/ask", "/sweep", "/stop", "/save", "/picture", "/words", "/run/0", "/run/1")
_CLOSED = "default-src 'none'; img-src data: blob:; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"
"""The page loads nothing, neither from here nor from elsewhere, and talks to its own server only."""


def add_routes(app: Any, desk: Desk | None, runs: Sequence[dict[str, Any]]) -> None:
    """Put the page, the answers of the desk and the runs on a Gradio server, and close what else it has."""
    app.add_middleware(_Gate)

    def lines(events: Iterator[dict[str, Any]]) -> StreamingResponse:
        return StreamingResponse((json.dumps(event) + "\n" for event in events), media_type="application/x-ndjson")

    def there() -> Desk:
        if desk is None:
            raise ProbekitError("inspect: shows runs alone; name a model to ask it")
        return desk

    async def told(request: Request) -> dict[str, Any]:
        try:
            body = json.loads(await _body(request))
        except (ValueError, RecursionError) as error:
            raise ProbekitError("inspect: what was sent is no JSON") from error
        if not isinstance(body, dict):
            raise ProbekitError("inspect: what was sent is no JSON object")
        return body

    @app.exception_handler(ProbekitError)
    async def refused(request: Request, error: ProbekitError) -> JSONResponse:
        return JSONResponse({"error": " ".join(str(error).split())}, 400)

    @app.get("/")
    def page() -> HTMLResponse:
        first = [{**run, "pairs": run["pairs"][:1], "lazy": f"run/{number}"} for number, run in enumerate(runs)]
        content = inspector_page({"model": None if desk is None else desk.about, "runs": first}, live=True)
        return HTMLResponse(content, headers={"Content-Security-Policy": _CLOSED, "Cache-Control": "no-store"})

    @app.get("/run/{number}")
    def run(number: int) -> JSONResponse:
        return JSONResponse(runs[number]) if number < len(runs) else JSONResponse({"error": f"run {number}: is none"}, 404)

    @app.post("/ask")
    async def ask(request: Request) -> StreamingResponse:
        body = await told(request)
        return lines(there().ask(_tab(body), body.get("question")))

    @app.post("/sweep")
    async def sweep(request: Request) -> StreamingResponse:
        body = await told(request)
        windows = body.get("windows", 1)
        if type(windows) is not int or not 1 <= windows <= 20:
            raise ProbekitError(f"windows {str(windows)[:20]}: choose 1 to 20")
        return lines(there().sweep(_tab(body), body.get("question"), windows))

    @app.post("/stop")
    async def stop(request: Request) -> JSONResponse:
        there().stop(_tab(await told(request)))
        return JSONResponse({})

    @app.post("/save")
    async def save(request: Request) -> JSONResponse:
        body = await told(request)
        return JSONResponse({"folder": str(await _in_thread(there().save, str(body.get("id"))))})

    @app.post("/words")
    async def words(request: Request) -> JSONResponse:
        body = await told(request)
        return JSONResponse({"words": there().words(str(body.get("prompt", "")))})

    @app.post("/picture")
    async def picture(request: Request) -> JSONResponse:
        name = unquote(request.headers.get("x-name", "picture"))
        content = await _body(request)
        return JSONResponse(await _in_thread(there().give, name, content))

    if desk is not None:

        @app.api(name="ask", concurrency_limit=1)
        def answer(question: dict) -> dict:  # type: ignore[type-arg]  # Gradio reads annotations
            """The last line of a question's answer, for `gradio_client`."""
            return list(desk.ask("gradio_client", question))[-1]


def _tab(body: dict[str, Any]) -> str:
    return str(body.get("tab"))[:80]


async def _in_thread(function: Any, *arguments: Any) -> Any:
    return await run_in_threadpool(function, *arguments)


async def _body(request: Any) -> bytes:
    """What was sent. Raises ProbekitError for more than `LARGEST`."""
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > LARGEST:
            raise ProbekitError(f"inspect: what was sent is larger than {LARGEST >> 20} MiB")
    return bytes(content)


class _Gate:
    """Lets in what asks for this server by its own name, from its own pages, and for what is open."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or (scope["type"] == "http" and _is_let_in(scope)):
            await self.app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        body = b'{"error": "inspect: there is nothing for you here"}'
        await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": body})


def _is_let_in(scope: Any) -> bool:
    headers = {key: value.decode("latin-1") for key, value in scope["headers"]}
    host = headers.get(b"host", "")
    server = scope.get("server") or ("", 0)
    # a page elsewhere, whose name leads here (DNS rebinding), names that host
    if server[0] in _LOCAL and urlsplit(f"//{host}").hostname not in _LOCAL:
        return False
    origin = headers.get(b"origin")
    if origin is not None and urlsplit(origin).netloc != host:
        return False
    if headers.get(b"sec-fetch-site") == "cross-site" and scope["path"] != "/":
        return False
    path = scope["path"]
    return path in _OURS or any(path == open_ or (open_.endswith("/") and path.startswith(open_)) for open_ in _GRADIO)
