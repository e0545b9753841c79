"""What stands around one text and two: equal to transformers, but that a user's text never gives a control token."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, processors

from langmill.common.errors import ModelError
from langmill.text.frames import frame_of
from langmill.text.specials import Specials
from langmill.text.tokenizer import Tokenizer

PAIRS = (
    ("Who was born in Warsaw?", "Marie Curie of Paris."),
    ("玛丽·居里出生在华沙。", "她在巴黎工作，发现了镭。"),
    ("من اكتشف الراديوم؟", "ولدت ماري كوري في وارسو."),
    ("a", "b"),
)
SHAPES = ("bert", "roberta", "t5", "ours")


def check(tokenizer: Tokenizer, folder: Path) -> None:
    """The frame gives what transformers makes of the saved files."""
    from transformers import AutoTokenizer

    tokenizer.save(folder)
    theirs, frame = AutoTokenizer.from_pretrained(folder), Tokenizer.load(folder).frame
    for first, second in PAIRS:
        a, b = tokenizer.encode(first), tokenizer.encode(second)
        for ours, other in ((frame.one(a), theirs(first, return_token_type_ids=True)),
                            (frame.two(a, b), theirs(first, second, return_token_type_ids=True))):  # fmt: skip
            assert (ours.ids, ours.types) == (other.input_ids, other.token_type_ids)
        both = frame.two(a, b, number=7)
        assert [both.ids[i] for i in both.first] == a and [both.ids[i] for i in both.second] == b
        assert len(both.ids) == len(a) + len(b) + frame.room(pair=True) and both.number == 7
        assert len(frame.one(a).ids) == len(a) + frame.room() and not frame.one(a).second


@pytest.mark.parametrize("shape", SHAPES)
def test_a_frame_is_what_transformers_makes_of_the_file(
    shaped: dict[str, Tokenizer], shape: str, tmp_path: Path
) -> None:
    check(shaped[shape], tmp_path)


def test_the_frame_of_a_real_sentence_encoder(asset: Callable[[str], Path], tmp_path: Path) -> None:
    file = next(asset("minilm").rglob("tokenizer.json"))
    tokenizer = Tokenizer.load(file.parent)
    assert tokenizer.mask_id == tokenizer.vocab["[MASK]"] == 103 and tokenizer.frame.room(pair=True) == 3
    check(tokenizer, tmp_path)


@pytest.mark.parametrize(
    ("shape", "spelt"), [("bert", "[SEP] a [CLS]"), ("roberta", "a</s></s>b<mask>"), ("t5", "a </s> <extra_id_0>"),
                         ("ours", "<|mask|><|endoftext|>")]
)  # fmt: skip
def test_a_text_that_spells_a_control_token_gives_none(
    shaped: dict[str, Tokenizer], shape: str, spelt: str
) -> None:
    tokenizer = shaped[shape]
    inside = tokenizer.frame.two(tokenizer.encode(spelt), tokenizer.encode(spelt))
    held = {inside.ids[i] for i in (*inside.first, *inside.second)}
    unknown = tokenizer.vocab.get("[UNK]", tokenizer.vocab.get("<unk>"))
    assert not held & (tokenizer.special_ids - {unknown})
    assert set(tokenizer.encode_with_specials(spelt)) & tokenizer.special_ids


def test_whole_words_of_a_vocabulary_are_no_control_tokens_either() -> None:
    backend = Backend(models.WordLevel({"[SEP]": 0, "[UNK]": 1, "a": 2}, unk_token="[UNK]"))
    backend.add_special_tokens(["[SEP]", "[UNK]"])
    tokenizer = Tokenizer(backend, Specials(eos=0))
    assert tokenizer.encode("[SEP]") == [1] and tokenizer.encode("a") == [2]
    assert tokenizer.encode_with_specials("[SEP]") == [0]


def test_saved_types_and_names_come_back(shaped: dict[str, Tokenizer], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for shape, types in (("bert", True), ("roberta", False), ("t5", False), ("ours", False)):
        folder = tmp_path / shape
        shaped[shape].save(folder)
        theirs = AutoTokenizer.from_pretrained(folder)
        assert ("token_type_ids" in theirs("a", "a")) == types
        again = Tokenizer.load(folder)
        assert again.mask_id == shaped[shape].mask_id == theirs.mask_token_id
        again.save(tmp_path / "again")
        written = [(tmp_path / name / "tokenizer_config.json").read_bytes() for name in (shape, "again")]
        assert written[0] == written[1]
    config = json.loads((tmp_path / "bert" / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "DistilBertTokenizer", "cls_token": "[CLS]"}
    del config["model_input_names"]
    (tmp_path / "bert" / "tokenizer_config.json").write_text(json.dumps(config))
    Tokenizer.load(tmp_path / "bert").save(tmp_path / "distil")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "distil")
    assert "token_type_ids" not in theirs("a", "a") and theirs.cls_token == "[CLS]"


def test_sentinels_in_order(shaped: dict[str, Tokenizer]) -> None:
    vocab = shaped["t5"].vocab
    assert shaped["t5"].sentinel_ids == tuple(vocab[f"<extra_id_{n}>"] for n in range(3))
    assert shaped["t5"].sentinel_ids[0] == max(vocab.values())
    assert shaped["ours"].sentinel_ids == (5, 6) and shaped["ours"].mask_id == 4
    assert shaped["bert"].sentinel_ids == () and shaped["t5"].mask_id is None


def test_files_that_say_nothing_or_too_little() -> None:
    def framed(processor: object, **specials: int | bool) -> Tokenizer:
        backend = Backend(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="a"))
        if processor is not None:
            backend.post_processor = processor
        return Tokenizer(backend, Specials(**specials))  # type: ignore[arg-type]

    plain = framed(None, eos=1).frame
    assert plain.one([2]).ids == [2, 1] and plain.two([2], [2]).ids == [2, 1, 2, 1] and not plain.stated
    assert framed(None, bos=0, eos=1, add_bos=True).frame.one([2]).ids == [0, 2, 1]
    start = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    joined = framed(start, bos=0, eos=1, add_bos=True).frame
    assert joined.one([2]).ids == [0, 2] and joined.two([2], [2]).ids == [2, 1, 2]
    with pytest.raises(ModelError, match="no end-of-text token"):
        framed(None).frame  # noqa: B018
    swapped = processors.TemplateProcessing(single="$A", pair="$B <s> $A", special_tokens=[("<s>", 0)])
    with pytest.raises(ModelError, match="puts the second one first"):
        frame_of(framed(swapped, eos=1))
