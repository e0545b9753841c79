from pathlib import Path

import pytest

from langmill.common.errors import ModelError, UsageError
from langmill.common.settings import TokenizerInspectSettings, TokenizerTrainSettings
from langmill.jobs.tokenizer import coloured, find, inspect, train
from langmill.text.training import FIM, MASK, SPANS

TEXT = "The fox, 明月光 مرحبا 🙂\n"


def test_train_then_inspect(texts: Path, tmp_path: Path) -> None:
    made = TokenizerTrainSettings(path=[str(texts)], out=tmp_path / "tok", vocab_size=5000)
    report = train(made, quiet=True)
    assert report.counts["vocabulary"] < 5000 and "5,000 were asked for" in report.text
    with pytest.raises(UsageError):
        train(made, quiet=True)
    shown = inspect(TokenizerInspectSettings(tokenizer=str(tmp_path / "tok"), text=TEXT))
    assert shown.extra["lossless"] is True and shown.counts["bytes"] == len(TEXT.encode())
    assert shown.figures["bytes_per_token"] == pytest.approx(len(TEXT.encode()) / shown.counts["tokens"])
    assert "<|endoftext|> (0)" in shown.text and "明月光" in shown.text.replace(" ", "")
    same = inspect(TokenizerInspectSettings(tokenizer=str(tmp_path / "tok" / "tokenizer.json")))
    assert same.extra["fingerprint"] == shown.extra["fingerprint"] and "tokens" not in same.counts


def test_a_single_file_is_the_same_tokenizer(texts: Path, tmp_path: Path) -> None:
    for out in ("folder", "alone.json"):
        train(TokenizerTrainSettings(path=[str(texts)], out=tmp_path / out, vocab_size=300), quiet=True)
    whole, alone = (find(str(tmp_path / out)) for out in ("folder", "alone.json"))
    assert (tmp_path / "alone.json").is_file() and alone.fingerprint == whole.fingerprint
    assert (alone.start_id, alone.boundary_id, alone.pad_id) == (
        whole.start_id,
        whole.boundary_id,
        whole.pad_id,
    )
    again = TokenizerTrainSettings(path=[str(texts)], out=tmp_path / "alone.json", vocab_size=400)
    with pytest.raises(UsageError, match="exists already"):
        train(again, quiet=True)
    train(again.model_copy(update={"force": True}), quiet=True)
    assert find(str(tmp_path / "alone.json")).fingerprint != whole.fingerprint


def test_marks_are_there_for_what_pretraining_needs(texts: Path, tmp_path: Path) -> None:
    asked = TokenizerTrainSettings(
        path=[str(texts)], out=tmp_path / "tok", vocab_size=600, marks=["mask", "fim", "sentinels", "mask"]
    )
    train(asked, quiet=True)
    made = find(str(tmp_path / "tok"))
    marks = [made.vocab[mark] for mark in (MASK, *FIM)]
    assert made.mask_id == marks[0] and len(made.sentinel_ids) == SPANS and made.vocab_size <= 600
    assert {*marks, *made.sentinel_ids} <= set(made.special_ids)


def test_colours_show_every_token_and_whole_characters(texts: Path, tmp_path: Path) -> None:
    train(TokenizerTrainSettings(path=[str(texts)], out=tmp_path / "tok", vocab_size=300), quiet=True)
    tokenizer = find(str(tmp_path / "tok"))
    drawn = coloured(tokenizer, tokenizer.encode("a🙂b"))
    assert drawn.plain == "a🙂⟨4⟩b" and len(drawn.spans) == 3
    special = coloured(tokenizer, [tokenizer.boundary_id])
    assert special.plain == "<|endoftext|>" and special.spans[0].style == "white on red"


def test_what_is_no_tokenizer_says_so(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        find(str(tmp_path))
