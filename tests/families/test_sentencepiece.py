"""SentencePiece's files against SentencePiece, and Marian's two of them against transformers' MarianTokenizer."""

from __future__ import annotations

import copy
import io
import json
import random
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from langmill.apps import translate
from langmill.apps.texts import Row
from langmill.common.configure import configure
from langmill.common.errors import ModelError
from langmill.common.settings import TranslateSettings
from langmill.families import folder, vocabulary
from langmill.families import sentencepiece as files
from langmill.text.tasks import Limit
from langmill.text.tokenizer import Tokenizer
from langmill.text.translate import encode_target

ENGLISH = "the quick brown fox jumps over lazy dogs while seven wizards mix cold juice and zebras play violins (1.23)"
GERMAN = (
    "der flinke braune Fuchs springt über faule Hunde während sieben Zauberer kühlen Saft mischen, größer ß é"
)
TEXTS = [
    "the quick fox", "  two   spaces ", "tab\tline\nbreak\u00a0x", "", " ", "\u2581x \u2581",
    "e\u0301 \ufb01 \u00bd", "</s> <pad> <unk>", "größer über", "wizards\u2019 \u4e2d x\u65e5y", ">>deu<< the fox",
    "A\x00b", "x" * 99,
]  # fmt: skip
NAMED = {"tokenizer_class": "MarianTokenizer", "source_lang": "en", "target_lang": "de"}


def trained(text: str, size: int, **how: Any) -> bytes:
    """A model file, taught on sentences of the words of `text`."""
    words, chance, out = text.split(), random.Random(0), io.BytesIO()
    lines: Iterable[str] = [" ".join(chance.choices(words, k=9)) for _ in range(300)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, vocab_size=size, num_threads=1, minloglevel=2,
        hard_vocab_limit=False, **how,
    )  # fmt: skip
    return out.getvalue()


@pytest.fixture(scope="module")
def marian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like opus-mt's, with a random model."""
    where = tmp_path_factory.mktemp("marian") / "m"
    where.mkdir()
    pieces: set[str] = set()
    for name, text in (("source", ENGLISH), ("target", GERMAN)):
        (where / f"{name}.spm").write_bytes(data := trained(text, 90))
        own = sentencepiece.SentencePieceProcessor(model_proto=data)
        pieces |= {own.id_to_piece(id) for id in range(3, own.get_piece_size())}
    entries = ["</s>", "<unk>", *sorted(pieces), ">>deu<<", ">>nds<<", "<pad>"]
    (where / "vocab.json").write_text(json.dumps({piece: id for id, piece in enumerate(entries)}))
    (where / "tokenizer_config.json").write_text(json.dumps(NAMED))
    pad = len(entries) - 1
    torch.manual_seed(0)
    config = transformers.MarianConfig(
        vocab_size=len(entries), d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, eos_token_id=0,
        pad_token_id=pad, decoder_start_token_id=pad, forced_eos_token_id=None, scale_embedding=True,
    )  # fmt: skip
    model = transformers.MarianMTModel(config)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data.normal_(1.0 if weight.dim() == 1 else 0.0, 0.25)
    model.generation_config.bad_words_ids = [[pad]]
    model.save_pretrained(where)
    return where


def t5(where: Path, data: bytes, **named: Any) -> Path:
    where.mkdir()
    (where / "spiece.model").write_bytes(data)
    (where / "config.json").write_text(json.dumps({"model_type": "t5"}))
    (where / "tokenizer_config.json").write_text(json.dumps(named))
    return where


PLACES = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bytes": {"byte_fallback": True},
    "as it is": {"normalization_rule_name": "identity"},
    "folded": {"normalization_rule_name": "nmt_nfkc_cf", "user_defined_symbols": ["fox", "\u00a7"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_cut_as_sentencepiece_cuts_them(kind: str, tmp_path: Path) -> None:
    data = trained(ENGLISH, 400 if kind == "bytes" else 110, **PLACES, **KINDS[kind])
    tokenizer = vocabulary.tokenizer_of(t5(tmp_path / "t5", data, extra_ids=3))
    own = sentencepiece.SentencePieceProcessor(model_proto=data)
    assert tokenizer is not None and tokenizer.vocab_size == own.get_piece_size() + 3
    assert tokenizer.sentinel_ids == tuple(own.get_piece_size() + place for place in (2, 1, 0))
    assert (tokenizer.eos_id, tokenizer.pad_id) == (1, 0)

    for text in TEXTS:
        if (
            kind == "as it is" and "\u2581" in text
        ):  # where it is kept it is no space there, but it is one here
            continue
        assert tokenizer.encode(text) == own.encode(text), text
        if 2 not in (ids := own.encode(text)):
            assert tokenizer.decode(ids) == own.decode(ids)


def test_random_texts(tmp_path: Path) -> None:
    data = trained(ENGLISH, 110, **PLACES)
    tokenizer = vocabulary.tokenizer_of(t5(tmp_path / "t5", data))
    own = sentencepiece.SentencePieceProcessor(model_proto=data)
    assert tokenizer is not None

    @settings(max_examples=300, deadline=None)
    @given(
        st.text(st.characters(codec="ascii") | st.sampled_from("\u2581\u00a0\u3000äß日。ＡＢ"), max_size=40)
    )
    def same(text: str) -> None:
        assert tokenizer.encode(text) == own.encode(text)

    same()


def test_two_languages_are_cut_each_by_its_own_pieces(marian: Path, tmp_path: Path) -> None:
    theirs, ours = transformers.MarianTokenizer.from_pretrained(marian), vocabulary.tokenizer_of(marian)
    assert ours is not None and ours.target is not ours and ours.target.target is ours.target
    ours.save(tmp_path)
    reloaded, generic = Tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert reloaded.fingerprint == ours.fingerprint != replace_target(ours).fingerprint
    for text in [*TEXTS, ENGLISH, GERMAN]:
        if "</s>" in text:  # what a user spells is text
            assert not {*ours.encode(text), *ours.target.encode(text)} & {ours.eos_id, ours.pad_id}
            continue
        source, target = theirs(text)["input_ids"], theirs(text_target=text)["input_ids"]
        if 1 in source:  # a run of unknown characters is one token there, some here
            continue
        assert generic(text)["input_ids"] == source
        for own in (ours, reloaded, copy.deepcopy(ours)):
            assert [*own.encode(text), 0] == source, text
            if target != [0] and 1 not in target:
                assert encode_target(own, text, Limit(200), Counter()) == target
            assert own.decode(source).strip() == theirs.decode(source, skip_special_tokens=True)
            assert own.decode(target).strip() == theirs.decode(target, skip_special_tokens=True)


def replace_target(tokenizer: Tokenizer) -> Tokenizer:
    return Tokenizer(tokenizer._backend, replace(tokenizer.specials, target=None))


def test_a_model_of_two_languages_translates_as_in_transformers(marian: Path) -> None:
    theirs, model = (
        kind.from_pretrained(marian) for kind in (transformers.MarianTokenizer, transformers.MarianMTModel)
    )
    rows = theirs([ENGLISH], return_tensors="pt")
    out = model.generate(**rows, num_beams=2, max_new_tokens=12)[0]
    ours, tokenizer = folder.load(marian)
    assert tokenizer is not None
    asked = configure(TranslateSettings, None, [], model=str(marian), beams=2, max_new_tokens=12)
    [found] = translate.reader(asked, ours, tokenizer)([Row("a", ENGLISH, {})], Counter())
    assert found["translation"] == theirs.decode(out, skip_special_tokens=True) != ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda at: (at / "source.spm").write_bytes(b""),
            r"source\.spm is no SentencePiece model .* it holds no pieces",
        ),
        (
            lambda at: (at / "target.spm").write_bytes(b"\x0a\xff"),
            r"target\.spm is no SentencePiece model .* ends",
        ),
        (
            lambda at: (at / "target.spm").write_bytes(trained(ENGLISH, 60, model_type="bpe")),
            r"target\.spm is no .* not of the unigram kind",
        ),
        (
            lambda at: (at / "target.spm").write_bytes(trained(ENGLISH, 60, add_dummy_prefix=False)),
            r"target\.spm is no .* do not begin with a space",
        ),
        (
            lambda at: (at / "vocab.json").write_text('{"</s>": 0, "<unk>": 2}'),
            r"vocab\.json: the ids are not those",
        ),
        (
            lambda at: (at / "vocab.json").write_text('{"</s>": 0, "a": "b"}'),
            r"vocab\.json: the ids are not those",
        ),
        (
            lambda at: (at / "vocab.json").write_text('{"</s>": 0}'),
            r"unk_token is '<unk>', which is not one of the 1",
        ),
        (
            lambda at: (at / "tokenizer_config.json").write_text('{"separate_vocabs": true}'),
            "a vocabulary for each language is not read here",
        ),
    ],
)
def test_damage_is_named(change: Any, message: str, marian: Path, tmp_path: Path) -> None:
    shutil.copytree(marian, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    change(tmp_path / "m")
    with pytest.raises(ModelError, match=message):
        vocabulary.tokenizer_of(tmp_path / "m")


def test_any_bytes_are_read_or_refused(tmp_path: Path) -> None:
    good = trained(ENGLISH, 60)

    @settings(max_examples=300, deadline=None)
    @given(st.binary(max_size=40), st.integers(0, len(good) - 1), st.integers(0, 300))
    def whole(noise: bytes, at: int, keep: int) -> None:
        for data in (noise, good[:at], good[:at] + noise + good[at + keep :]):
            (tmp_path / "x").write_bytes(data)
            try:
                own = files.read(tmp_path / "x")
            except ModelError as error:
                assert str(tmp_path / "x") in str(error)
            else:
                files.unigram(own, [*own.pieces, "<none>"], ["<none>"], "<none>").encode(ENGLISH)

    whole()
