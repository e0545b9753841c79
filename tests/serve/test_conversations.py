"""The page's routes over a real server: what is said is kept, answers stream, stop, branch, and stay their owner's."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from langmill.serve.app import create_app
from langmill.serve.conversations import SEARCHES
from langmill.serve.history import History, Message
from langmill.serve.keys import add_key
from langmill.serve.markdown import render
from langmill.serve.state import State
from langmill.text.chat import chat_ids

HOW = {"model": "tiny", "temperature": 0, "max_tokens": 12}


class Client(httpx.Client):
    """One that talks to a server's conversations."""

    def new(self, **more: Any) -> str:
        return str(self.post("/api/conversations", json=more).json()["id"])

    def stream_of(self, path: str, **body: Any) -> list[dict[str, Any]]:
        with self.stream("POST", f"/api/conversations/{path}", json={**HOW, **body}) as response:
            response.read()
            assert response.status_code == 200, response.text
        lines = [line for line in response.text.split("\n\n") if line.startswith("data: ")]
        return [json.loads(line[6:]) for line in lines]

    def say(self, id: str, content: str, parent: int | None = None, **more: Any) -> dict[str, Any]:
        """The answer to a message."""
        return self.stream_of(f"{id}/messages", content=content, parent=parent, **more)[-1]["done"]

    def messages(self, id: str) -> list[dict[str, Any]]:
        return list(self.get(f"/api/conversations/{id}").json()["messages"])


@pytest.fixture
def http(url: str) -> Iterator[Client]:
    with Client(base_url=url, timeout=60) as client:
        yield client


def test_an_answer_streams_and_is_kept(http: Client, state: State) -> None:
    id = http.new()
    first, *middle, last = http.stream_of(f"{id}/messages", content="The quick fox", system="Be brief.")
    user, answer = http.messages(id)
    assert first["user"] == user and last["done"] == answer
    assert (user["content"], user["parent"], user["settings"]["system"]) == (
        "The quick fox",
        None,
        "Be brief.",
    )
    assert (answer["parent"], answer["model"], answer["finish"], answer["tokens"]) == (
        user["number"],
        "tiny",
        "length",
        12,
    )
    assert answer["seconds"] > 0 and [one["tokens"] for one in middle][-1] == 12
    html = rest = ""
    for one in middle:
        html, rest = html + one.get("html", ""), one["rest"] if "rest" in one else rest + one["text"]
    assert html + render(rest) == answer["html"]
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The quick fox"}]
    prompt = chat_ids(state.models.find("tiny", "chat").tokenizer, asked)
    assert last["context"] == {"used": len(prompt) + 12, "window": 512}
    said = http.post("/v1/chat/completions", json={**HOW, "messages": asked}).json()
    assert said["choices"][0]["message"]["content"] == answer["content"]
    assert http.get("/api/conversations").json()["data"][0]["title"] == "The quick fox"


def test_retry_edit_and_going_on_make_branches(http: Client, state: State) -> None:
    id = http.new()
    first = http.say(id, "fox")
    events = http.stream_of(f"{id}/messages/{first['number']}/retry", temperature=1.5, seed=5)
    second = events[-1]["done"]
    assert (
        second["parent"] == first["parent"] == events[0]["user"]["number"]
        and second["content"] != first["content"]
    )
    again = http.stream_of(f"{id}/messages/{first['parent']}/retry", temperature=1.5, seed=5)[-1]["done"]
    assert again["content"] == second["content"]
    on = http.say(id, "dog", second["number"])
    edited = http.say(id, "night")
    assert [one["parent"] for one in http.messages(id) if one["role"] == "user"] == [
        None,
        second["number"],
        None,
    ]
    assert edited["parent"] != on["parent"]
    turns = [("user", "fox"), ("assistant", second["content"]), ("user", "dog")]
    said = http.post(
        "/v1/chat/completions",
        json={**HOW, "messages": [{"role": role, "content": text} for role, text in turns]},
    )
    assert said.json()["choices"][0]["message"]["content"] == on["content"]


def test_an_answer_without_a_seed_can_be_had_again(http: Client) -> None:
    id = http.new()
    answer = http.say(id, "fox", temperature=2.0)
    again = http.stream_of(f"{id}/messages/{answer['number']}/retry", **answer["settings"])[-1]["done"]
    assert again["content"] == answer["content"] and again["settings"] == answer["settings"]


def test_stopping_keeps_what_was_written(http: Client, running: Any) -> None:
    id = http.new()
    asked = {"model": "long", "temperature": 1.0, "seed": 1, "content": "春眠", "likely": False}
    seen = ""
    with http.stream("POST", f"/api/conversations/{id}/messages", json=asked) as response:
        for line in response.iter_lines():
            seen += line
            if '"tokens":20' in line:
                break
    running.until(lambda: len(http.messages(id)) == 2 and running.busy() == 0)
    user, answer = http.messages(id)
    assert user["content"] == "春眠" and answer["finish"] == "cancelled" and answer["tokens"] >= 20
    assert answer["content"] and not answer["likely"]
    again = http.say(id, "on", answer["number"])
    assert again["finish"] == "length"


def test_probabilities_of_tokens(http: Client) -> None:
    id = http.new()
    answer = http.say(id, "fox")
    told = http.get(f"/api/conversations/{id}/messages/{answer['number']}/tokens").json()
    assert answer["likely"] and len(told["tokens"]) == 12 and told["perplexity"] >= 1
    for token in told["tokens"]:
        shares = [other["probability"] for other in token["others"]]
        assert len(shares) == 5 and shares == sorted(shares, reverse=True) and sum(shares) <= 1.001
        assert token["probability"] == shares[0]  # greedy
    if "\ufffd" not in answer["content"]:
        assert "".join(one["text"] for one in told["tokens"]) == answer["content"]
    bare = http.say(id, "fox", likely=False)
    refused = http.get(f"/api/conversations/{id}/messages/{bare['number']}/tokens")
    assert refused.status_code == 404 and "no probabilities were kept" in refused.json()["error"]["message"]


REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({"content": ""}, 400, "content"),
    ({"content": "a", "model": "plain"}, 400, "plain does not chat"),
    ({"content": "a", "model": "none"}, 404, "there is no model 'none'"),
    ({"content": "a", "temprature": 1}, 400, "did you mean 'temperature'"),
    ({"content": "a", "top_p": 0}, 400, "top_p"),
    ({"content": "a", "max_tokens": 600}, 400, "context is 512 tokens"),
    ({"content": "word " * 600}, 400, "context is 512 tokens"),
    ({"content": "a", "parent": 99999}, 404, "no message 99999"),
]


@pytest.mark.parametrize("body, status, message", REFUSED, ids=[row[2] for row in REFUSED])
def test_what_is_refused_is_not_kept(http: Client, body: dict[str, Any], status: int, message: str) -> None:
    id = http.new()
    refused = http.post(f"/api/conversations/{id}/messages", json={**HOW, **body})
    assert refused.status_code == status and message in refused.json()["error"]["message"]
    assert http.messages(id) == []


def test_a_parent_must_be_an_answer(http: Client) -> None:
    id = http.new()
    answer = http.say(id, "a")
    refused = http.post(
        f"/api/conversations/{id}/messages", json={**HOW, "content": "b", "parent": answer["parent"]}
    )
    assert refused.status_code == 400 and "parent must be an answer" in refused.json()["error"]["message"]


def test_listing_renaming_deleting(http: Client) -> None:
    one, two = http.new(title="Bread"), http.new()
    http.say(two, "How do mills work?")
    listed = http.get("/api/conversations", params={"search": "MILLS"}).json()
    assert [found["id"] for found in listed["data"]] == [two] and not listed["lasting"]
    assert http.patch(f"/api/conversations/{one}", json={"title": " Cake "}).json()["title"] == "Cake"
    assert http.patch(f"/api/conversations/{one}", json={"title": " "}).status_code == 400
    assert http.delete(f"/api/conversations/{two}").status_code == 204
    assert http.get(f"/api/conversations/{two}").json()["error"]["code"] == "no_such_conversation"
    assert http.get("/api/conversations", params={"offset": -1}).status_code == 400


def test_numbers_that_no_file_could_hold_are_refused_by_name(http: Client) -> None:
    id = http.new()
    for path, name in (
        (f"?offset={10**20}", "offset"),
        ("?offset=-1", "offset"),
        (f"/{id}/messages/{10**20}/tokens", "number"),
    ):
        answer = http.get(f"/api/conversations{path}")
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, name)
        assert error["message"].startswith(f"{name} should be ")


def test_exports(http: Client) -> None:
    id = http.new(title="Foxes")
    first = http.say(id, "fox", system="Be brief.")
    http.say(id, "dog")
    told = http.get(f"/api/conversations/{id}/export")
    assert told.json()["format"] == "langmill-conversation" and len(told.json()["messages"]) == 4
    assert told.headers["content-disposition"].endswith('.json"')
    branch = http.get(f"/api/conversations/{id}/export", params={"form": "markdown", "leaf": first["number"]})
    assert (
        branch.text
        == f"# Foxes\n\n**System**\n\nBe brief.\n\n**User**\n\nfox\n\n**tiny**\n\n{first['content']}\n"
    )
    assert branch.headers["content-disposition"].endswith('.md"')
    newest = http.get(f"/api/conversations/{id}/export", params={"form": "markdown"}).text
    assert "dog" in newest and "fox" not in newest
    assert "# Conversation" in http.get(f"/api/conversations/{http.new()}/export?form=markdown").text


def test_each_key_has_its_own(serving: Callable[..., Any], folder: str, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    tokens = {name: add_key(file, name) for name in ("ann", "bob")}
    server = serving(folder, api_keys=str(file), history=str(tmp_path / "h.sqlite"))
    clients = {
        name: Client(base_url=server.url, timeout=60, headers={"Authorization": f"Bearer {token}"})
        for name, token in tokens.items()
    }
    id = clients["ann"].new()
    number = clients["ann"].say(id, "secret")["number"]
    assert clients["bob"].get("/api/conversations").json()["data"] == []
    for path in (id, f"{id}/export", f"{id}/messages/{number}/tokens"):
        assert clients["bob"].get(f"/api/conversations/{path}").status_code == 404
    assert clients["bob"].delete(f"/api/conversations/{id}").status_code == 404
    assert httpx.get(f"{server.url}/api/conversations/{id}").status_code == 401
    assert (
        httpx.get(f"{server.url}/").status_code == httpx.get(f"{server.url}/page/app.js").status_code == 200
    )
    assert clients["ann"].get("/api/conversations").json()["lasting"]
    assert History(tmp_path / "h.sqlite").find("ann", id).title == "secret"


def test_a_crash_in_the_middle_keeps_the_question(state: State) -> None:
    """What is asked stands in the file before the engine is asked for anything."""
    history = History(None)

    def check(*given: Any) -> None:
        raise RuntimeError("as if the process died here")

    limits: Any = type(
        "Limits", (), {"check": check, "spend": lambda *given: None, "told": lambda *given: {}}
    )()
    app = create_app(replace(state, history=history, limits=limits))
    id = history.make("").id
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.post(f"/api/conversations/{id}/messages", json={**HOW, "content": "kept"})

    response = asyncio.run(ask())
    assert '"error"' in response.text and "as if" not in response.text
    assert [(one.role, one.content) for one in history.messages("", id)] == [("user", "kept")]


def test_without_the_page_there_are_no_routes(serving: Callable[..., Any], folder: str) -> None:
    server = serving(folder, page=False)
    assert server.state.history is None
    assert (
        httpx.get(f"{server.url}/").status_code
        == httpx.get(f"{server.url}/api/conversations").status_code
        == 404
    )


def test_html_is_made_on_the_server(state: State, http: Client) -> None:
    id = http.new()
    assert state.history is not None
    asked = state.history.add("", id, Message("user", "<b>*a*</b>"))
    state.history.add("", id, Message("assistant", "<b>*a*</b>", asked.number, "tiny", finish="stop"))
    user, answer = http.messages(id)
    assert "html" not in user and answer["html"] == "<p>&lt;b&gt;<em>a</em>&lt;/b&gt;</p>\n"


def test_searches_wait_for_each_other_and_others_do_not(
    http: Client, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    history, id, go_on = state.history, http.new(title="kept"), threading.Event()
    assert history is not None
    listed, looking = history.all, list[str]()

    def slow(owner: str, search: str = "", *more: int) -> Any:
        if search:
            looking.append(search)
            assert go_on.wait(60)
        return listed(owner, search, *more)

    monkeypatch.setattr(history, "all", slow)
    ask = partial(httpx.get, f"{http.base_url}/api/conversations", params={"search": "kept"}, timeout=60)
    with ThreadPoolExecutor(SEARCHES + 3) as others:
        asked = [others.submit(ask) for _ in range(SEARCHES + 3)]  # one has its turn
        ended = as_completed(asked, 60)
        for answer in (next(ended).result() for _ in range(2)):
            assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
            assert "cannot wait beside the 16 that do" in answer.json()["error"]["message"]
        assert looking == ["kept"] and http.messages(id) == []
        assert id in [one["id"] for one in http.get("/api/conversations").json()["data"]]
        go_on.set()
        assert all([one["id"] for one in left.result().json()["data"]] == [id] for left in ended)
