"""What a document costs in a packed row is what it costs alone: nothing leaks across boundaries."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from langmill.data.batches import Documents, Packed
from langmill.model.config import Head, Learned, ModelConfig, StackConfig, Tokens
from langmill.model.init import init_
from langmill.model.transformer import Transformer
from langmill.train.step import tensors

LENGTH, START, BOUNDARY, PAD = 12, 0, 1, 2


def shards(sizes: list[int]) -> Any:
    """Documents of these sizes, in memory."""
    random = np.random.default_rng(5)
    documents = [random.integers(3, 50, size).astype(np.uint16) for size in sizes]
    return SimpleNamespace(
        tokens_of=lambda i: documents[i],
        lengths=lambda indices: np.array([sizes[i] for i in indices], dtype=np.int64),
        fingerprint="none",
    )


def network(tiny: ModuleType, kind: str) -> Any:
    if kind in ("llama", "lstm"):
        return tiny.model(kind)
    window = (4, None) if kind == "window" else ()
    position = {"position": Learned(), "norm": "layer", "gated": False} if kind == "gpt2" else {}
    stack = StackConfig(16, 2, 2, 2, 8, 32, window=window, **position)  # type: ignore[arg-type]
    model = Transformer(ModelConfig(stack, Tokens(50, LENGTH), head=Head(50)))
    init_(model, 0)
    return model


def costs(model: Any, batch: Any) -> torch.Tensor:
    """(B, T), 0 where nothing is scored."""
    scores = model(batch["tokens"], positions_BT=batch.get("positions"), documents_BT=batch.get("documents"))
    targets = batch["targets"]
    return F.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


@pytest.mark.parametrize("kind", ["llama", "window", "gpt2", "lstm"])
@torch.no_grad()
def test_a_document_costs_in_a_pack_what_it_costs_alone(tiny: ModuleType, kind: str) -> None:
    sizes = [3, 5, 1, 11, 7, 2, 4, 6, 30]
    data, model = shards(sizes), network(tiny, kind)
    for weight in model.parameters():
        weight.mul_(5)  # sharp enough for a leak to show
    packed = Packed(Documents(data, START, BOUNDARY, PAD), np.arange(len(sizes)), LENGTH, rows=2, seed=0)
    found: dict[tuple[int, ...], float] = {}
    together = 0
    while packed.epoch == 0 and len(found) < len(sizes) + 2:
        batch = tensors(next(packed), torch.device("cpu"))
        loss = costs(model, batch)
        for row in range(2):
            for segment in batch["documents"][row].unique().tolist():
                here = (batch["documents"][row] == segment) & (batch["targets"][row] >= 0)
                if segment:
                    found[tuple(batch["targets"][row][here].tolist())] = float(loss[row][here].sum())
            together += int(batch["documents"][row].max()) > 1
    assert together >= 2, "rows hold several documents"
    alone: dict[tuple[int, ...], float] = {}
    for size, document in zip(sizes, map(data.tokens_of, range(len(sizes))), strict=True):
        sequence = [START, *document.tolist(), BOUNDARY]
        for at in range(0, size + 1, LENGTH):  # one window, or several for the long one
            piece = torch.tensor(sequence[at : at + LENGTH + 1])[None]
            batch = {"tokens": piece[:, :-1], "targets": piece[:, 1:]}
            alone[tuple(piece[0, 1:].tolist())] = float(costs(model, batch).sum())
    assert found.keys() == alone.keys()
    for document, loss in alone.items():
        assert found[document] == pytest.approx(loss, rel=1e-5)
