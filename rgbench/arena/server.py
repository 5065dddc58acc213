"""Server of an arena: a page, and four requests that it makes.

    GET  /             the page, the same for everybody
    POST /join         share token, name      → the rater's own key
    GET  /task         rater's key            → a question with its ticket
    POST /vote         rater's key, ticket    → the next question; the vote is on disk
    GET  /image/{id}   PNG of a random id

Tokens travel in the Authorization header, and in links behind the #, which browsers send to nobody: no log holds one,
and no other page can vote in a rater's name.
"""

from __future__ import annotations

import errno
import hmac
import socket
from collections.abc import Awaitable, Callable
from typing import Any, get_args

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from rgbench.arena.contest import Contest
from rgbench.arena.page import POLICY, render_page, task_data
from rgbench.arena.votes import MAX_NAME, Answer, NameTaken, OtherAnswer, Rater
from rgbench.core.errors import UsageError
from rgbench.core.io import parse_json
from rgbench.data.files import clean_text

MAX_BODY = 4096  # bytes of a request
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def build_app(contest: Contest) -> Starlette:
    """The arena's application.

    Args:
        contest: that is open; its votes belong to this process.
    """
    handlers = _Handlers(contest)
    routes = [
        Route("/", handlers.page),
        Route("/join", handlers.join, methods=["POST"]),
        Route("/task", handlers.task),
        Route("/vote", handlers.vote, methods=["POST"]),
        Route("/image/{id}", handlers.image),
    ]
    errors: dict[Any, Callable[[Request, Any], Awaitable[Response]]] = {HTTPException: _refused}
    return Starlette(routes=routes, exception_handlers=errors)


async def _refused(_: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": error.detail}, error.status_code, headers=HEADERS)


class _Handlers:
    def __init__(self, contest: Contest) -> None:
        self.contest, self.html = contest, render_page({"mode": "server", "max_name": MAX_NAME})

    async def page(self, _: Request) -> Response:
        return HTMLResponse(self.html, headers=HEADERS)

    async def join(self, request: Request) -> Response:
        if not hmac.compare_digest(_bearer(request).encode(), self.contest.token.encode()):
            raise HTTPException(403, "This link is not valid; ask for a new one.")
        content = await _body(request)
        name = _name(content.get("name"))
        try:
            rater = await run_in_threadpool(self.contest.votes.join, name)
        except NameTaken as error:
            taken = "Somebody has this name already. Choose another, or open your own link to continue."
            raise HTTPException(409, taken) from error
        return JSONResponse({"key": self.contest.key(rater)}, headers=HEADERS)

    async def task(self, request: Request) -> Response:
        return await self._next(self._rater(request))

    async def vote(self, request: Request) -> Response:
        rater = self._rater(request)
        content = await _body(request)
        ticket: Any = content.get("ticket")
        answer: Any = content.get("answer")
        if not isinstance(ticket, str) or answer not in get_args(Answer):
            raise HTTPException(400, "A vote needs a ticket, and left, right or tie as its answer.")
        vote = self.contest.vote(rater, ticket, answer)
        if vote is None:
            raise HTTPException(403, "This question was not asked of this rater.")
        try:
            await run_in_threadpool(rater.add, [vote])
        except OtherAnswer as error:
            raise HTTPException(409, "This question was answered already.") from error
        except OSError as error:
            raise HTTPException(507, f"The vote could not be stored: {error.strerror}.") from error
        return await self._next(rater)

    async def image(self, request: Request) -> Response:
        found = await run_in_threadpool(self.contest.shown, request.path_params["id"])
        if found is None:
            raise HTTPException(404, "No such image.")
        return Response(found, media_type="image/png", headers=HEADERS)

    def _rater(self, request: Request) -> Rater:
        rater = self.contest.rater(_bearer(request))
        if rater is None:
            raise HTTPException(403, "This link is not valid; ask for a new one.")
        return rater

    async def _next(self, rater: Rater) -> Response:
        task = self.contest.next_task(rater)
        found: dict[str, Any] = {"rater": rater.name, "done": len(rater.votes)}
        found["total"] = len(self.contest.tasks(rater.name))
        if task is not None:
            ids = (self.contest.image_id(rater.name, task.comparison, side) for side in ("left", "right"))
            left, right = (f"/image/{each}" for each in ids)
            found["task"] = task_data(self.contest, rater.name, task) | {"left": left, "right": right}
        return JSONResponse(found, headers=HEADERS)


def _bearer(request: Request) -> str:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token if scheme.lower() == "bearer" else ""


async def _body(request: Request) -> dict[str, Any]:
    """A small JSON object."""
    data = b""
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY:
            raise HTTPException(413, "The request is too large.")
    try:
        content = parse_json(data)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "The request is not JSON.") from error
    if not isinstance(content, dict):
        raise HTTPException(400, "The request is not a JSON object.")
    return content


def _name(given: Any) -> str:
    """A rater's name, without what nobody sees."""
    try:
        name = " ".join(clean_text(given, "name").split()) if isinstance(given, str) else ""
    except UsageError as error:
        raise HTTPException(400, "The name holds characters that no text has.") from error
    if not 0 < len(name) <= MAX_NAME:
        raise HTTPException(400, f"Give a name of 1 to {MAX_NAME} characters.")
    return name


def serve(contest: Contest, host: str, port: int, say: Callable[[str], None]) -> None:
    """Serve until Ctrl-C.

    Args:
        contest: that is open.
        host: address to listen at.
        port: 0 for any that is free.
        say: prints the link.

    Raises:
        UsageError: the port is in use, or no address of this machine.
    """
    listener = listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    say(f"http://{shown}:{listener.getsockname()[1]}/#join={contest.token}")
    config = uvicorn.Config(build_app(contest), log_level="warning", access_log=False, server_header=False)
    with listener:
        uvicorn.Server(config).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        UsageError: the port is in use or not allowed, or the host no address of this machine.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UsageError(f"--port {port}: in use by another program; choose another") from error
        raise UsageError(f"--host {host} --port {port}: cannot listen there ({error.strerror or error})") from error
