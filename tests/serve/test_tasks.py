"""/v1/classify, /v1/tag, /v1/answer, /v1/translate: the results of the commands, and what they refuse."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import httpx
import pytest

from langmill.apps import answer, classify, tag, translate
from langmill.common import settings as groups
from langmill.families import folder as folders
from langmill.model.config import Head, Learned, ModelConfig, Sinusoidal, StackConfig, Tokens
from langmill.model.init import init_
from langmill.model.transformer import Transformer
from langmill.text.tokenizer import Tokenizer

TEXTS = ["The quick brown fox.", "春眠不觉晓。", "day " * 60]
SHAPE: dict[str, Any] = {
    "dim": 32, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 16, "hidden": 48, "norm": "layer",
    "activation": "gelu", "gated": False, "bias": frozenset({"q", "k", "v", "o", "mlp"}), "norm_order": "post",
}  # fmt: skip


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The folder of a model for each task."""
    folder = tmp_path_factory.mktemp("tasks")
    tokenizer = Tokenizer.train(TEXTS * 2, 300)
    vocab = tokenizer.vocab_size
    reader = ModelConfig(
        encoder=StackConfig(**SHAPE, norm_eps=1e-12, position=Learned(), causal=False),
        encoder_input=Tokens(vocab, 32, types=2, norm=True),
        head=Head(2, False, True, "tanh", pool="first", task="classify", labels=("no", "yes")),
    )
    waves: dict[str, Any] = {**SHAPE, "norm_eps": 1e-5, "position": Sinusoidal()}
    writer = ModelConfig(
        StackConfig(**waves, cross=True), Tokens(vocab, 64, scale=32**0.5, start=tokenizer.pad_id),
        StackConfig(**waves, causal=False), Tokens(vocab, 64, scale=32**0.5), Head(vocab, True, True),
    )  # fmt: skip
    configs = {
        "classify": reader,
        "tag": replace(reader, head=Head(3, False, True, task="tag", labels=("O", "B-X", "I-X"))),
        "answer": replace(reader, head=Head(2, False, True, task="answer")),
        "translate": writer,
        "embed": replace(reader, head=None),
        "writes": ModelConfig(StackConfig(32, 1, 2, 2, 16, 48), Tokens(vocab, 256), head=Head(vocab)),
    }
    for seed, (name, config) in enumerate(configs.items()):
        model = Transformer(config)
        init_(model, seed)
        for parameter in model.parameters():
            parameter.data.mul_(4 if parameter.ndim > 1 else 1)
        folders.save(model, tokenizer, folder / name)
    return {name: str(folder / name) for name in configs}


@pytest.fixture(scope="module")
def served(at: dict[str, str], serving_long: Any) -> Any:
    return serving_long(*at.values(), zero_shot=True)


def commanded(run: Any, cls: Any, model: str, **more: Any) -> Any:
    return run(cls(model=model, text=TEXTS, device="cpu", **more), quiet=True, as_json=True).extra["results"]


CASES: list[tuple[str, str, Any, Any, dict[str, Any]]] = [
    ("classify", "classify", classify.run, groups.ClassifySettings, {"overlap": 4}),
    (
        "classify",
        "classify",
        classify.run,
        groups.ClassifySettings,
        {"long_texts": "truncate", "threshold": 0.4},
    ),
    ("classify", "embed", classify.run, groups.ClassifySettings, {"labels": ["fox", "day"]}),
    (
        "classify",
        "writes",
        classify.run,
        groups.ClassifySettings,
        {"labels": ["fox", "day"], "calibrate": False},
    ),
    ("tag", "tag", tag.run, groups.TagSettings, {}),
    ("answer", "answer", answer.run, groups.AnswerSettings, {"question": "Which fox?", "n_best": 2}),
    ("translate", "translate", translate.run, groups.TranslateSettings, {"beams": 2, "max_new_tokens": 9}),
]


@pytest.mark.parametrize("route, model, run, cls, more", CASES, ids=[f"{c[0]} by {c[1]}" for c in CASES])
def test_results_are_the_commands(
    served: Any, at: dict[str, str], route: str, model: str, run: Any, cls: Any, more: dict[str, Any]
) -> None:
    got = httpx.post(
        f"{served.url}/v1/{route}", json={"model": model, "input": TEXTS, **more}, timeout=60
    ).json()
    assert [one.pop("index") for one in got["data"]] == [0, 1, 2]
    assert got["data"] == commanded(run, cls, at[model], **more)
    assert got["usage"]["prompt_tokens"] > 60 and got["object"] == "list"
    if more.get("long_texts") == "truncate":
        assert got["counts"] == {"truncated": 1, "tokens cut off": got["counts"]["tokens cut off"]}


def test_one_text_and_its_pair(served: Any) -> None:
    def asked(**more: Any) -> Any:
        return httpx.post(
            f"{served.url}/v1/classify", json={"model": "classify", "input": "a fox", **more}
        ).json()

    alone, pair = asked(), asked(text_pair="another")
    assert alone["data"][0]["scores"] != pair["data"][0]["scores"]
    assert pair["data"][0]["text_pair"] == "another"


@pytest.mark.parametrize(
    "route, body, message",
    [
        (
            "classify",
            {"model": "tag", "input": "a"},
            "the model tag does not classify: serve one that was taught",
        ),
        (
            "classify",
            {"model": "classify", "input": "a", "labels": ["x", "y"]},
            "does not classify by labels",
        ),
        ("classify", {"model": "embed", "input": "a", "labels": ["x"]}, "needs two labels"),
        (
            "classify",
            {"model": "embed", "input": "a", "labels": ["x", "y" * 1025]},
            "labels.1 should have at most 1024",
        ),
        (
            "classify",
            {"model": "embed", "input": "a", "labels": ["x"] * 1025},
            "labels should have at most 1024",
        ),
        ("classify", {"model": "classify", "input": "a", "threshold": 2}, "threshold is 2"),
        (
            "classify",
            {"model": "classify", "input": TEXTS, "long_texts": "error"},
            "input 3 has",
        ),
        (
            "answer",
            {"model": "answer", "input": ["a", "b"], "question": ["c"]},
            "question has 1 texts and input has 2",
        ),
        ("answer", {"model": "answer", "input": "a"}, "question is missing"),
        ("translate", {"model": "embed", "input": "a"}, "does not translate"),
        ("tag", {"model": "tag", "input": "a", "labels": ["x"]}, "there is no field 'labels' here"),
    ],
)
def test_what_cannot_be_done_is_refused(served: Any, route: str, body: dict[str, Any], message: str) -> None:
    answer = httpx.post(f"{served.url}/v1/{route}", json=body)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]


def test_a_model_is_not_free_while_a_client_that_left_is_read_for(
    served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go, together = threading.Semaphore(0), threading.Event(), threading.Lock()
    free: list[bool] = []

    def reader(*_: Any) -> Any:
        free.append(together.acquire(blocking=False))
        begun.release()
        go.wait(60)
        together.release()
        return lambda batch, counted: iter([{"text": row.text} for row in batch])

    monkeypatch.setattr(tag, "reader", reader)
    loaded = served.state.models.named("tag")
    ask = {"model": "tag", "input": "a"}
    gone = served.ask("/v1/tag", ask)
    assert begun.acquire(timeout=60)
    gone.close()
    following = served.ask("/v1/tag", ask)
    assert not begun.acquire(timeout=0.5) and loaded.line.busy
    go.set()
    assert following.recv(1 << 16).startswith(b"HTTP/1.1 200")
    following.close()
    assert free == [True, True]
    served.until(lambda: not loaded.line.busy)


def test_what_may_not_wait_is_refused_for_now(
    at: dict[str, str], serving: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go = threading.Event(), threading.Event()

    def reader(*_: Any) -> Any:
        begun.set()
        go.wait(60)
        return lambda batch, counted: iter([{"text": row.text} for row in batch])

    monkeypatch.setattr(tag, "reader", reader)
    running = serving(at["tag"], queue_tokens=20)
    line, url = running.state.models.named("tag").line, f"{running.url}/v1/tag"
    asked = [
        running.ask("/v1/tag", {"model": "tag", "input": "day " * 30})
    ]  # nobody waits: its size is no matter
    assert begun.wait(60)
    asked.append(running.ask("/v1/tag", {"model": "tag", "input": "The fox."}))
    running.until(lambda: line.accounting()["queued"] == 1)
    refused = httpx.post(url, json={"model": "tag", "input": "qwz" * 10})
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
    assert (
        refused.headers["retry-after"] == "1" and "cannot wait beside" in refused.json()["error"]["message"]
    )
    metrics = httpx.get(f"{running.url}/metrics").text
    for line_ in (
        'engine_requests{model="tag"} 2.0',
        'engine_slots{model="tag"} 1.0',
        'refused_total{reason="queue_full"} 1.0',
    ):
        assert f"langmill_{line_}" in metrics
    asked.pop().close()  # one that leaves the line makes room
    running.until(lambda: line.accounting()["queued"] == 0)
    go.set()
    assert httpx.post(url, json={"model": "tag", "input": "a"}).status_code == 200
    assert asked.pop().recv(1 << 16).startswith(b"HTTP/1.1 200")
    running.until(lambda: not any(line.accounting().values()))
