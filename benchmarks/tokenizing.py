"""JSONL to token shards, beside Hugging Face's encoder doing the same work, interleaved in one run.

    python benchmarks/tokenizing.py [--jsonl FILE] [--megabytes 96] [--runs 5]

Peer: rows by `json.loads`, `Tokenizer.encode_batch` (all processors), ids appended to one file. Ours: the
readers with their checks, the ledger, hashes, index, checksums and shards, all flushed to the disk. Both
use the tokenizer trained here on the same file. The ids of every document are compared. Prints one JSON
object; the ratio is ours over the peer's in the same round.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from _figures import spread
from tokenizers import Tokenizer as Backend

from langmill.common.settings import DataSettings
from langmill.data.pipeline import Ledger
from langmill.data.readers import read
from langmill.data.shards import Shards, write_shards
from langmill.jobs.manual import manual
from langmill.text.tokenizer import Tokenizer

SCRIPTS = ("你好，世界。今天天气很好。", "مرحبا بالعالم، هذا نص عربي.", "😀👍🏽 emoji", "हिन्दी में लिखा हुआ पाठ")


def generate(file: Path, size: int) -> None:
    """Sentences of CPython's own manual in new orders, with other scripts among them: no line repeats."""
    rng = random.Random(0)
    words = " ".join(document.text for document in manual().documents).split(" ")
    written = 0
    with open(file, "w", encoding="utf-8") as out:
        while written < size:
            start = rng.randrange(len(words) - 400)
            text = " ".join(words[start : start + rng.randrange(20, 300)])
            if rng.random() < 0.1:
                text += " " + rng.choice(SCRIPTS) * rng.randrange(1, 20)
            row = json.dumps({"id": written, "text": f"{rng.randrange(10**6)} {text}"}, ensure_ascii=False)
            written += out.write(row + "\n")


def peer(file: Path, tokenizer: Tokenizer, folder: Path) -> None:
    """What a user of `tokenizers` writes: 1,000 rows at a time."""
    backend = Backend.from_str(tokenizer.to_json())
    backend.encode_special_tokens = True  # text stays text, as on our side
    with (
        open(file, encoding="utf-8") as rows,
        open(folder / "ids.bin", "wb") as out,
        open(folder / "lengths.txt", "w") as lengths,
    ):
        batch: list[str] = []
        for row in rows:
            batch.append(json.loads(row)["text"])
            if len(batch) == 1000:
                _write(backend, batch, out, lengths)
                batch = []
        _write(backend, batch, out, lengths)


def _write(backend, batch, out, lengths) -> None:  # type: ignore[no-untyped-def]
    for encoding in backend.encode_batch(batch, add_special_tokens=False):
        out.write(np.array(encoding.ids, dtype=np.uint16).tobytes())
        lengths.write(f"{len(encoding.ids)}\n")


def ours(file: Path, tokenizer: Tokenizer, folder: Path) -> None:
    tokenizer = copy.copy(tokenizer)  # nothing learnt in the round before
    ledger = Ledger(folder / "errors.jsonl")
    documents = read([file], DataSettings(), ledger)
    write_shards(documents, tokenizer, folder / "shards", ledger=ledger)


def same_ids(theirs: Path, shards: Shards) -> bool:
    """Whether every document has the same ids on both sides."""
    ids = np.fromfile(theirs / "ids.bin", dtype=np.uint16)
    lengths = np.loadtxt(theirs / "lengths.txt", dtype=np.int64)
    if len(lengths) != shards.documents or not np.array_equal(
        lengths, shards.lengths(np.arange(len(lengths)))
    ):
        return False
    mine = np.concatenate([shards.tokens_of(i) for i in range(shards.documents)])
    return np.array_equal(ids, mine)


def timed(
    work: Callable[[Path, Tokenizer, Path], None], file: Path, tokenizer: Tokenizer, folder: Path
) -> float:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    start = time.perf_counter()
    work(file, tokenizer, folder)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jsonl", type=Path, help='rows {"text"}; none: generated')
    parser.add_argument("--megabytes", type=int, default=96, help="size of the generated file")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--vocab-size", type=int, default=8192)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        file = given.jsonl or Path(scratch, "rows.jsonl")
        if given.jsonl is None:
            generate(file, given.megabytes * 10**6)
        texts = (document.text for document in read([file], DataSettings(), Ledger()))
        tokenizer = Tokenizer.train(texts, given.vocab_size, sample_bytes=8 << 20)
        sides = {"tokenizers": Path(scratch, "peer"), "langmill": Path(scratch, "ours")}
        seconds: dict[str, list[float]] = {"tokenizers": [], "langmill": []}
        for _ in range(given.runs):
            seconds["tokenizers"].append(timed(peer, file, tokenizer, sides["tokenizers"]))
            seconds["langmill"].append(timed(ours, file, tokenizer, sides["langmill"]))
        shards = Shards.open(sides["langmill"] / "shards")
        megabytes = file.stat().st_size / 1e6
        ratios = [a / b for a, b in zip(seconds["tokenizers"], seconds["langmill"], strict=True)]
        result = {
            "benchmark": "JSONL to token shards",
            "encoder": tokenizer.bulk.note,
            "megabytes": round(megabytes, 1),
            "documents": shards.documents,
            "tokens": shards.tokens,
            "same_ids": same_ids(sides["tokenizers"], shards),
            "megabytes_per_second": {
                name: spread([megabytes / t for t in times], 2) for name, times in seconds.items()
            },
            "ratio": spread(ratios, 2),
        }
    print(json.dumps(result))
    if not result["same_ids"]:
        raise SystemExit("the ids differ")


if __name__ == "__main__":
    main()
