"""Objectives of encoders and encoder-decoders: against values worked out by hand, and transformers' own losses."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.trainer_pt_utils import LabelSmoother

from langmill.data.corrupt import Masking, flags
from langmill.data.fresh import Masked
from langmill.data.items import Contrasted, Labelled, Spanned, Tagged, Translated
from langmill.data.rows import TaskRows, Text, Texts
from langmill.families import family, folder
from langmill.model.pool import pooled
from langmill.train import objectives
from langmill.train.loop import fit
from langmill.train.objectives import Objective, Tensors
from langmill.train.step import tensors
from langmill.train.tasks import (
    classify,
    contrastive,
    info_nce,
    masked,
    multilabel,
    regress,
    seq2seq,
    span,
    tag,
)

CPU, PAD, SIZES = torch.device("cpu"), 0, (9, 4, 12, 1, 7, 5, 3)
AUTO = {
    "text": transformers.AutoModelForMaskedLM,
    "classify": transformers.AutoModelForSequenceClassification,
    "tag": transformers.AutoModelForTokenClassification,
    "answer": transformers.AutoModelForQuestionAnswering,
    "write": transformers.AutoModelForSeq2SeqLM,
}


class Fixed(nn.Module):
    """States that are given, a document a row, and a head that leaves them as they are."""

    def __init__(self, states: list[list[list[float]]], pool: str = "first") -> None:
        super().__init__()
        self.states, self.pool = nn.Parameter(torch.tensor(states)), pool
        self.head_weight = nn.Parameter(torch.eye(self.states.shape[-1]))
        self.head_bias: Tensor | None = None

    def hidden(self, tokens_BT: Tensor, **given: Any) -> Tensor:
        return self.states + 0.0 * tokens_BT[..., None]

    def transform(self, hidden: Tensor) -> Tensor:
        return hidden

    logits = transform

    def pooled(self, h_BTD: Tensor, documents_BT: Tensor) -> Tensor:
        return pooled(h_BTD, documents_BT, self.pool)  # type: ignore[arg-type]


def given(documents: list[list[int]], **more: Any) -> Tensors:
    numbers = torch.tensor(documents)
    return {"tokens": numbers, "documents": numbers, "positions": torch.arange(numbers.shape[1]).expand_as(numbers),
            **{name: torch.as_tensor(value) for name, value in more.items()}}  # fmt: skip


def reference(name: str, task: str, where: Path, **more: Any) -> tuple[Any, Any]:
    """transformers' model of random weights, and ours of the same."""
    kind = name.split("-")[0]
    shape = family({"marian": "bart"}.get(kind, kind), "test").TINY[name]
    quiet = {"dropout_rate": 0.0} if kind == "t5" else {}
    config = transformers.AutoConfig.for_model(kind, **shape, **quiet, **more)
    torch.manual_seed(0)
    theirs = AUTO[task].from_config(config).eval()
    for weight in theirs.parameters():
        if weight.requires_grad:
            weight.data.normal_(1.0 if weight.dim() == 1 else 0.0, 0.1)
    if hasattr(theirs, "final_logits_bias"):
        theirs.final_logits_bias.normal_()
    theirs.save_pretrained(where)
    return theirs, folder.load_model(where)


def texts() -> list[Text]:
    random = np.random.default_rng(0)
    return [
        Text(str(i), random.integers(2, 90, size), np.arange(size) > size // 2)
        for i, size in enumerate(SIZES)
    ]


def alone(text: Text) -> dict[str, Tensor]:
    """As transformers takes one text."""
    assert text.types is not None
    return {"input_ids": torch.tensor(np.array([text.ids])),
            "token_type_ids": torch.tensor(np.array([text.types])).long()}  # fmt: skip


def whole(objective: Objective, model: nn.Module, source: Any, size: int = 2) -> tuple[Tensor, int]:
    """An epoch's sum and number."""
    rows = TaskRows(source, np.arange(len(source)), 24, size, 0)
    parts = [objective(model, tensors(batch, CPU)) for batch in rows.once()]
    return torch.stack([loss for loss, _ in parts]).sum(), sum(int(count) for _, count in parts)


def test_masked_by_hand_and_nothing_scored() -> None:
    model = Fixed([[[0.0, 0.0], [math.log(3), 0.0], [1.0, 2.0]]])
    loss, count = masked(model, given([[1, 1, 1]], targets=[[1, 0, -100]]))
    assert int(count) == 2
    assert float(loss.detach()) == pytest.approx(math.log(2) + math.log(4 / 3))
    nothing, count = masked(model, given([[1, 1, 1]], targets=[[-100, -100, -100]]))
    nothing.backward()
    assert (nothing.item(), int(count)) == (0.0, 0) and not model.states.grad.any()


def test_smoothing_by_hand() -> None:
    model = Fixed([[[math.log(3), 0.0]]])
    loss, _ = seq2seq(model, given([[1]], targets=[[0]]), label_smoothing=0.2)
    assert float(loss) == pytest.approx(0.9 * math.log(4 / 3) + 0.1 * math.log(4))


def test_documents_by_hand() -> None:
    model = Fixed([[[math.log(3), 0.0], [9.0, 9.0]], [[0.0, 0.0], [math.log(2), 0.0]]])
    documents = [[1, 1], [1, 2]]
    batch = given(documents, labels=[[0, -1], [1, 1]])
    loss, count = classify(model, batch)
    assert float(loss) == pytest.approx(math.log(4 / 3) + math.log(2) + math.log(3)) and int(count) == 3
    loss, count = classify(model, batch, weights=[1.5, 0.75])
    assert float(loss) == pytest.approx(1.5 * math.log(4 / 3) + 0.75 * math.log(6)) and int(count) == 3
    unknown = {**batch, "labels": torch.tensor([[-1, -1], [1, 1]])}
    assert int(classify(model, unknown)[1]) == 2
    several = given(documents, labels=[[[1, 0], [-1, -1]], [[0, -1], [1, 1]]])
    loss, count = multilabel(model, several)
    assert int(count) == 5
    assert float(loss) == pytest.approx(math.log(4 / 3) + 3 * math.log(2) + math.log(1.5))
    loss, _ = multilabel(model, several, positive=[2.0, 1.0])
    assert float(loss) == pytest.approx(2 * math.log(4 / 3) + 3 * math.log(2) + 2 * math.log(1.5))
    values = torch.tensor([[math.log(3) - 2, math.nan], [1.0, math.nan]])
    loss, count = regress(model, given(documents, values=values))
    loss.backward()
    assert (float(loss), int(count)) == (pytest.approx(5.0), 2) and model.states.grad.isfinite().all()


def test_tags_and_spans_by_hand() -> None:
    model = Fixed([[[math.log(3), 0.0], [0.0, 0.0], [0.0, math.log(2)], [7.0, 7.0]]])
    loss, count = tag(model, given([[1, 1, 1, 0]], targets=[[0, -100, 0, -100]]), weights=[2.0, 1.0])
    assert float(loss) == pytest.approx(2 * math.log(4 / 3) + 2 * math.log(3)) and int(count) == 2
    batch = given([[1, 1, 1, 0]], starts=[[0, -1]], ends=[[2, -1]], allowed=[[True, True, True, True]])
    loss, count = span(model, batch)
    assert float(loss) == pytest.approx((math.log(5 / 3) + math.log(2)) / 2) and int(count) == 1
    batch = given([[1, 1, 1, 0]], starts=[[0, -1]], ends=[[2, -1]], allowed=[[True, False, True, False]])
    loss, _ = span(model, batch)
    loss.backward()
    assert float(loss) == pytest.approx((math.log(4 / 3) + math.log(1.5)) / 2)
    assert model.states.grad.isfinite().all() and not model.states.grad[0, [1, 3]].any()


def test_contrast_by_hand() -> None:
    """Cosines of 1 and 0 by a scale of ln 3: a positive has 3/4 against one negative."""
    a, b = [2.0, 0.0], [0.0, 1.0]
    model = Fixed([[a, a, b, b]])
    batch = given([[1, 2, 3, 4]], pairs=[[0, 1]])
    loss, count = contrastive(model, batch, scale=math.log(3))
    assert float(loss) == pytest.approx(2 * math.log(4 / 3)) and int(count) == 2
    same = {
        **batch,
        "contents": torch.tensor([[[0, 1], [0, 2]]]),
    }  # one anchor: neither positive is the other's negative
    assert float(contrastive(model, same, scale=math.log(3))[0]) == 0
    hard, count = contrastive(Fixed([[a, a, b, b]]), given([[1, 2, 3, 4]], pairs=[[0]]), scale=math.log(3))
    assert float(hard) == pytest.approx(math.log(5 / 3)) and int(count) == 1
    nothing, count = contrastive(model, given([[0, 0, 0, 0]], pairs=[[-1, -1]]))
    assert (nothing.item(), int(count)) == (0.0, 0)
    deep = Fixed([[[1.0, 0.0, 0.0], [1.0, 0.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]])
    parts = [contrastive(deep, batch, dims=[(size, 1.0)])[0] for size in (1, 3)]
    loss, _ = contrastive(deep, batch, dims=[(1, 2.0), (3, 1.0)])
    assert float(loss) == pytest.approx(2 * float(parts[0]) + float(parts[1]))
    assert float(parts[0]) == pytest.approx(2 * math.log(2))


def test_contrast_is_the_ranking_loss_of_sentence_transformers() -> None:
    """Its MultipleNegativesRankingLoss as written there, forward and symmetric, with two hard negatives."""
    torch.manual_seed(0)
    x_MGE = torch.randn(5, 4, 8)
    a, p, *negatives = F.normalize(x_MGE, dim=-1).unbind(1)
    scores = 20.0 * a @ torch.cat([p, *negatives]).T
    own = torch.arange(5)
    forward, backward = F.cross_entropy(scores, own), F.cross_entropy(scores[:, :5].T, own)
    torch.testing.assert_close(info_nce(x_MGE, 20.0) / 5, forward)
    torch.testing.assert_close(info_nce(x_MGE, 20.0, symmetric=True) / 5, (forward + backward) / 2)


def test_masked_is_that_of_transformers(tmp_path: Path) -> None:
    theirs, ours = reference("bert", "text", tmp_path)
    random = np.random.default_rng(1)
    targets = [np.where(random.random(size) < 0.4, random.integers(2, 90, size), -100) for size in SIZES]
    loss, count = whole(masked, ours, Tagged.of(texts(), targets, PAD))
    parts = [
        F.cross_entropy(theirs(**alone(text)).logits[0], torch.tensor(wanted), reduction="sum")
        for text, wanted in zip(texts(), targets, strict=True)
    ]
    assert count == sum((wanted >= 0).sum() for wanted in targets)
    torch.testing.assert_close(loss, torch.stack(parts).sum(), rtol=1e-5, atol=1e-5)
    one = theirs(**alone(texts()[2]), labels=torch.tensor(targets[2][None])).loss
    single, number = whole(masked, ours, Tagged.of(texts()[2:3], targets[2:3], PAD))
    torch.testing.assert_close(single / number, one)


@pytest.mark.parametrize(
    ("problem", "objective"),
    [
        ("single_label_classification", classify),
        ("multi_label_classification", multilabel),
        ("regression", regress),
    ],
)
def test_classification_is_that_of_transformers(problem: str, objective: Objective, tmp_path: Path) -> None:
    classes = 1 if problem == "regression" else 3
    theirs, ours = reference("bert", "classify", tmp_path, num_labels=classes, problem_type=problem)
    labels = {
        "single_label_classification": np.arange(7) % 3,
        "multi_label_classification": (np.arange(21).reshape(7, 3) % 2),
        "regression": np.linspace(-1, 2, 7).astype(np.float32),
    }[problem]
    loss, count = whole(objective, ours, Labelled.of(texts(), labels, PAD))
    kind = torch.float32 if problem != "single_label_classification" else torch.int64
    parts = [
        theirs(**alone(text), labels=torch.tensor(labels[i : i + 1]).to(kind)).loss
        for i, text in enumerate(texts())
    ]
    torch.testing.assert_close(loss / count, torch.stack(parts).mean(), rtol=1e-5, atol=1e-6)


def test_tags_are_those_of_transformers(tmp_path: Path) -> None:
    theirs, ours = reference("bert", "tag", tmp_path, num_labels=3)
    tags = [np.where(np.arange(size) % 4 < 3, np.arange(size) % 3, -100) for size in SIZES]
    loss, count = whole(tag, ours, Tagged.of(texts(), tags, PAD))
    parts = [
        theirs(**alone(text), labels=torch.tensor(tags[i][None])).loss * int((tags[i] >= 0).sum())
        for i, text in enumerate(texts())
    ]
    torch.testing.assert_close(loss, torch.stack(parts).sum(), rtol=1e-5, atol=1e-5)
    assert count == sum((part >= 0).sum() for part in tags)


def test_spans_are_those_of_transformers(tmp_path: Path) -> None:
    theirs, ours = reference("bert", "answer", tmp_path)
    spans = [(size // 3, size - 1) for size in SIZES]
    loss, count = whole(span, ours, Spanned.of(texts(), spans, PAD))
    parts = [
        theirs(**alone(text), start_positions=torch.tensor([a]), end_positions=torch.tensor([b])).loss
        for text, (a, b) in zip(texts(), spans, strict=True)
    ]
    assert count == len(SIZES)
    torch.testing.assert_close(loss / count, torch.stack(parts).mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["bart", "marian", "t5"])
def test_seq2seq_is_that_of_transformers(name: str, smoothing: float, tmp_path: Path) -> None:
    theirs, ours = reference(name, "write", tmp_path)
    start = theirs.config.decoder_start_token_id or 0
    written = [np.random.default_rng(i).integers(2, 90, size + 2) for i, size in enumerate(reversed(SIZES))]
    objective = partial(seq2seq, label_smoothing=smoothing)
    loss, count = whole(objective, ours, Translated.of(texts(), written, start, PAD))
    smooth, parts = LabelSmoother(epsilon=smoothing), []
    for text, ids in zip(texts(), written, strict=True):
        labels = torch.tensor(ids[None])
        shifted = torch.tensor([[start, *ids[:-1].tolist()]])
        out = theirs(alone(text)["input_ids"], decoder_input_ids=shifted, labels=labels)
        parts.append((out.loss if not smoothing else smooth(out, labels)) * len(ids))
    assert count == sum(map(len, written))
    torch.testing.assert_close(loss, torch.stack(parts).sum(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["marian", "t5-v1.1"])
def test_smoothing_has_the_gradient_of_the_plain_form(
    name: str, frozen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tied and untied, trained and frozen output matrices, several chunks, and places that are not scored."""
    monkeypatch.setattr(objectives, "CHUNK", 7)
    monkeypatch.setattr(objectives, "FROZEN_CHUNK", 7)
    _, ours = reference(name, "write", tmp_path)
    ours.head_weight.requires_grad_(not frozen)
    source = Translated.of(texts(), [text.ids for text in reversed(texts())], 0, PAD)
    batch = tensors(next(TaskRows(source, np.arange(7), 24, 2, 0)), CPU)
    batch["targets"][:, ::3] = -100
    loss, count = seq2seq(ours, batch, label_smoothing=0.3)
    z = ours(
        batch["tokens"], documents_BT=batch["documents"], positions_BT=batch["positions"],
        **{key: batch[key] for key in batch if key.startswith("encoder_")},
    ).flatten(0, 1)  # fmt: skip
    plain = F.cross_entropy(z, batch["targets"].flatten(), reduction="sum", label_smoothing=0.3)
    assert int(count) == int((batch["targets"] >= 0).sum())
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-4)
    used = [weight for weight in ours.parameters() if weight.requires_grad]
    pairs = zip(*(torch.autograd.grad(x, used, allow_unused=True) for x in (loss, plain)), strict=True)
    for mine, theirs in pairs:
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bfloat16"])
def test_rows_together_are_rows_one_by_one(mixed: bool, tmp_path: Path) -> None:
    """8×1 equals 1×8: sums and numbers do not depend on how documents fall into batches."""
    _, ours = reference("bert", "classify", tmp_path, num_labels=3)
    source = Labelled.of(texts(), np.arange(7) % 3, PAD)
    weighted = partial(classify, weights=[0.5, 1.5, 1.0])
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        (one, few), (other, many) = (whole(weighted, ours, source, size) for size in (1, 3))
    assert few == many == 7
    torch.testing.assert_close(one, other, rtol=0.02 if mixed else 1e-5, atol=0)
    assert one.dtype == torch.float32


def test_pairs_of_a_sentence_encoder(tmp_path: Path) -> None:
    """A model without a head: the pooling is said, and hard negatives stand in their groups."""
    _, ours = reference("bert", "classify", tmp_path)
    groups = [[Text(f"{i}{j}", [2 + i, 3 + j, 4 + i * j, 5]) for j in range(4)] for i in range(5)]
    batch = tensors(next(iter(TaskRows(Contrasted.of(groups, PAD), np.arange(5), 36, 3, 0).once())), CPU)
    loss, count = contrastive(ours, batch, pool="mean")
    found = []
    for number in batch["pairs"][batch["pairs"] >= 0].tolist():
        rows = torch.tensor([list(text.ids) for text in groups[number]])
        found.append(ours.hidden(rows).mean(dim=1))
    assert int(count) == 5
    torch.testing.assert_close(loss, info_nce(torch.stack(found), 20.0), rtol=1e-4, atol=1e-5)


def test_learning_works_and_compiled_code_agrees(tmp_path: Path) -> None:
    """A compiled objective gives the eager loss, whatever number of documents a batch has."""
    _, ours = reference("bert", "classify", tmp_path, num_labels=3)
    source = Labelled.of(texts(), np.arange(7) % 3, PAD)
    compiled = torch.compile(classify, dynamic=False, backend="eager")
    for size in (2, 2, 3):
        rows = TaskRows(source, np.arange(7), 24, size, size)
        for batch in (tensors(next(rows), CPU) for _ in range(3)):
            torch.testing.assert_close(
                compiled(ours, batch)[0], classify(ours, batch)[0], rtol=1e-5, atol=1e-5
            )
    optimizer = torch.optim.AdamW(ours.parameters(), 3e-3)
    before = whole(classify, ours, source)[0]
    for _ in range(20):
        optimizer.zero_grad()
        whole(classify, ours, source)[0].backward()
        optimizer.step()
    assert whole(classify, ours, source)[0] < before / 4


def test_a_run_that_stops_goes_on_to_the_same_weights(tiny: ModuleType, tmp_path: Path) -> None:
    """fit() over texts that are masked anew in each epoch."""
    source = Masked(
        store=Texts.of(texts(), PAD), how=Masking(95, flags([PAD, 95, 96], 97)), length=24,
        front=(96,), back=(96,), pad_id=PAD,
    )  # fmt: skip

    def run(name: str, stop: int | None, resume: bool = False) -> str:
        _, ours = reference("bert", "text", tmp_path / "model")
        rows = TaskRows(source, np.arange(7), 24, 2, seed=0)
        fit(
            ours, rows, masked, tiny.settings(max_steps=12), tmp_path / name, seed=0, quiet=True,
            resume=resume, hooks=[lambda step, state: step == stop],
        )  # fmt: skip
        assert rows.epoch >= (2 if stop else 5)
        return tiny.digest(ours)

    whole_run = run("whole", None)
    assert run("parts", 5) != whole_run
    assert run("parts", None, resume=True) == whole_run
