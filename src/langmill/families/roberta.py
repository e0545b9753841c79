"""RoBERTa, XLM-RoBERTa and CamemBERT: BERT's shape with other names and a shifted position table. arXiv:1907.11692,
1911.02116, 1911.03894."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from langmill.common.errors import ModelError
from langmill.families import bert
from langmill.families.weights import Rule, linear, number, rule
from langmill.model.config import Head, ModelConfig, Task

MODEL_TYPES = ("roberta", "xlm-roberta", "camembert")
PREFIX = "roberta."
HEAD = "lm_head.decoder.weight"
OUTSIDE = ("lm_head.", "classifier.", "qa_outputs.")
IGNORED = (
    r"roberta\.embeddings\.position_ids",
    r"lm_head\.(bias|decoder\.(weight|bias)|(dense|layer_norm)\.(weight|bias))",  # the bias again, or of another task
    r"roberta\.pooler\..*",
    r"classifier\.dense\..*",  # where another head is put on
    r"classifier\.out_proj\.(weight|bias)",
    *bert.LEFT,
)
SHAPE = {**bert.SHAPE, "type_vocab_size": 1, "max_position_embeddings": 66}
TINY: dict[str, dict[str, Any]] = {
    "roberta": SHAPE,
    "xlm-roberta": {**SHAPE, "layer_norm_eps": 1e-5},
    "camembert": SHAPE,
}


def config(theirs: Mapping[str, Any]) -> ModelConfig:
    """A RoBERTa `config.json` as our shape. Positions start behind the padding id."""
    pad = theirs.get("pad_token_id", 1)
    if not isinstance(pad, int) or not 0 <= pad < 1 << 20:
        raise ModelError(f"config.json: pad_token_id is {pad!r}; RoBERTa's positions start behind it")
    rows = number(theirs, "max_position_embeddings", 512)
    if rows <= pad + 1:
        raise ModelError(f"config.json: {rows} positions are too few behind the padding id {pad}")
    found = bert.encoder(theirs, length=rows - pad - 1, offset=pad + 1, eps=1e-12)
    if found.head is not None and found.head.task == "text":
        found = replace(found, head=replace(found.head, transform="gelu"))
    return found


def with_task(c: ModelConfig, task: Task, labels: tuple[str, ...]) -> ModelConfig:
    """The same encoder with the head for another task."""
    return replace(c, head=bert.head_for(task, c.vocab, "gelu", labels))


def adjust(c: ModelConfig, names: Mapping[str, Any]) -> ModelConfig:
    """As BERT's."""
    return bert.adjust(c, names, PREFIX)


def export(c: ModelConfig) -> dict[str, Any] | None:
    """Our shape as a RoBERTa `config.json`; None where RoBERTa cannot express it."""
    return bert.written(c, "roberta", "Roberta", config)


def rules(c: ModelConfig) -> tuple[Rule, ...]:
    """RoBERTa's names; the dense layer of classification is the head's own, not the pooler."""
    return (*bert.body(c, PREFIX), *_head(c.head))


def _head(head: Head | None) -> list[Rule]:
    pairs: list[tuple[str, ...]] = []
    if head is None:
        return []
    if head.task == "text":
        pairs += linear("lm_head.dense", "head_dense") + linear("lm_head.layer_norm", "head_norm")
        pairs += [("lm_head.bias", "output_bias" if head.tied else "head.bias")]
        pairs += [] if head.tied else [(HEAD, "head.weight")]
    elif head.task == "answer":
        pairs += linear("qa_outputs", "head")
    elif head.task == "tag":
        pairs += linear("classifier", "head")
    elif head.outputs:
        pairs += linear("classifier.dense", "head_dense") + linear("classifier.out_proj", "head")
    else:
        pairs += linear(PREFIX + "pooler.dense", "head_dense")
    return [rule(*pair) for pair in pairs]
