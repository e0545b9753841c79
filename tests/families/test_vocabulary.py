"""Tokenizers of folders without a tokenizer.json against transformers' classes, on text that is hard to split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import pre_tokenizers

from langmill.common.errors import ModelError
from langmill.families import vocabulary

TEXTS = [
    "The Café's naïve résumé, unaffable!",
    "語言模型 in 中文と日本語。한국어",
    "שלום עולם, مرحبا",
    "emoji 👩‍👩‍👧 🇩🇪 \u200b zero\u00a0width\ttab\r\nline",
    "e\u0301 I\u0307 ǅ ﬁ ½ \x00 \ufffd",
    "[MASK] [SEP] <mask> </s> <|endoftext|>",
    "",
    "  two  blanks ",
    "x" * 120,
]
PIECES = [
    "un",
    "##aff",
    "##able",
    "the",
    "The",
    "caf",
    "##é",
    "##e",
    "言",
    "語",
    "모델",
    "##'",
    "!",
    ",",
    "👩",
    "e",
]


def words_folder(where: Path, model_type: str = "bert", **settings: Any) -> Path:
    """A folder with WordPiece's vocabulary: special tokens, pieces, and most characters of the texts."""
    characters = sorted({c for text in TEXTS[:5] for c in text + text.lower() if not c.isspace()})
    entries = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *PIECES,
        *characters[::2],
        *(f"##{c}" for c in characters[::3]),
    ]
    where.mkdir()
    (where / "vocab.txt").write_text("\n".join(dict.fromkeys(entries)) + "\n", encoding="utf-8")
    (where / "config.json").write_text(json.dumps({"model_type": model_type}))
    if settings:
        (where / "tokenizer_config.json").write_text(json.dumps(settings))
    return where


def bytes_folder(where: Path, model_type: str, tokens: list[str], **settings: Any) -> Path:
    """A folder with byte-level BPE's vocabulary and a few merges."""
    merges = ["Ġ t", "h e", "Ġt he", "e m", "o j", "a f", "Ċ Ċ", "Ã ©", "ð Ł", "ðŁ ĳ"]
    entries = [
        *tokens,
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        *(merge.replace(" ", "") for merge in merges),
    ]
    where.mkdir()
    (where / "vocab.json").write_text(
        json.dumps({token: id for id, token in enumerate(entries)}), encoding="utf-8"
    )
    (where / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    (where / "config.json").write_text(json.dumps({"model_type": model_type}))
    if settings:
        (where / "tokenizer_config.json").write_text(json.dumps(settings))
    return where


def agree(where: Path, auto: type) -> None:
    """Ids of texts, alone, in a frame and in pairs, offsets, and text of ids, as transformers gives them."""
    theirs, ours = auto.from_pretrained(where), vocabulary.tokenizer_of(where)
    assert ours is not None and ours.vocab == theirs.get_vocab()
    for text in TEXTS:
        plain = theirs(text, add_special_tokens=False, return_offsets_mapping=True)
        assert ours.encode_with_offsets(text, specials=True) == (plain["input_ids"], plain["offset_mapping"])
        assert ours.decode(plain["input_ids"]) == theirs.decode(plain["input_ids"], skip_special_tokens=True)
        if ours.frame.stated:
            framed = theirs(text, "the end", return_token_type_ids=True)
            ids = [ours.encode_with_specials(part) for part in (text, "the end")]
            assert ours.frame.two(*ids).ids == framed["input_ids"]
            assert ours.frame.two(*ids).types == framed["token_type_ids"]
    ours.save(where)
    again = vocabulary.tokenizer_of(where)
    assert again is not None and again.fingerprint == ours.fingerprint


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_lower_case": False},
        {"do_lower_case": False, "strip_accents": True, "tokenizer_class": "BertTokenizer"},
        {"strip_accents": False, "tokenize_chinese_chars": False, "tokenizer_class": "BertTokenizerFast"},
        {"mask_token": {"content": "[MASK]", "lstrip": True, "__type": "AddedToken"}},
    ],
)
def test_word_pieces_agree_with_transformers(settings: dict[str, Any], tmp_path: Path) -> None:
    agree(words_folder(tmp_path / "m", **settings), transformers.BertTokenizerFast)


@pytest.mark.parametrize("settings", [{}, {"add_prefix_space": True}])
@pytest.mark.parametrize("model_type", ["roberta", "bart", "gpt2"])
def test_byte_level_agrees_with_transformers(
    model_type: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    tokens = ["<|endoftext|>"] if model_type == "gpt2" else ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    auto = transformers.GPT2TokenizerFast if model_type == "gpt2" else transformers.RobertaTokenizerFast
    if (
        model_type != "gpt2"
    ):  # as in the models' published files; transformers 5 forgets it where none is there
        mask = {
            "content": "<mask>",
            "lstrip": True,
            "rstrip": False,
            "normalized": False,
            "single_word": False,
        }
        settings = settings | {"mask_token": mask | {"__type": "AddedToken", "special": True}}
    agree(bytes_folder(tmp_path / "m", model_type, tokens, **settings), auto)


def test_added_tokens_keep_their_ids(tmp_path: Path) -> None:
    where = words_folder(tmp_path / "m", model_type="distilbert")
    size = len((where / "vocab.txt").read_text(encoding="utf-8").splitlines())
    (where / "added_tokens.json").write_text(json.dumps({"<b>": size + 1, "<a>": size}))
    agree(where, transformers.BertTokenizerFast)
    where = words_folder(tmp_path / "other")
    (where / "added_tokens.json").write_text(json.dumps({"<a>": size + 5}))
    with pytest.raises(
        ModelError, match=f"'<a>' has the id {size + 5}, but the vocabulary would give it {size}"
    ):
        vocabulary.tokenizer_of(where)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unk_token": "[NONE]"}, r"vocab\.txt: the unk_token is '\[NONE\]', which is not one of"),
        ({"cls_token": 3}, "cls_token is 3, not a token"),
        ({"do_lower_case": "no"}, "do_lower_case is 'no'; true or false"),
        ({"added_tokens_decoder": {"x": {}}}, "added tokens are not a table"),
    ],
)
def test_damaged_settings_are_named(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        vocabulary.tokenizer_of(words_folder(tmp_path / "m", **settings))


def test_other_classes_have_none_here(tmp_path: Path) -> None:
    """A vocab.txt or vocab.json of another kind of tokenizer is never read as if it were one of these."""
    assert (
        vocabulary.tokenizer_of(words_folder(tmp_path / "a", tokenizer_class="BertJapaneseTokenizer")) is None
    )
    assert vocabulary.tokenizer_of(bytes_folder(tmp_path / "b", "qwen2", ["<|endoftext|>"])) is None
    (tmp_path / "b/vocab.txt").write_text("\n")
    assert vocabulary.tokenizer_of(tmp_path / "b") is None
    broken = words_folder(tmp_path / "c")
    (broken / "vocab.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelError, match=r"vocab\.txt: it cannot be read"):
        vocabulary.tokenizer_of(broken)


def test_what_to_do_without_one(tmp_path: Path) -> None:
    assert "put the one that the model was trained with" in vocabulary.missing(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"")
    assert "spiece.model, which is not read here" in vocabulary.missing(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "marian"}))
    (tmp_path / "vocab.json").write_text("{}")
    assert "it lacks source.spm, target.spm: fetch it again" in vocabulary.missing(tmp_path)
