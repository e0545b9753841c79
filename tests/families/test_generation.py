"""generation_config.json: what is read of it, what is refused, and that it goes with the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from langmill.common.errors import ModelError
from langmill.families import family, folder, generation
from langmill.families.generation import Writing, rules_of, writing
from langmill.model.init import init_
from langmill.model.transformer import Transformer
from langmill.text.tokenizer import Tokenizer


def test_a_file_of_defaults_has_no_rules() -> None:
    said = {
        "repetition_penalty": 1.0,
        "do_sample": False,
        "min_length": 0,
        "no_repeat_ngram_size": 0,
        "eos_token_id": 2,
    }
    found = writing(said, 97)
    assert not found.bans and not found.unfollowed and found.beams is None and found.most is None
    assert not Writing().bans


def test_what_is_not_followed_is_known() -> None:
    found = writing({"repetition_penalty": 1.3, "do_sample": True, "guidance_scale": 1, "num_beams": 6}, 97)
    assert found.unfollowed == ("repetition_penalty=1.3", "do_sample=True") and found.beams == 6


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"bad_words_ids": [[97]]}, "bad_words_ids holds 97: ids are 0 to 96"),
        ({"bad_words_ids": 7}, "bad_words_ids is 7, not a list"),
        ({"forced_bos_token_id": "en"}, "forced_bos_token_id holds 'en'"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1, not a number of 0 or more"),
        ({"length_penalty": "long"}, "length_penalty is 'long', not a number"),
        ({"early_stopping": "soon"}, "early_stopping is 'soon': it is true, false or never"),
    ],
)
def test_what_cannot_be_a_rule_is_named(said: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        writing(said, 97)


def saved(where: Path) -> Tokenizer:
    tokenizer = Tokenizer.train(["The quick brown fox jumps over the lazy dog."] * 9, 300)
    kind = family("marian", "the test")
    pad = tokenizer.pad_id
    model = Transformer(
        kind.config(
            {**kind.TINY["marian"], "vocab_size": 320, "pad_token_id": pad, "decoder_start_token_id": pad}
        )
    )
    init_(model, 0)
    folder.save(model, tokenizer, where)
    return tokenizer


def test_rules_go_with_the_model_into_the_next_folder(tmp_path: Path) -> None:
    tokenizer = saved(tmp_path / "a")
    path = tmp_path / "a" / generation.FILE
    said = {
        "bad_words_ids": [[tokenizer.pad_id]],
        "num_beams": 6,
        "repetition_penalty": 1.2,
        "max_length": 100,
    }
    path.write_text(json.dumps({**json.loads(path.read_text()), **said, "decoder_start_token_id": 7}))
    model = folder.load_model(tmp_path / "a")
    assert rules_of(model).banned == ((tokenizer.pad_id,),) and rules_of(model).most == 99
    assert model.config.input.start == 7, "the file's start counts"
    folder.save(model, tokenizer, tmp_path / "b")
    written = json.loads((tmp_path / "b" / generation.FILE).read_text())
    assert said.items() <= written.items() and written["eos_token_id"] is not None
    assert rules_of(folder.load_model(tmp_path / "b")) == rules_of(model)


def test_an_old_folder_says_it_in_its_configuration(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    (tmp_path / "a" / generation.FILE).unlink()
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(
        json.dumps({**config, "bad_words_ids": [[9]], "num_beams": 4})
    )
    found = rules_of(folder.load_model(tmp_path / "a"))
    assert (found.banned, found.beams) == (((9,),), 4)
    (tmp_path / "a" / generation.FILE).write_text('{"bad_words_ids": [[320]]}')
    with pytest.raises(
        ModelError, match=r"a, generation_config.json or config.json: bad_words_ids holds 320"
    ):
        folder.load_model(tmp_path / "a")
    (tmp_path / "a" / generation.FILE).write_text("{")
    with pytest.raises(ModelError, match=r"generation_config.json cannot be read as JSON"):
        folder.load_model(tmp_path / "a")
