"""The LSTM baseline's own folder format: the one model type that other tools cannot load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from langmill.families.weights import Rule, number, rule
from langmill.model.config import LSTMConfig

MODEL_TYPES = ("langmill_lstm",)
PREFIX = ""
OUTSIDE = ()
IGNORED = ()


def config(theirs: Mapping[str, Any]) -> LSTMConfig:
    """A `config.json` that `export` wrote."""
    sizes = {name: number(theirs, name) for name in ("vocab", "length", "dim", "hidden", "layers")}
    return LSTMConfig(**sizes, tied=bool(theirs.get("tied", True)))


def export(c: LSTMConfig) -> dict[str, Any]:
    """The shape as it is; vocab_size beside it under the name that other tools look for."""
    return {
        "architectures": ["LangmillLSTM"],
        "model_type": MODEL_TYPES[0],
        "vocab_size": c.vocab,
        **asdict(c),
    }


def rules(c: LSTMConfig) -> tuple[Rule, ...]:
    """Ours are the names on disk."""
    parts = [
        f"lstm.{kind}_{gate}_l{i}"
        for i in range(c.layers)
        for kind in ("weight", "bias")
        for gate in ("ih", "hh")
    ]
    names = ["tokens.weight", *parts, *([] if c.tied else ["head.weight"])]
    return tuple(rule(name, name) for name in names)
