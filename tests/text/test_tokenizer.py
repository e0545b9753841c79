"""Tokenizer: lossless, never a control token from a user's text, foreign files, streaming, transformers."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from langmill.common.errors import DataError, ModelError, UsageError
from langmill.text.specials import Specials
from langmill.text.tokenizer import Tokenizer
from langmill.text.training import SPECIALS

TEXTS = (
    "The quick brown fox doesn't jump over the lazy dogs' 1234 fences.\n\nTwice, says she.\n" * 3,
    "你好，世界。今天天气很好，我们去公园玩。",
    "مرحبا بالعالم، هذا نص عربي قصير. שלום עולם",
    "def f(x):\n\treturn x ** 2  # squared\n\n\nclass A:\n    pass\n",
    "नमस्ते दुनिया, e\u0301\u0301 \u0301x 😀👩\u200d👩\u200d👧 \x00\x01\x7f\r\n \u3000\u2028 ",
)
HARD = (
    *TEXTS, "", " ", "  a ", "\r\n", "\x00", "\ufeff", "\ufffd", "\U0010ffff", "\u0301", "a" * 70_000,
    " " * 5000, "你" * 5000, "=" * 5000, "\n" * 5000, *SPECIALS, "<|endoftext|> and <|im_end|>",
)  # fmt: skip
KINDS = ("bpe", "wordpiece", "unigram")


@pytest.fixture(scope="module")
def trained() -> dict[str, Tokenizer]:
    return {kind: Tokenizer.train(TEXTS, 620, kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@given(st.text() | st.text("ab <|endoftx>\u0301你😀\r\n\x00'sS9"))
def test_any_text_comes_back_whole(trained: dict[str, Tokenizer], kind: str, text: str) -> None:
    tokenizer = trained[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_specials=False) == tokenizer.decode(ids) == text
    assert not tokenizer.special_ids & set(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_hard_texts_come_back_whole_and_long_words_are_no_trap(
    trained: dict[str, Tokenizer], kind: str
) -> None:
    tokenizer = trained[kind]
    for text in HARD:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and not tokenizer.special_ids & set(ids)
    assert tokenizer.specials.pad != tokenizer.eos_id and tokenizer.pad_id == 1
    assert tokenizer.start_id == tokenizer.boundary_id == tokenizer.eos_id == 0
    assert tokenizer.encode_with_specials("<|im_start|>a<|im_end|>")[0::2] == [2, 3]
    assert tokenizer.prompt_ids("") == [0] and tokenizer.prompt_ids("a") == [0, *tokenizer.encode("a")]


@pytest.mark.parametrize("kind", KINDS)
@given(ids=st.lists(st.integers(0, 630), max_size=40))
def test_streamed_pieces_join_to_the_whole(trained: dict[str, Tokenizer], kind: str, ids: list[int]) -> None:
    tokenizer = trained[kind]
    stream = tokenizer.stream()
    pieces = [stream.push(id) for id in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)


def test_a_streamed_piece_never_splits_a_character(trained: dict[str, Tokenizer]) -> None:
    tokenizer = Tokenizer.train(["abc"], 300)  # every other character is several tokens
    stream = tokenizer.stream()
    pieces = [stream.push(id) for id in tokenizer.encode("a你😀b")]
    assert [piece for piece in pieces if piece] == ["a", "你", "😀", "b"]
    assert stream.flush() == ""
    assert [stream.push(id) for id in tokenizer.encode("你")[:2]] == ["", ""] and stream.flush() == "\ufffd"


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_what_is_saved(trained: dict[str, Tokenizer], kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    specials = Specials(
        bos=0, eos=0, pad=1, add_bos=True, chat_template="{{ bos_token }}{{ messages[0].content }}"
    )
    tokenizer = Tokenizer(Backend.from_str(trained[kind].to_json()), specials)
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for theirs in (
        AutoTokenizer.from_pretrained(tmp_path),
        PreTrainedTokenizerFast.from_pretrained(tmp_path),
    ):
        for text in TEXTS:
            assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
            assert theirs(text).input_ids == tokenizer.prompt_ids(text)
            assert theirs.decode(tokenizer.encode(text)) == text
        assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 0, 1)
        assert theirs.chat_template == tokenizer.chat_template and len(theirs) == tokenizer.vocab_size
    again = Tokenizer.load(tmp_path)
    again.save(tmp_path / "again")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()
    assert again.fingerprint == tokenizer.fingerprint == pickle.loads(pickle.dumps(again)).fingerprint  # noqa: S301
    assert copy.copy(again).specials == again.specials and again.specials.add_bos


def sentencepiece_like() -> Backend:
    """BPE with byte fallback and "▁" for spaces, as in Llama 2's file."""
    letters = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"helowrd,.",
        "ll",
        "▁w",
    ]
    vocab = {piece: id for id, piece in enumerate(letters)}
    model = models.BPE(vocab, [("l", "l"), ("▁", "w")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = Backend(model)
    backend.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")]
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def test_a_sentencepiece_like_file(tmp_path: Path) -> None:
    backend = sentencepiece_like()
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, None)
    assert tokenizer.start_id == 1 and tokenizer.boundary_id == 2 and tokenizer.stop_ids == {2}
    text = "hello, world. 你 hello </s> <s>"
    ids = tokenizer.encode(text)
    assert len(ids) > 9 and not {0, 1, 2} & set(ids) and tokenizer.decode(ids) == text
    stream = tokenizer.stream()
    pieces = [stream.push(id) for id in [1, *ids, 2]]
    assert "".join(pieces) + stream.flush() == text and "你" in pieces
    stream = tokenizer.stream()
    broken = [tokenizer.vocab["<0xE4>"]] * 20  # never a character: it must not be held for ever
    assert "".join(stream.push(id) for id in broken) != ""


@given(st.lists(st.text("hello wrd,.你é", max_size=8)))
def test_streaming_spaces_right_in_a_sentencepiece_like_file(words: list[str]) -> None:
    tokenizer = Tokenizer(SP, Specials(bos=1, eos=2))
    ids = tokenizer.encode(" ".join(words))
    stream = tokenizer.stream()
    assert "".join(stream.push(id) for id in ids) + stream.flush() == tokenizer.decode(ids)


SP = sentencepiece_like()


def test_a_special_piece_of_a_unigram_file_is_no_special_in_text() -> None:
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -9.0) for letter in "▁</s>ab")]
    backend = Backend(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens([AddedToken("</s>", special=True), AddedToken("<unk>", special=True)])
    tokenizer = Tokenizer(backend, Specials(eos=1))
    assert 1 not in tokenizer.encode("a</s>b") and tokenizer.decode(tokenizer.encode("a</s>b")) == "a</s>b"
    assert 1 in tokenizer.encode_with_specials("a</s>b")


def folder(path: Path, tokenizer: Tokenizer, **files: Any) -> Path:
    path.mkdir()
    (path / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return path


def test_the_companions_of_a_file(trained: dict[str, Tokenizer], tmp_path: Path) -> None:
    bpe = trained["bpe"]
    named = {"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}
    chat = Tokenizer.load(
        folder(
            tmp_path / "chat",
            bpe,
            tokenizer_config={
                "eos_token": {"content": "<|im_end|>"},
                "bos_token": None,
                "add_bos_token": False,
                "chat_template": named,
                "model_max_length": 99,
            },
            special_tokens_map={"pad_token": "<|pad|>", "eos_token": "<|pad|>"},
            generation_config={"eos_token_id": [3, 2]},
        )
    )
    assert (chat.bos_id, chat.eos_id, chat.pad_id, chat.boundary_id, chat.start_id) == (None, 3, 1, 0, 0)
    assert (
        chat.stop_ids == {0, 2, 3} and chat.chat_template == "D" and chat.prompt_ids("a") == chat.encode("a")
    )
    chat.save(tmp_path / "again")
    again = Tokenizer.load(tmp_path / "again")
    assert (again.eos_id, again.pad_id, again.chat_template) == (3, 1, "D")
    assert json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())["model_max_length"] == 99
    for length, reads in ((64, 64), (512, 99)):  # no more than the model reads, nor than was said
        chat.save(tmp_path / "again", length)
        assert (
            json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())["model_max_length"]
            == reads
        )
    base = Tokenizer.load(
        folder(
            tmp_path / "base",
            bpe,
            tokenizer_config={"chat_template": "<|im_end|>"},
            config={"eos_token_id": 0},
        )
    )
    assert base.stop_ids == {0, 3}  # a template's end of turn ends a turn


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("tokenizer.json", b"{", "tokenizer.json is not a tokenizer.json that can be read"),
        ("tokenizer.json", b"\xff\xfe", "tokenizer.json is not a tokenizer.json"),
        ("tokenizer_config.json", b"[1]", "tokenizer_config.json holds no JSON object"),
        ("tokenizer_config.json", b'{"a', "tokenizer_config.json cannot be read as JSON"),
        ("tokenizer_config.json", b'{"eos_token": "<nope>"}', 'eos_token is "<nope>"'),
        ("tokenizer_config.json", b'{"pad_token": {"content": [5]}}', "pad_token is {'content': [5]}"),
        ("tokenizer_config.json", b"[" * 200_000, "tokenizer_config.json cannot be read as JSON"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja is not UTF-8"),
    ],
)
def test_a_broken_file_is_named(
    trained: dict[str, Tokenizer], tmp_path: Path, file: str, content: bytes, says: str
) -> None:
    trained["bpe"].save(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ModelError) as error:
        Tokenizer.load(tmp_path)
    assert says in str(error.value) and str(tmp_path) in str(error.value)


def test_a_file_on_which_the_library_panics_is_refused(trained: dict[str, Tokenizer], tmp_path: Path) -> None:
    trained["bpe"].save(tmp_path)
    content = json.loads(trained["bpe"].to_json())
    content["post_processor"]["single"] = [{"Sequence": {"id": "B", "type_id": 0}}]  # there is no second text
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ModelError, match="damaged"):
        Tokenizer.load(tmp_path)


def test_errors(trained: dict[str, Tokenizer], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        Tokenizer.load(tmp_path)
    with pytest.raises(DataError, match=r"half a surrogate pair \(character 1, U\+D800\)"):
        trained["bpe"].encode("a\ud800")
    with pytest.raises(ModelError, match=r"\[9999\] lie outside"):
        Tokenizer(Backend.from_str(trained["bpe"].to_json()), Specials(eos=9999))
    with pytest.raises(ModelError, match="no end-of-text token"):
        Tokenizer(Backend(models.BPE()), Specials()).boundary_id  # noqa: B018


def test_added_tokens_that_are_no_control_tokens_stay_tokens() -> None:
    backend = Backend(models.BPE({"a": 0, "b": 1, " ": 2}, []))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s"), "isolated")
    backend.add_tokens([AddedToken("  ", special=False, normalized=False)])
    assert Tokenizer(backend, Specials(eos=0)).encode("a  b") == [0, 3, 1]
