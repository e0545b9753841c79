"""The chat page at /: a few files that come with this package, and nothing from any other host."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from importlib import resources

from fastapi import APIRouter, Request
from fastapi.responses import Response

from langmill.serve.state import State

TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
}
POLICY = "; ".join(
    (
        "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self'", "connect-src 'self'",
        "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
    )
)  # fmt: skip


def router(state: State) -> APIRouter:
    """The routes over this state; none where the page is off."""
    made = APIRouter(include_in_schema=False)
    if not state.settings.page:
        return made
    for name, content in files().items():
        path = "/" if name == "index.html" else f"/page/{name}"
        made.add_api_route(path, _answering(name, content), methods=["GET", "HEAD"])
    return made


def files() -> dict[str, bytes]:
    """The page's files by name."""
    folder = resources.files("langmill.serve") / "page"
    return {
        one.name: one.read_bytes()
        for one in folder.iterdir()
        if one.is_file() and one.name.rpartition(".")[2] in TYPES
    }


def _answering(name: str, content: bytes) -> Callable[[Request], Awaitable[Response]]:
    mark = f'"{hashlib.sha256(content).hexdigest()[:20]}"'
    head = {
        "ETag": mark, "Cache-Control": "no-cache", "Content-Security-Policy": POLICY,
    }  # fmt: skip

    async def answer(request: Request) -> Response:
        if request.headers.get("if-none-match") == mark:
            return Response(status_code=304, headers=head)
        return Response(content, headers=head, media_type=TYPES[name.rpartition(".")[2]])

    return answer
