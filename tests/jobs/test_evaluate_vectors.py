"""`langmill evaluate` of sentence encoders beside scipy and scikit-learn: STS rows, searching, triplets, two models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import ndcg_score

from langmill.apps import embed
from langmill.common.errors import DataError
from langmill.common.metrics import Report
from langmill.common.settings import EmbedSettings, EvaluateSettings
from langmill.evaluate.nearest import search
from langmill.families.folder import save
from langmill.jobs import evaluate
from langmill.model.config import Learned, ModelConfig, StackConfig, Tokens
from langmill.model.init import init_
from langmill.model.transformer import Transformer
from langmill.text.tokenizer import Tokenizer

WORDS = "the cat sat on a mat and 猫坐在垫子上 then قطة ran off far away".split()
TEXTS = [" ".join(WORDS[i % 14] for i in range(at, at + 3 + at % 4)) for at in range(14)]
STS = [
    {"sentence1": TEXTS[i], "sentence2": TEXTS[(3 * i + 1) % 14], "score": (i * 5) % 11 / 2}
    for i in range(13)
]
GROUPS: list[dict[str, Any]] = [
    {"anchor": f"{TEXTS[i]} asks", "positive": TEXTS[i], "negative": [TEXTS[i - 3], f"{TEXTS[i]} no"]}
    for i in range(8)
]
GROUPS += [{"anchor": "the cat ran asks", "positive": "a mat"}, {"anchor": "a mat", "positive": TEXTS[9]}]
GROUPS += [{"anchor": GROUPS[0]["anchor"], "positive": "another right one"}]


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("vectors")
    tokenizer = Tokenizer.train(TEXTS * 2, 300)
    stack = StackConfig(
        32, 2, 2, 2, 16, 64, norm="layer", norm_eps=1e-12, activation="gelu", gated=False, position=Learned(),
        bias=frozenset({"q", "k", "v", "o", "mlp"}), norm_order="post", causal=False,
    )  # fmt: skip
    for seed, name in enumerate("ab"):
        entry = Tokens(tokenizer.vocab_size, 8, types=2, norm=True)
        model = Transformer(ModelConfig(encoder=stack, encoder_input=entry))
        init_(model, seed)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(4 if weight.dim() > 1 else 1)
        save(model, tokenizer, folder / name)
    for name, rows in (("sts", STS), ("embed", GROUPS)):
        written(folder / f"{name}.jsonl", rows)
    return {path.stem: str(path) for path in folder.iterdir()}


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def run(model: str, on: str | Path, **more: Any) -> Report:
    asked = {"model": model, "on": [str(on)], "device": "cpu", "resamples": 40} | more
    return evaluate.run(EvaluateSettings.model_validate(asked), quiet=True)


def vectors(model: str, texts: list[str]) -> np.ndarray[Any, Any]:
    settings = EmbedSettings(model=model, text=texts, device="cpu")
    results = embed.run(settings, quiet=True, as_json=True).extra["results"]
    return np.array([result["embedding"] for result in results])


def test_cosines_go_with_scores_as_scipy_says(at: dict[str, str], tmp_path: Path) -> None:
    report = run(at["a"], at["sts"], out=tmp_path / "rows.jsonl")
    first, second = (vectors(at["a"], [str(row[side]) for row in STS]) for side in ("sentence1", "sentence2"))
    cosines, truth = (first * second).sum(1), [row["score"] for row in STS]
    assert report.figures["pearson"] == pytest.approx(stats.pearsonr(cosines, truth)[0], abs=1e-4)
    assert report.figures["spearman"] == pytest.approx(stats.spearmanr(cosines, truth)[0])
    low, high = report.figures["spearman_interval"]
    assert low <= report.figures["spearman"] <= high and "95 % interval" in report.text
    kept = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["cosine"] for row in kept] == pytest.approx(cosines.tolist(), abs=1e-5)
    assert report.counts["windowed"] > 0 and report.extra["record"]["task"] == "sts"
    assert report.extra["record"]["models"][at["a"]]["pooling"] == "mean"
    other = [{"text_a": r["sentence1"], "text_b": r["sentence2"], "score": str(r["score"])} for r in STS]
    assert run(at["a"], written(tmp_path / "o.jsonl", other)).figures == report.figures


def test_searching_by_hand(at: dict[str, str], tmp_path: Path) -> None:
    report = run(at["a"], at["embed"], out=tmp_path / "rows.jsonl")
    candidates = list(dict.fromkeys(t for r in GROUPS for t in (r["positive"], *r.get("negative", ()))))
    right: dict[str, set[str]] = {}
    for row in GROUPS:
        right.setdefault(row["anchor"], set()).add(row["positive"])
    vector = dict(zip([*right, *candidates], vectors(at["a"], [*right, *candidates]), strict=True))
    hits, gains, nearer = [], [], []
    for anchor, own in right.items():
        among = [text for text in candidates if text != anchor]
        scores = np.array([vector[anchor] @ vector[text] for text in among])
        gains.append(ndcg_score([[text in own for text in among]], [scores], k=10))
        order = [among[i] in own for i in np.argsort(-scores)]
        hits.append((order[0], 1 / (1 + order.index(True)) if True in order[:10] else 0))
    for row in GROUPS:
        a, p = vector[row["anchor"]], vector[row["positive"]]
        nearer += [a @ p > a @ vector[text] for text in row.get("negative", ())]
    expected = [*np.mean(hits, axis=0), np.mean(gains), np.mean(nearer)]
    names = ("accuracy@1", "mrr@10", "ndcg@10", "triplet_accuracy")
    assert [report.figures[name] for name in names] == pytest.approx(expected)
    assert 0 < expected[0] < 1 and 0 < expected[3] < 1
    kept = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(kept) == report.counts["rows"] == 10 and len(kept[0]["ranks"]) == 2
    assert all(row["nearest"] != row["anchor"] for row in kept)  # its own text is no answer
    assert report.counts["rows joined to one with the same anchor"] == 1
    assert report.counts["texts to choose from"] == len(candidates)
    again = run(at["a"], at["embed"], micro_batch_size=1).figures
    assert [again[name] for name in names] == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["sts", "embed"])
def test_against_another_model(kind: str, at: dict[str, str]) -> None:
    found = run(at["a"], at[kind], against=at["b"]).extra["against"]
    for name, theirs in run(at["b"], at[kind]).figures.items():
        if not name.endswith("_interval"):
            assert found[name]["theirs"] == pytest.approx(theirs)
            low, high = found[name]["interval"]
            assert low <= found[name]["difference"] <= high
    (same, *_) = (one for name, one in run(at["a"], at[kind], against=at["a"]).extra["against"].items()
                  if name != "model")  # fmt: skip
    assert same["interval"] == [0.0, 0.0]


def test_bad_rows_are_counted_or_refused(at: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    odd = [{**STS[0], "score": "high"}, {**STS[0], "score": True}, {"sentence1": "a", "sentence2": "b"}]
    report = run(at["a"], written(path, [*STS, *odd, {**STS[0], "sentence1": " "}]))
    assert report.counts["set_aside"] == 4 and "2 x a score that is no number" in report.text
    with pytest.raises(DataError, match=r"has the score 1: nothing can go with it"):
        run(at["a"], written(path, [{**row, "score": 1} for row in STS]))
    twice = [["a cat", "a cat"], ["a cat", "a mat", "a mat"], ["a cat", "a mat", "a cat"]]
    report = run(at["a"], written(path, [["a cat", "a mat", "far"], *twice]))
    assert "3 x a text twice in one row" in report.text and report.extra["record"]["task"] == "embed"
    with pytest.raises(DataError, match="holds no text that would be wrong to find"):
        run(at["a"], written(path, [["a cat", "a mat"]]))


@given(st.integers(1, 9), st.integers(2, 30), st.integers(0, 2**32 - 1))
def test_ranks_are_those_of_a_sorted_list(queries: int, candidates: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    q, c = (random.integers(-2, 3, (n, 3)).astype(np.float32) for n in (queries, candidates))
    right = [
        random.permutation(candidates)[: random.integers(1, candidates)].tolist() for _ in range(queries)
    ]
    for i, found in enumerate(search(q, c, right, [None] * queries)):
        order = sorted(range(candidates), key=lambda j: (-float(q[i] @ c[j]), j in right[i]))
        assert found.ranks == tuple(place for place, j in enumerate(order, 1) if j in right[i])
        gains = sum(1 / np.log2(1 + rank) for rank in found.ranks if rank <= 10)
        best = sum(1 / np.log2(2 + place) for place in range(min(len(right[i]), 10)))
        assert found.figures["ndcg@10"] == pytest.approx(gains / best)


def test_a_model_that_takes_all_texts_for_equal_finds_nothing() -> None:
    same = np.full((12, 2), 0.5, np.float32)
    for vectors_ND in (same, same * np.nan):
        (found,) = search(vectors_ND[:1], vectors_ND, [[4]], [0])
        assert found.figures == {"accuracy@1": 0.0, "mrr@10": 0.0, "ndcg@10": 0.0}
