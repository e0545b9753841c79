"""/v1/rerank: the order of the vectors' cosines, in the forms that Cohere's, Jina's and vLLM's clients send."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import pytest

from langmill.serve import rerank
from langmill.serve.models import Loaded
from langmill.serve.writing import aside

TEXTS = ["every day and every night", "春眠不觉晓。", "The quick brown fox jumps", "a", "春眠不觉晓。"]
ASK: dict[str, Any] = {"model": "encoder", "query": "The quick brown fox", "documents": TEXTS}


@pytest.fixture(scope="module")
def url(encoder_folder: str, folder: str, serving_long: Any) -> str:
    made: str = serving_long(encoder_folder, folder).url
    return made


def test_texts_come_in_the_order_of_their_cosines(url: str) -> None:
    told = httpx.post(
        f"{url}/v1/embeddings", json={"model": "encoder", "input": [ASK["query"], *TEXTS]}
    ).json()
    query, *others = (np.array(one["embedding"]) for one in told["data"])
    wanted = [float(query @ one) for one in others]
    for path in ("/v1/rerank", "/v2/rerank", "/rerank"):
        got = httpx.post(url + path, json=ASK).json()
        scores = {one["index"]: one["relevance_score"] for one in got["results"]}
        assert [scores[at] for at in range(len(TEXTS))] == pytest.approx(wanted, abs=1e-6)
        assert list(scores) == sorted(range(len(TEXTS)), key=lambda at: -wanted[at]) != sorted(scores)
        assert [one["document"]["text"] for one in got["results"]] == [TEXTS[at] for at in scores]
        assert got["usage"] == told["usage"] and got["model"] == "encoder"
    best = httpx.post(
        f"{url}/v1/rerank",
        json={**ASK, "documents": [{"text": one} for one in TEXTS], "top_n": 2, "return_documents": False},
    ).json()["results"]
    assert best == [{"index": at, "relevance_score": scores[at]} for at in list(scores)[:2]]
    assert len(httpx.post(f"{url}/v1/rerank", json={**ASK, "top_n": 99}).json()["results"]) == len(TEXTS)


def test_a_long_question_is_read_aside(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    async def told(loaded: Loaded, size: int, work: Any) -> Any:
        sizes.append(size)
        return await aside(loaded, size, work)

    monkeypatch.setattr(rerank, "aside", told)
    answer = httpx.post(f"{url}/v1/rerank", json={**ASK, "query": "a" * 9000, "documents": ["a"]})
    assert answer.json()["error"]["code"] == "context_length_exceeded" and sizes == [9001]


@pytest.mark.parametrize(
    "given, param, message",
    [
        ({"model": "tiny"}, None, "tiny does not make vectors"),
        ({"query": ""}, "query", "query is empty"),
        ({"documents": []}, "documents", "documents should have at least 1 item"),
        ({"documents": ["a", ""]}, "documents", "documents 1 is empty"),
        ({"documents": ["a " * 99]}, "documents", "reads 64 tokens and documents has"),
        ({"documents": [{"text": "a", "title": "b"}]}, "documents.0", "a text, or {"),
        ({"top_n": 0}, "top_n", "greater than or equal to 1"),
        ({"max_chunks_per_doc": 1}, "max_chunks_per_doc", "no field 'max_chunks_per_doc'"),
    ],
)
def test_what_cannot_be_ranked_is_refused_by_name(
    url: str, given: dict[str, Any], param: str | None, message: str
) -> None:
    answer = httpx.post(f"{url}/v1/rerank", json={**ASK, **given})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param and message in error["message"]
