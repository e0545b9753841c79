import gzip
import json

import numpy as np
import pytest

from langmill.common.errors import DataError, ModelError
from langmill.common.settings import DataSettings, EvaluateSettings
from langmill.data.pipeline import Ledger
from langmill.data.readers import read
from langmill.data.shards import write_shards
from langmill.evaluate.loss import Encoded, score
from langmill.families import folder as folders
from langmill.jobs import evaluate
from langmill.model.config import Head, ModelConfig, StackConfig, Tokens
from langmill.model.init import init_
from langmill.model.transformer import Transformer
from langmill.text.tokenizer import Tokenizer

TEXTS = [f"Sentence number {i} of the text. 第{i}句。" * (1 + i % 7) for i in range(30)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = Tokenizer.train(TEXTS, vocab_size=320)
    stack = StackConfig(dim=16, layers=1, heads=2, kv_heads=2, head_dim=8, hidden=24)
    model = Transformer(ModelConfig(stack, Tokens(tokenizer.vocab_size, 48), head=Head(tokenizer.vocab_size)))
    init_(model, 0)
    where = tmp_path_factory.mktemp("models") / "model"
    folders.save(model, tokenizer, where)
    return str(where)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "rows.jsonl"
    lines = [json.dumps({"text": text}) for text in TEXTS] + ["{broken", '{"title": 1}', '{"text": "  "}']
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def run(folder, *on, **settings):
    return evaluate.run(
        EvaluateSettings(model=folder, on=list(map(str, on)), device="cpu", **settings), quiet=True
    )


def test_it_scores_every_document_and_sets_bad_rows_aside(folder, rows):
    report = run(folder, rows)
    model, tokenizer = folders.load(folder)
    encoded = [Encoded(str(i), tokenizer.encode(text), len(text.encode())) for i, text in enumerate(TEXTS)]
    expected = score(model, encoded, start_id=tokenizer.start_id, length=48)
    assert report.figures["loss"] == pytest.approx(expected.loss)
    assert report.figures["bits_per_byte"] == pytest.approx(expected.bits_per_byte)
    assert report.figures["bits_per_byte_interval"] == pytest.approx(list(expected.bits_per_byte_interval))
    assert report.counts == {
        "documents": 30, "tokens": expected.tokens, "bytes": sum(len(t.encode()) for t in TEXTS), "set_aside": 3,
    }  # fmt: skip
    data = "".join(TEXTS).encode()
    assert report.figures["gzip_bits_per_byte"] == pytest.approx(
        8 * len(gzip.compress(data, 9)) / len(data), rel=0.01
    )
    ledger = report.extra["ledger"]
    assert ledger["read"]["documents"] == 33 and ledger["kept"]["documents"] == 30
    assert "broken JSON" in report.text and "bits per byte" in report.text
    json.dumps([report.counts, report.figures, report.extra])


def test_the_held_out_documents_are_those_that_training_leaves_out(folder, rows, tmp_path):
    data = DataSettings(holdout=0.3)
    _, tokenizer = folders.load(folder)
    shards = write_shards(
        read([rows], data, ledger := Ledger()), tokenizer, tmp_path / "shards", ledger=ledger
    )
    held = shards.split(0.3)[1]
    assert 0 < len(held) < 30
    report = run(folder, rows, split="held_out", data=data)
    assert report.counts["documents"] == len(held)
    assert report.counts["bytes"] == shards.bytes_of[held].sum(dtype=np.int64)
    words = "".join(TEXTS[i] for i in held).encode()  # row i of the file is document i
    assert report.figures["gzip_bits_per_byte"] == pytest.approx(
        8 * len(gzip.compress(words, 9)) / len(words), rel=0.05
    )
    of_shards = run(folder, tmp_path / "shards", split="held_out", data=data)
    assert of_shards.figures["loss"] == pytest.approx(report.figures["loss"])
    assert "gzip_bits_per_byte" not in of_shards.figures
    with pytest.raises(DataError, match="none is held out with data.holdout=0"):
        run(folder, rows, split="held_out", data=DataSettings(holdout=0))


def test_shards_of_another_tokenizer_are_refused(folder, rows, tmp_path):
    other = Tokenizer.train(["something else entirely"], vocab_size=280)
    documents = read([rows], DataSettings(), ledger := Ledger())
    write_shards(documents, other, tmp_path / "shards", ledger=ledger)
    with pytest.raises(ModelError, match="tokenizer"):
        run(folder, tmp_path / "shards")


def test_nothing_to_score_is_an_error(folder, tmp_path):
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    with pytest.raises(DataError):
        run(folder, tmp_path / "empty.txt")
