"""Tokenizers as GGUF metadata: our reader makes the same ids of it, and what llama.cpp does not know is named."""

from __future__ import annotations

import json
import unicodedata
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from langmill.common.errors import ModelError
from langmill.families.gguf_tokenizer import build
from langmill.families.gguf_write_tokenizer import NORMALIZER, entries
from langmill.text.specials import Specials
from langmill.text.tokenizer import Tokenizer


def byte_level(
    *cuts: Any, whole: bool = False, merges: tuple[tuple[str, str], ...] = (("h", "e"), ("he", "l"))
) -> Backend:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, "<|endoftext|>", *(a + b for a, b in merges)]
    backend = Backend(
        models.BPE({token: id for id, token in enumerate(tokens)}, list(merges), ignore_merges=whole)
    )
    steps = list(cuts) or [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    return backend


PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def there_and_back(tokenizer: Tokenizer, rows: int | None = None) -> Tokenizer:
    found = build(entries(tokenizer, rows or tokenizer.vocab_size), Path("x.gguf"))
    assert found is not None
    return found


def trained() -> Tokenizer:
    texts = [
        "the river is long and the boats went by, 12 of them",
        "床前明月光，疑是地上霜。",
        "مرحبا بالعالم",
    ] * 3
    return Tokenizer.train(texts, 400, specials=["<|mask|>", "<|fim_prefix|>"])


OURS = trained()
BACK = there_and_back(OURS, 410)


@given(text=st.text(max_size=40) | st.text("the river ,12'\n é床مر<|im_end|>", max_size=40))
def test_a_tokenizer_trained_here_gives_the_same_ids(text: str) -> None:
    text = unicodedata.normalize("NFC", text)
    assert BACK.encode(text) == OURS.encode(text) and BACK.prompt_ids(text) == OURS.prompt_ids(text)
    assert BACK.encode_with_specials(text) == OURS.encode_with_specials(text)


def test_what_begins_ends_and_pads_comes_back() -> None:
    assert (BACK.bos_id, BACK.eos_id, BACK.pad_id) == (OURS.bos_id, OURS.eos_id, OURS.pad_id)
    assert BACK.stop_ids >= OURS.stop_ids and BACK.special_ids == OURS.special_ids
    made = entries(OURS, 410)
    assert made["tokenizer.ggml.pre"] == "qwen35" and made[NORMALIZER] == "none"
    assert len(made["tokenizer.ggml.tokens"]) == len(set(made["tokenizer.ggml.tokens"])) == 410
    assert made["tokenizer.ggml.token_type"][OURS.vocab_size :] == [5] * (410 - OURS.vocab_size)


def test_bos_is_left_to_the_template_where_chats_do_not_begin_with_it() -> None:
    chatty = OURS.with_template("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}")
    assert entries(OURS, 400)["tokenizer.ggml.add_bos_token"] is True
    made = entries(chatty, 400)
    assert made["tokenizer.ggml.add_bos_token"] is False
    assert made["tokenizer.ggml.eot_token_id"] == OURS.vocab["<|im_end|>"]
    assert made["tokenizer.chat_template"] == chatty.chat_template
    begun = OURS.with_template("{{ bos_token }}{{ messages[0].content }}")
    assert entries(begun, 400)["tokenizer.ggml.add_bos_token"] is True


TABLE = yaml.safe_load(resources.files("langmill.families").joinpath("pretokenizers.yaml").read_text("utf-8"))


@pytest.mark.parametrize("name", TABLE["names"])
def test_every_pre_tokenizer_that_is_read_is_found_again(name: str) -> None:
    entry = TABLE["names"][name]
    metadata = entries(Tokenizer(byte_level(), Specials(eos=256)), 259) | {"tokenizer.ggml.pre": name}
    read_back = build(metadata, Path("x.gguf"))
    assert read_back is not None
    made = entries(read_back, 259)
    again = TABLE["names"][made["tokenizer.ggml.pre"]]
    for key in ("normalizer", "whole"):
        assert again.get(key) == entry.get(key)
    assert TABLE["patterns"][again["use"]] == TABLE["patterns"][entry["use"]] and NORMALIZER not in made


@pytest.mark.parametrize(
    ("cuts", "name"),
    [
        ([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)], "smollm"),
        ([pre_tokenizers.Split(Regex(TABLE["patterns"]["qwen2"][0]), "isolated"), PLAIN], "deepseek-r1-qwen"),
        ([pre_tokenizers.Split(Regex(TABLE["patterns"]["llama3"][0]), "removed", invert=True), PLAIN], "dbrx"),
        ([pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
          pre_tokenizers.Split(Regex("[一-龥぀-ゟ゠-ヿ]+"), "isolated"),
          pre_tokenizers.Split(Regex(TABLE["patterns"]["deepseek-v3"][2]), "isolated"), PLAIN], "deepseek-v3"),
    ],
)  # fmt: skip
def test_pipelines_as_their_makers_write_them(cuts: list[Any], name: str) -> None:
    ours = Tokenizer(byte_level(*cuts), Specials(eos=256))
    assert entries(ours, 259)["tokenizer.ggml.pre"] == name
    text = "hello 12345, 床前 he's\n\n  x"
    assert there_and_back(ours).encode(text) == ours.encode(text)


def changed(**changes: Any) -> Tokenizer:
    content = json.loads(byte_level().to_str()) | changes
    return Tokenizer(Backend.from_str(json.dumps(content)), Specials(eos=256))


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        (lambda: Tokenizer.train(["a b c"], 700, "wordpiece"), "WordPiece"),
        (lambda: Tokenizer.train(["a b c"], 300, "unigram"), "Unigram"),
        (lambda: Tokenizer(byte_level(pre_tokenizers.Split(Regex("x+"), "isolated"), PLAIN), Specials(eos=256)),
         "no pre-tokenizer with these cuts"),
        (lambda: Tokenizer(byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)), Specials(eos=256)),
         "cuts text"),
        (lambda: Tokenizer(byte_level(pre_tokenizers.Split(" ", "merged_with_next"), PLAIN), Specials(eos=256)),
         "cuts text"),
        (lambda: changed(normalizer=json.loads(normalizers.Lowercase().__getstate__())), "no normalizer Lowercase"),
        (lambda: nameless(), "no token that ends"),
        (lambda: Tokenizer(byte_level(), Specials(eos=256, stops=frozenset({65, 66, 67}))), "room for two tokens"),
        (lambda: Tokenizer(sentencepiece(pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
                           Specials(eos=1)), "writes spaces as SentencePiece"),
        (lambda: Tokenizer(sentencepiece(merges=[("a", "b")]), Specials(eos=1)), "not those of SentencePiece"),
        (lambda: Tokenizer(sentencepiece(merges=[("a", "b"), ("ab", "c"), ("b", "c"), ("a", "bc")]), Specials(eos=1)),
         "not those of SentencePiece"),
    ],
)  # fmt: skip
def test_tokenizers_that_llama_cpp_does_not_know(tokenizer: Any, words: str) -> None:
    found = tokenizer()
    with pytest.raises(ModelError, match=words):
        entries(found, found.vocab_size)


def nameless() -> Tokenizer:
    backend = Backend(models.BPE({"a": 0}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return Tokenizer(backend, Specials())


def sentencepiece(
    cut: Any = None, merges: Any = (("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc"))
) -> Backend:
    tokens = [
        "<unk>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "a",
        "b",
        "c",
        "ab",
        "bc",
        "abc",
    ]
    backend = Backend(
        models.BPE(
            {token: id for id, token in enumerate(tokens)},
            list(merges),
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    if cut is None:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
        backend.decoder = decoders.Sequence(steps)
    else:
        backend.pre_tokenizer = cut
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ("<unk>", "</s>")]
    )
    return backend


SPM = Tokenizer(sentencepiece(), Specials(eos=1))
SPM_BACK = there_and_back(SPM, 300)


@given(text=st.text(alphabet="aabbcc é</s>", max_size=24))
def test_sentencepiece_gives_the_same_ids(text: str) -> None:
    assert SPM_BACK.encode(text) == SPM.encode(text)
    assert SPM_BACK.decode(SPM_BACK.encode(text)) == SPM.decode(SPM.encode(text))


def test_sentencepiece_without_a_space_before_the_text() -> None:
    bare = Tokenizer(
        sentencepiece(pre_tokenizers.Metaspace(prepend_scheme="never", split=False)), Specials(eos=1)
    )
    assert entries(bare, 300)["tokenizer.ggml.add_space_prefix"] is False
    assert there_and_back(bare).encode("ab c") == bare.encode("ab c") != SPM.encode("ab c")
    made = entries(SPM, 300)
    assert made["tokenizer.ggml.token_type"][:3] == [2, 3, 6] and made["tokenizer.ggml.unknown_token_id"] == 0
