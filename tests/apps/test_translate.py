"""`langmill translate` by the rules of a model's folder, which the command's own words overrule."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from langmill.apps import translate
from langmill.apps.texts import Row
from langmill.common.configure import configure
from langmill.common.settings import TranslateSettings
from langmill.families import family, folder, generation
from langmill.infer import beam
from langmill.model.init import init_
from langmill.model.transformer import Transformer
from langmill.text.tokenizer import Tokenizer


@pytest.fixture
def where(tmp_path: Path) -> Path:
    """A random Marian whose folder says how to search."""
    tokenizer = Tokenizer.train(["The quick brown fox jumps over the lazy dog."] * 9, 300)
    kind = family("marian", "the test")
    ids = {"pad_token_id": tokenizer.pad_id, "decoder_start_token_id": tokenizer.pad_id}
    model = Transformer(kind.config({**kind.TINY["marian"], "vocab_size": 320, **ids}))
    init_(model, 0)
    folder.save(model, tokenizer, tmp_path / "m")
    path = tmp_path / "m" / generation.FILE
    said = {
        "num_beams": 3,
        "length_penalty": 0.5,
        "max_length": 9,
        "early_stopping": True,
        "repetition_penalty": 2.0,
    }
    path.write_text(json.dumps({**json.loads(path.read_text()), **said}))
    return tmp_path / "m"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (3, 1, 0.5, 8)),
        ({"beams": 5, "max_new_tokens": 4, "length_penalty": 1.0}, (5, 1, 1.0, 4)),
        ({"n_best": 4}, (4, 4, 0.5, 8)),
    ],
)
def test_the_folder_says_how_to_search_where_the_command_does_not(
    given: dict[str, Any], expected: tuple[Any, ...], where: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def search(*arguments: Any, **how: Any) -> Any:
        asked.append(how)
        return beam.beam_search(*arguments, **how)

    monkeypatch.setattr(translate, "beam_search", search)
    settings = configure(TranslateSettings, None, [], model=str(where), **given)
    model, tokenizer = folder.load(where)
    assert tokenizer is not None
    read, counted = translate.reader(settings, model, tokenizer), Counter[str]()
    for _ in range(2):  # batches
        assert len(list(read([Row("a", "The fox.", {}), Row("b", "The dog.", {})], counted))) == 2
    names = ("beams", "n_best", "length_penalty", "max_new_tokens")
    assert tuple(asked[0][name] for name in names) == expected and asked[0]["early_stopping"] is True
    assert counted["not followed in generation_config.json: repetition_penalty=2.0"] == 1
