"""What stands before the routes: keys, hosts and origins, limits, safe headers, and a log without secrets or text."""

from __future__ import annotations

import json
import logging
import stat
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from langmill.common.errors import UsageError
from langmill.common.settings import ServeSettings
from langmill.serve.errors import Refused
from langmill.serve.headers import SAFE
from langmill.serve.hosts import is_loopback, name_in, origins_of
from langmill.serve.keys import Keys, add_key, digest_of, open_keys, read_keys
from langmill.serve.limits import Bucket, Limits
from langmill.serve.logs import Line

CHAT = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "The secret fox"}],
    "max_tokens": 2,
    "temperature": 0,
}


def test_a_key_is_shown_once_and_its_file_holds_a_hash_that_only_its_owner_reads(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "keys.txt"
    keys = {name: add_key(path, name) for name in ("ann", "bob.2")}
    text = path.read_text(encoding="utf-8")
    assert not any(key in text for key in keys.values()) and stat.S_IMODE(path.stat().st_mode) == 0o600
    known = Keys(read_keys(path))
    assert {name: known.owner(key) for name, key in keys.items()} == {name: name for name in keys}
    assert (
        known.owner("") is known.owner(keys["ann"][:-1]) is known.owner(digest_of(keys["ann"]).hex()) is None
    )
    for name in ("ann", "a:b", "", "x" * 65, "new\nline"):
        with pytest.raises(UsageError):
            add_key(path, name)
    path.write_text(text + "lm-a-key-in-plain-text\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"line 4") as told:
        read_keys(path)
    assert "plain-text" not in str(told.value)


def test_an_address_that_others_reach_needs_keys(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(UsageError, match="needs keys"):
            open_keys(ServeSettings(model=["m"], host=host))
    for host in ("127.0.0.1", "localhost", "::1", "127.3.2.1"):
        assert is_loopback(host) and not open_keys(ServeSettings(model=["m"], host=host)).names
    (tmp_path / "keys").write_text("# none yet\n")
    with pytest.raises(UsageError, match="holds no key"):
        open_keys(ServeSettings(model=["m"], host="0.0.0.0", api_keys=tmp_path / "keys"))


def test_only_known_keys_come_in_and_their_limits_are_their_own(
    serving: Any, folder: str, tmp_path: Path
) -> None:
    path = tmp_path / "keys"
    ann, bob = add_key(path, "ann"), add_key(path, "bob")
    url = serving(folder, api_keys=path, requests_per_minute=2).url
    with openai.OpenAI(base_url=f"{url}/v1", api_key=ann, max_retries=0) as client:
        for _ in range(2):
            assert client.chat.completions.create(**CHAT).usage.completion_tokens == 2
        with pytest.raises(openai.RateLimitError) as told:
            client.chat.completions.create(**CHAT)
        assert 1 <= int(told.value.response.headers["retry-after"]) <= 60
    assert httpx.post(f"{url}/v1/chat/completions", json=CHAT, headers={"x-api-key": bob}).status_code == 200
    for headers in ({}, {"Authorization": "Bearer lm-wrong"}, {"Authorization": f"Basic {ann}"}):
        answer = httpx.get(f"{url}/v1/models", headers=headers)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{url}/health").status_code == 200 and httpx.get(f"{url}/metrics").status_code == 401
    assert httpx.post(f"{url}/health").status_code == 401  # open to be read, to nothing else


def test_a_key_is_given_and_taken_back_while_the_server_runs(
    serving: Any, folder: str, tmp_path: Path, caplog: Any
) -> None:
    path = tmp_path / "keys"
    ann = add_key(path, "ann")
    url = serving(folder, api_keys=path).url

    def allowed(key: str) -> bool:
        return httpx.get(f"{url}/v1/models", headers={"x-api-key": key}).status_code == 200

    bob = add_key(path, "bob")
    assert allowed(ann) and allowed(bob)
    kept = path.read_text(encoding="utf-8")
    path.write_text("\n".join(line for line in kept.splitlines() if "ann" not in line), encoding="utf-8")
    assert allowed(bob) and not allowed(ann)
    path.write_text("no key", encoding="utf-8")
    assert allowed(bob) and not allowed(ann) and "line 1" in caplog.text
    path.unlink()
    assert allowed(bob)
    path.write_text("# none\n", encoding="utf-8")
    assert not allowed(bob) and not allowed("")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 421),
        ({"Host": "localhost.evil.example:8000"}, 421),
        ({"Host": "127.0.0.1@evil"}, 421),
        ({"Host": "LOCALHOST:1"}, 200),
        ({"Host": "10.1.2.3:99"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "mill.lan"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://["}, 403),
        ({"Origin": "http://localhost:1", "Host": "localhost:2"}, 403),
        ({"Origin": "http://localhost:2", "Host": "localhost:2"}, 200),
        ({"Origin": "https://app.example"}, 200),
    ],
)
def test_names_and_origins(guarded: str, headers: dict[str, str], status: int) -> None:
    answer = httpx.get(f"{guarded}/v1/models", headers=headers)
    assert answer.status_code == status
    opened = answer.headers.get("access-control-allow-origin")
    assert opened == ("https://app.example" if "app.example" in headers.get("Origin", "") else None)


@pytest.fixture(scope="module")
def guarded(folder: str) -> Any:
    from tests.serve.conftest import Running, settings_of

    from langmill.serve.state import open_state

    more = {"allow_host": ["mill.lan"], "allow_origin": ["https://app.example"], "max_body_bytes": 4096}
    running = Running(open_state(settings_of(folder, **more)))
    yield running.url
    running.stop()


def test_a_preflight_is_answered_for_allowed_origins_alone(guarded: str) -> None:
    asked = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    answer = httpx.options(
        f"{guarded}/v1/chat/completions", headers={"Origin": "https://app.example", **asked}
    )
    assert answer.status_code == 204 and "authorization" in answer.headers["access-control-allow-headers"]
    assert answer.headers["vary"] == "Origin"
    other = httpx.options(
        f"{guarded}/v1/chat/completions", headers={"Origin": "https://evil.example", **asked}
    )
    assert other.status_code == 403 and "access-control-allow-origin" not in other.headers
    for wrong in ("*", "app.example", "https://app.example/", "ftp://app.example"):
        with pytest.raises(UsageError, match="allow-origin"):
            origins_of(ServeSettings(model=["m"], allow_origin=[wrong]))


@given(st.text(max_size=40))
def test_a_host_is_a_name_or_nothing(text: str) -> None:
    name = name_in(text)
    assert name is None or (name == name.lower() and not set(name) & set("/@ \t\r\n?#"))


def test_bodies_have_a_size_that_they_cannot_lie_about(guarded: str) -> None:
    url, large = f"{guarded}/v1/chat/completions", b'{"model": "' + b"x" * 5000 + b'"}'

    def pieces() -> Any:
        yield from (large[at : at + 500] for at in range(0, len(large), 500))

    kind = {"Content-Type": "application/json"}
    for content in (large, pieces()):
        answer = httpx.post(url, content=content, headers=kind)
        assert answer.status_code == 413 and "4096" in answer.json()["error"]["message"]
    deep = b'{"model": ' + b"[" * 1900 + b"]" * 1900 + b"}"
    assert httpx.post(url, content=deep, headers=kind).status_code == 400


def test_every_answer_is_safe_in_a_browser(guarded: str) -> None:
    for path in ("/v1/models", "/health", "/metrics", "/nothing"):
        for more in ({}, {"Host": "evil.example"}, {"Origin": "http://evil.example"}):
            headers = httpx.get(f"{guarded}{path}", headers=more).headers
            assert all(headers[name] == value for name, value in SAFE.items())
    assert 'langmill_refused_total{reason="wrong_host"}' in httpx.get(f"{guarded}/metrics").text


def test_limits_come_back_evenly_and_each_key_has_its_own() -> None:
    now = [0.0]
    limits = Limits(ServeSettings(model=["m"], requests_per_minute=3, tokens_per_minute=60), lambda: now[0])
    for _ in range(3):
        limits.check("ann", 10)
    with pytest.raises(Refused, match="3 requests a minute") as told:
        limits.check("ann", 1)
    assert told.value.status == 429 and told.value.headers["Retry-After"] == "20"
    limits.check("bob", 60)
    with pytest.raises(Refused, match="61 tokens and the limit is 60") as told:
        limits.check("bob", 61)
    assert told.value.status == 400
    now[0] = 20.0
    limits.spend("ann", 100)  # what was written, after the fact: a debt
    with pytest.raises(Refused, match="tokens a minute") as told:
        limits.check("ann", 1)
    now[0] += int(told.value.headers["Retry-After"])
    limits.check("ann", 1)


def test_every_answer_says_what_is_left(serving: Any, folder: str) -> None:
    running = serving(folder, requests_per_minute=60, tokens_per_minute=6000)
    running.state.limits.clock = lambda: 0.0  # so that nothing comes back meanwhile
    url = running.url
    began = httpx.get(f"{url}/v1/models").headers
    assert began["x-ratelimit-limit-requests"] == began["x-ratelimit-remaining-requests"] == "60"
    assert (began["x-ratelimit-remaining-tokens"], began["x-ratelimit-reset-tokens"]) == ("6000", "0s")
    streamed = httpx.post(f"{url}/v1/chat/completions", json={**CHAT, "stream": True})
    for answer in (streamed, httpx.get(f"{url}/nothing")):
        assert answer.headers["x-ratelimit-remaining-requests"] == "59"
        assert int(answer.headers["x-ratelimit-remaining-tokens"]) < 6000
    assert answer.headers["x-ratelimit-reset-requests"] == "1s"
    debt = Bucket(60, -60, 0.0)
    assert debt.told("Tokens")["X-RateLimit-Reset-Tokens"] == "2m0s"


def told(caplog: Any) -> list[Any]:
    """The records of requests."""
    return [record for record in caplog.records if hasattr(record, "fields")]


def test_the_log_has_a_line_a_request_and_no_text_or_key(serving: Any, folder: str, caplog: Any) -> None:
    running = serving(folder, log_prompts=False)
    with caplog.at_level(logging.INFO, "langmill.serve"):
        answer = httpx.post(
            f"{running.url}/v1/chat/completions?key=hidden", json=CHAT,
            headers={"Authorization": "Bearer lm-very-private", "X-Request-Id": "mine-1"},
        )  # fmt: skip
        httpx.get(f"{running.url}/nothing", headers={"X-Request-Id": "bad id\tx"})
        running.until(lambda: len(told(caplog)) == 2)  # a line comes when its answer is gone
    assert answer.headers["x-request-id"] == "mine-1"
    lines = [Line(True).format(record) for record in told(caplog)]
    first, second = map(json.loads, lines)
    assert (first["request"], first["status"], first["written"]) == ("mine-1", 200, 2)
    assert second["status"] == 404 and second["request"].startswith("req_")
    assert not any(word in line for line in lines for word in ("fox", "hidden", "private"))
    assert "request=mine-1" in Line(False).format(caplog.records[0])
    metrics = httpx.get(f"{running.url}/metrics").text
    assert 'langmill_requests_total{method="POST",route="/v1/chat/completions",status="200"} 1.0' in metrics
    assert 'langmill_written_tokens_total{model="tiny"} 2.0' in metrics
    assert 'langmill_engine_slots{model="tiny"} 0.0' in metrics


def test_the_log_holds_text_where_that_is_asked_for(serving: Any, folder: str, caplog: Any) -> None:
    running = serving(folder, log_prompts=True)
    with caplog.at_level(logging.INFO, "langmill.serve"):
        httpx.post(f"{running.url}/v1/chat/completions", json=CHAT)
        running.until(lambda: told(caplog))
    [record] = told(caplog)
    assert "secret fox" in record.fields["asked"] and "chat.completion" in record.fields["said"]
