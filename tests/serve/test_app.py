"""The application as a whole: whatever is sent, the answer is one that its description tells of, and no failure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import hypothesis
import pytest
import schemathesis
from fastapi import APIRouter

from langmill.serve import catalogue
from langmill.serve.errors import Refused, content, status_of

OURS = r"^/(v1/(models|chat|completions|messages|responses)|tokenize|detokenize)"
CHECKS = (
    schemathesis.checks.not_a_server_error,
    schemathesis.checks.status_code_conformance,
    schemathesis.checks.content_type_conformance,
    schemathesis.checks.response_schema_conformance,
)


def test_nothing_that_is_sent_makes_it_fail(running: Any) -> None:
    schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json").include(path_regex=OURS)
    seen = set()

    def each(operation: Any) -> None:
        @hypothesis.settings(
            max_examples=10, deadline=None, suppress_health_check=list(hypothesis.HealthCheck), derandomize=True,
            database=None,
        )  # fmt: skip
        @hypothesis.given(case=operation.as_strategy())
        def sent(case: Any) -> None:
            if isinstance(case.body, dict):
                case.body = (
                    {**case.body, "model": "tiny", "max_tokens": 3} if "model" in case.body else case.body
                )
            case.call_and_validate(checks=CHECKS)
            seen.add(operation.label)

        sent()

    for result in schema.get_all_operations():
        each(result.ok())
    assert len(seen) == 9


def test_an_address_or_method_that_is_not_there_is_told_in_openais_form(url: str) -> None:
    for answer, status in ((httpx.get(f"{url}/v1/nothing"), 404), (httpx.get(f"{url}/v1/completions"), 405)):
        assert answer.status_code == status and "/openapi.json" in answer.json()["error"]["message"]
    anthropic = httpx.get(f"{url}/v1/messages/nothing").json()
    assert anthropic["type"] == "error" and anthropic["error"]["type"] == "not_found_error"


def test_a_body_that_is_no_json_object_is_told_what_is_missing(url: str) -> None:
    for sent, message in (
        ({"content": b"{"}, "the body is no JSON"),
        ({"data": {"prompt": "a"}}, "send it with the header Content-Type: application/json"),
        ({}, "the body must be JSON"),
        ({"json": []}, "the body should be a valid dictionary"),
    ):
        headers = {"Content-Type": "application/json"} if "content" in sent else {}
        answer = httpx.post(f"{url}/v1/completions", headers=headers, **sent)  # type: ignore[arg-type]
        assert answer.status_code == 400 and message in answer.json()["error"]["message"]


def test_what_fails_without_meaning_to_says_nothing_of_its_insides(
    folder: str,
    serving: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def router(state: Any) -> APIRouter:
        made = APIRouter()

        @made.get("/broken")
        async def broken() -> None:
            raise ValueError("secret")

        return made

    monkeypatch.setattr(catalogue, "router", router)
    answer = httpx.get(f"{serving(folder).url}/broken")
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "internal_error"
    assert "secret" not in answer.text and "secret" in caplog.text


def test_no_listener_of_the_frameworks_is_told_of_requests(
    folder: str, serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Listener:
        """A tracer provider that the environment set up."""

        def get_tracer(self, *given: object, **more: object) -> None:
            raise AssertionError("it was told")

    monkeypatch.setattr("opentelemetry.trace.get_tracer_provider", Listener)
    monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")
    assert httpx.get(f"{serving(folder).url}/v1/models").status_code == 200


def test_every_known_error_has_its_status() -> None:
    from langmill.common import errors as known
    from langmill.serve.errors import NoSuchModel

    table = {
        known.UsageError("a"): 400, known.DataError("a"): 400, known.ModelError("a"): 400, known.QueueFull("a"): 429,
        known.MissingExtra("structured", "x"): 501, NoSuchModel("a"): 404, known.LangmillError("a"): 500,
        MemoryError(): 503, KeyError(): 500, Refused("a", 413): 413,
    }  # fmt: skip
    for error, status in table.items():
        assert status_of(error)[0] == status
    told = content(Refused("a", 429), {"path": "/v1/messages", "state": {"request_id": "r"}})
    assert told == {"type": "error", "error": {"type": "rate_limit_error", "message": "a"}, "request_id": "r"}
