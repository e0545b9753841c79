"""Shards give back every document, appear whole or not at all, and name the file that is damaged."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from langmill.common.errors import DataError, ModelError, UsageError
from langmill.data import shards as module
from langmill.data.pipeline import Ledger
from langmill.data.shards import Shards, write_shards
from langmill.text.document import Document, text_hash
from langmill.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["the cat sat on the mat. 你好，世界。\n"], 300)
TEXTS = [f"the cat {i} sat" * (1 + i % 7) for i in range(300)] + ["你好\x00", "x" * 900]


def documents(texts: list[str]) -> list[Document]:
    return [Document(f"file\n{i}", text, f"source {i % 2}") for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    folder = tmp_path_factory.mktemp("shards") / "s"
    return write_shards(documents(TEXTS), TOKENIZER, folder, shard_tokens=500)


def check(shards: Shards, texts: list[str], names: list[str]) -> None:
    assert shards.documents == len(texts) and shards.tokens == sum(len(TOKENIZER.encode(t)) for t in texts)
    assert shards.bytes == sum(len(t.encode()) for t in texts) == int(shards.bytes_of.sum())
    for i, text in enumerate(texts):
        assert shards.tokens_of(i).tolist() == TOKENIZER.encode(text)
        assert (int(shards.bytes_of[i]), int(shards.hashes[i])) == (len(text.encode()), text_hash(text))
        assert shards.id_of(i) == names[i]
    lengths = shards.lengths(np.arange(len(texts)))
    assert lengths.tolist() == [len(TOKENIZER.encode(text)) for text in texts]


def test_every_document_comes_back(written: Shards) -> None:
    check(written, TEXTS, [document.id for document in documents(TEXTS)])
    assert written.tokens_of(0).dtype == np.uint16 and written.fingerprint == TOKENIZER.fingerprint
    sizes = [entry["tokens"] for entry in written.manifest["shards"]]
    assert max(sizes[:-1]) <= 500 < sizes[-1] and len(sizes) > 10  # the last document is longer than a shard
    check(
        Shards.open(written.folder, expected=TOKENIZER.fingerprint), TEXTS, [d.id for d in documents(TEXTS)]
    )


@given(
    texts=st.lists(st.text("ab \n你", max_size=12), max_size=30),
    limit=st.integers(1, 20),
    batch=st.integers(1, 40),
)
def test_any_documents_come_back_and_the_ledger_adds_up(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], limit: int, batch: int
) -> None:
    folder = tmp_path_factory.mktemp("any") / "s"
    kept = [text for text in texts if text and not text.isspace()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BATCH_BYTES", batch)
        if not kept:
            with pytest.raises(DataError, match="no document was left"):
                write_shards(documents(texts), TOKENIZER, folder, shard_tokens=limit)
            assert list(folder.parent.iterdir()) == []
            return
        shards = write_shards(documents(texts), TOKENIZER, folder, shard_tokens=limit)
    check(shards, kept, [f"file\n{i}" for i, text in enumerate(texts) if text and not text.isspace()])
    ledger = shards.ledger
    assert ledger["read"]["documents"] == len(texts) and ledger["kept"]["documents"] == len(kept)
    dropped = [count["documents"] for count in ledger["dropped"].values()]
    assert sum(dropped) == len(texts) - len(kept)


def test_a_large_vocabulary_needs_wider_numbers(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    from langmill.text.specials import Specials

    vocab = {f"w{i}": i for i in range(70_000)} | {"cat": 70_000}
    tokenizer = Tokenizer(Backend(models.WordLevel(vocab, unk_token="w0")), Specials(eos=1))
    shards = write_shards(documents(["cat"]), tokenizer, tmp_path / "s")
    assert shards.tokens_of(0).tolist() == [70_000] and shards.tokens_of(0).dtype == np.uint32


def damage(file: Path, how: str) -> None:
    data = bytearray(file.read_bytes())
    if how == "altered":
        data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data[:-1] if how == "cut" else data))


@pytest.mark.parametrize("name", ["tokens-00003.bin", "index.bin", "ids.jsonl"])
def test_a_damaged_file_is_named(written: Shards, tmp_path: Path, name: str) -> None:
    for how, says in (("cut", "holds"), ("altered", "was altered"), ("gone", "is missing")):
        folder = tmp_path / how
        folder.mkdir()
        for file in written.folder.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / name).unlink() if how == "gone" else damage(folder / name, how)
        with pytest.raises(DataError, match=f"{name} {says}"):
            Shards.open(folder)
    assert Shards.open(tmp_path / "altered", verify=False).documents == written.documents
    (folder / "shards.json").write_text('{"format": "shards", "version": 99}')
    with pytest.raises(DataError, match="version 99"):
        Shards.open(folder)


def test_another_tokenizer_is_refused(written: Shards) -> None:
    other = Tokenizer.train(["something else entirely"], 300)
    with pytest.raises(ModelError) as error:
        Shards.open(written.folder, expected=other.fingerprint)
    assert other.fingerprint[:12] in str(error.value) and written.fingerprint[:12] in str(error.value)


def test_the_folder_is_whole_or_absent(tmp_path: Path) -> None:
    def failing() -> Iterator[Document]:
        yield from documents(TEXTS)
        raise DataError("the disk is gone")

    with pytest.raises(DataError, match="disk is gone"):
        write_shards(failing(), TOKENIZER, tmp_path / "s")
    assert list(tmp_path.iterdir()) == []
    write_shards(documents(["a"]), TOKENIZER, tmp_path / "s")
    with pytest.raises(UsageError, match="exists already"):
        write_shards(documents(["b"]), TOKENIZER, tmp_path / "s")
    assert write_shards(documents(["b c"]), TOKENIZER, tmp_path / "s", replace=True).bytes == 3
    code = (
        "import itertools; from langmill.data.shards import *; from langmill.text.tokenizer import Tokenizer;"
        "t = Tokenizer.train(['a b c'], 300); print('ready', flush=True);"
        "docs = (Document(str(i), 'a b c ' * 99, 's') for i in itertools.count());"
        f"write_shards(docs, t, {str(tmp_path / 'killed')!r}, on_batch=lambda d, b: print(d, flush=True))"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=env)
    assert process.stdout is not None
    process.stdout.readline(), process.stdout.readline()
    process.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
    process.communicate()
    assert not (tmp_path / "killed").exists()
    assert write_shards(documents(["again"]), TOKENIZER, tmp_path / "killed").documents == 1


def test_equal_texts_stand_on_one_side_and_no_side_is_empty(tmp_path: Path) -> None:
    def split(texts: list[str], share: float) -> tuple[list[int], list[int]]:
        shards = write_shards(documents(texts), TOKENIZER, tmp_path / "s", replace=True)
        train, held = shards.split(share)
        assert sorted([*train, *held]) == list(range(len(texts)))
        assert not {texts[i] for i in train} & {texts[i] for i in held}
        return train.tolist(), held.tolist()

    texts = [f"text {i % 500}" for i in range(1000)]
    assert 60 < len(split(texts, 0.1)[1]) < 140
    assert split(texts, 0)[1] == []
    assert len(split(["a", "b"], 0.001)[1]) == 1 and len(split(["a", "b"], 0.999)[0]) == 1
    assert split(["a", "a"], 0.5) == ([0, 1], [])
    few, many = set(split(texts, 0.05)[1]), set(split(texts, 0.2)[1])
    assert few < many  # more held out never moves a held-out text into training


def test_a_ledger_of_the_readers_is_carried_on(tmp_path: Path) -> None:
    ledger = Ledger()
    for document in documents(["a", " ", "b"]):
        ledger.take(document.source, len(document.text))
    ledger.reject("source 1", "row 9", "broken JSON", 4)
    progress: list[tuple[int, int]] = []
    shards = write_shards(
        documents(["a", " ", "b"]),
        TOKENIZER,
        tmp_path / "s",
        ledger=ledger,
        on_batch=lambda d, b: progress.append((d, b)),
    )
    assert (
        progress == [(3, 3)]
        and json.loads((tmp_path / "s" / "shards.json").read_text())["ledger"] == shards.ledger
    )
    assert set(shards.ledger["dropped"]) == {"no text in it", "broken JSON"}
