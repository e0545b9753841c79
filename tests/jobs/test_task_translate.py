"""Translations of held-out texts that did not end by themselves are told, as `evaluate` tells them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from langmill.common.settings import FinetuneSettings
from langmill.data.tasks import TranslationRow
from langmill.infer.beam import Hypothesis
from langmill.jobs import task_translate
from langmill.text.tokenizer import Tokenizer


def test_held_out_translations_that_were_cut_off_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def search(_: Any, sources: list[list[int]], **how: Any) -> list[list[Hypothesis]]:
        return [[Hypothesis(ids[: how["max_new_tokens"]], 0.0, len(ids) < 5)] for ids in sources]

    monkeypatch.setattr(task_translate, "beam_search", search)
    tokenizer, counted = Tokenizer.train(["a text of words"] * 3, 280), Counter[str]()
    read = [
        (TranslationRow("f:1", "a", "b"), tokenizer.encode(text)) for text in ("a", "a text", "xyzxyzxyz")
    ]
    settings = FinetuneSettings(model="m", task="translate", data=["f"])
    source: Any = None
    held = task_translate._Held(settings, tokenizer, source, np.arange(3), read, counted)
    model: Any = None
    assert held._written(model) == ["a", "a text", "xyzxyzxyz"]
    assert counted == {"held-out translations cut off": 1}
