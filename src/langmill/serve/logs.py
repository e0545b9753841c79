"""One line for each request, on standard error: when, which, whose, what became of it. No text of prompts or answers
unless asked, no addresses' queries, no keys."""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from langmill.serve.state import State

LOG = logging.getLogger("langmill.serve")
SANE = re.compile(r"[A-Za-z0-9._-]{1,64}")
MOST = 1 << 16  # bytes of a prompt or answer that are logged where that is asked for


class Line(logging.Formatter):
    """A record as a line of text, or as a JSON object where `as_json`."""

    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self.as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        """Time in UTC, level, message or the fields of a request, and a traceback where there is one."""
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields: dict[str, Any] = getattr(record, "fields", None) or {"message": record.getMessage()}
        trace = self.formatException(record.exc_info) if record.exc_info else None
        if self.as_json:
            whole = {"time": at, "level": record.levelname.lower(), **fields}
            return json.dumps(whole | ({"traceback": trace} if trace else {}), ensure_ascii=False)
        words = [
            str(value) if name == "message" else f"{name}={_word(value)}" for name, value in fields.items()
        ]
        return " ".join((at, record.levelname, *words)) + (f"\n{trace}" if trace else "")


def _word(value: Any) -> str:
    text = str(value)
    return text if re.fullmatch(r"[\w./:-]+", text) else json.dumps(text, ensure_ascii=False)


class Logs:
    """Numbers each request, writes its line when it is over, and counts it."""

    def __init__(self, app: ASGIApp, state: State) -> None:
        self.app, self.metrics, self.prompts = app, state.metrics, state.settings.log_prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        number = given if SANE.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        shared = scope.setdefault("state", {})
        shared["request_id"] = number
        began, status = time.perf_counter(), 499  # what nothing was sent for: the client had gone
        asked, said = bytearray(), bytearray()

        async def heard() -> Message:
            message = await receive()
            if self.prompts:
                asked.extend(message.get("body", b"")[: MOST - len(asked)])
            return message

        async def told(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = number
            elif self.prompts:
                said.extend(message.get("body", b"")[: MOST - len(said)])
            await send(message)

        try:
            await self.app(scope, heard, told)
        finally:
            seconds = time.perf_counter() - began
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"].isalpha() and len(scope["method"]) < 10 else "other"
            self.metrics.request(method if route != "other" else "other", route, status, seconds)
            fields: dict[str, Any] = {
                "request": number, "key": shared.get("key") or "-", "method": method,
                "path": quote(scope["path"][:200]), "status": status, "ms": round(seconds * 1000, 1),
            }  # fmt: skip
            if (usage := shared.get("usage")) is not None:
                fields |= {"prompt": usage.prompt, "cached": usage.cached, "written": usage.written}
            if self.prompts:
                fields |= {"asked": asked.decode("utf-8", "replace"), "said": said.decode("utf-8", "replace")}
            LOG.info("request", extra={"fields": fields})
