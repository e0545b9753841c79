"""What a client is told when something is refused or fails: one table, in OpenAI's form or Anthropic's.

A body says what happened and what to do; it never holds a traceback.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from langmill.common.errors import (
    DataError,
    LangmillError,
    MissingExtra,
    ModelError,
    QueueFull,
    UsageError,
)

if TYPE_CHECKING:
    from langmill.serve.metrics import Metrics

ANTHROPIC = "/v1/messages"  # paths below this one answer in Anthropic's form
KINDS = {  # OpenAI's types by status, where nothing else is said
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}
THEIRS = {  # Anthropic's types by status
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
SPOKEN = re.compile(  # what pydantic says around what is wrong
    r"^(Input|Value error,|List|Dictionary|String) | after validation, not \d+$"
)
RETRY_SECONDS = 1  # after which what waits is less, as a rule


class Refused(LangmillError):
    """A request that is answered with an error: its HTTP status, and what OpenAI's error object holds.

    type: None for the usual one of the status. param: the field that is wrong. headers: such as Retry-After.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        type: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.type = type or kind_of(status)
        self.headers = dict(headers or {})


def stopping() -> Refused:
    """A request that the server cannot answer any more."""
    wait = {"Retry-After": str(RETRY_SECONDS)}
    return Refused("the server is stopping: send this request again", 503, "stopping", headers=wait)


class NoSuchModel(LangmillError):
    """No model of this name is served."""


class Failure(BaseModel):
    """An answer that is an error, in OpenAI's form."""

    class Error(BaseModel):
        message: str
        type: str
        param: str | None
        code: str | None

    error: Error


FAILURES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Failure, "description": "The request was refused; the message says why."},
    "5XX": {"model": Failure, "description": "The server failed, or lacks what the request needs."},
}

STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}}
}  # what may also come


def kind_of(status: int) -> str:
    """OpenAI's type of an error with this status."""
    return KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")


def refusal_of(error: BaseException) -> Refused:
    """Any error as what the client is told."""
    if isinstance(error, Refused):
        return error
    said = " ".join(str(error).split())
    match error:
        case NoSuchModel():
            return Refused(said, 404, "model_not_found", "model", "invalid_request_error")
        case QueueFull():
            return Refused(said, 429, "queue_full", headers={"Retry-After": str(RETRY_SECONDS)})
        case MissingExtra():
            return Refused(said, 501, "missing_extra")
        case UsageError() | DataError() | ModelError():
            return Refused(said, 400)
        case LangmillError():
            return Refused(said, 500)
        case HTTPException():
            return Refused(_http(error), error.status_code, headers=error.headers)
        case UnicodeEncodeError():
            return Refused("the body holds half a surrogate pair (\\ud800 to \\udfff), which is no text")
        case MemoryError():
            return Refused("the server has not enough memory for this request: make it smaller", 503)
    return Refused("the server failed on this request; its log says why", 500, "internal_error")


def status_of(error: BaseException) -> tuple[int, str, str | None]:
    """Status, type and code."""
    told = refusal_of(error)
    return told.status, told.type, told.code


def _http(error: HTTPException) -> str:
    if error.status_code == 404:
        return "there is nothing at this address: /openapi.json lists what there is"
    if error.status_code == 405:
        return "this address does not take this method: /openapi.json lists what there is"
    return str(error.detail)


def body(message: str, type: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def content(told: Refused, scope: Scope) -> dict[str, Any]:
    """The body of an error, in the form that this request's address speaks."""
    if not str(scope.get("path", "")).startswith(ANTHROPIC):
        return body(str(told), told.type, told.code, told.param)
    kind = THEIRS.get(told.status, "invalid_request_error" if told.status < 500 else "api_error")
    number = scope.get("state", {}).get("request_id")
    return {"type": "error", "error": {"type": kind, "message": str(told)}, "request_id": number}


def response(error: BaseException, scope: Scope) -> JSONResponse:
    """The answer to a request that ended with this error."""
    told = refusal_of(error)
    return JSONResponse(content(told, scope), told.status, headers=told.headers)


async def refused(told: Refused, metrics: Metrics, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with this error before any route is reached, and count it."""
    metrics.refused(told.code or told.type)
    await response(told, scope)(scope, receive, send)


def _invalid(error: RequestValidationError, request: Request) -> Refused:
    """What is wrong with the first of a request's fields that does not fit, in words."""
    problems = error.errors()
    first = problems[0]
    if first["type"] == "json_invalid":
        return Refused(f"the body is no JSON: {first.get('ctx', {}).get('error', 'it cannot be read')}")
    path = _path(first["loc"], error.body)
    if first["loc"] == ("body",) and first["type"] != "unknown_field":
        if "json" not in request.headers.get("content-type", ""):
            return Refused("the body must be JSON: send it with the header Content-Type: application/json")
        if first["type"] == "missing":
            return Refused("the request has no body: send a JSON object")
    name = ".".join(path)
    match first["type"]:
        case "unknown_field":
            return Refused(first["msg"], 400, "unknown_field", ".".join([*path, first["ctx"]["field"]]))
        case "extra_forbidden":
            return Refused(f"there is no field '{name}' here", 400, "unknown_field", name)
        case "missing":
            name = ".".join([*path, str(first["loc"][-1])])
            return Refused(f"{name} is missing", param=name)
    said = [one["msg"] for one in problems if _path(one["loc"], error.body) == path]
    words = [SPOKEN.sub("", one) for one in said]
    return Refused(f"{name or 'the body'} {' or '.join(dict.fromkeys(words))}", param=name or None)


def _path(place: Sequence[int | str], value: Any) -> list[str]:
    """Where something is wrong: in a body pydantic's place without the names of the types that it tried; else the name
    of the part of the address."""
    if place[0] != "body":
        return [str(part)[:100] for part in place[1:2]]
    found = []
    for part in place[1:]:
        listed = isinstance(value, list) and isinstance(part, int) and part < len(value)
        if not listed and not (isinstance(value, dict) and part in value):
            break
        found.append(str(part)[:100])
        value = value[part]
    return found


def handlers(app: FastAPI, refused: Callable[[str], None]) -> None:
    """Make every error of the routes an answer; `refused` is told its code or type, to be counted."""

    async def known(request: Request, error: Exception) -> JSONResponse:
        told = refusal_of(error)
        refused(told.code or told.type)
        return response(told, request.scope)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return await known(request, _invalid(error, request))

    for kind in (LangmillError, HTTPException, MemoryError):
        app.add_exception_handler(kind, known)
    app.add_exception_handler(RequestValidationError, invalid)
