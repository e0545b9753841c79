"""Sentence vectors beside transformers and sentence-transformers: the same texts and weights, interleaved in one run.

    scripts/bench embedding [--texts 1000] [--rounds 5] [--threads 2]

MiniLM (asset `minilm`) on Debian's package descriptions (asset `ddtp`), of which 256 tokens at most are read.
transformers gets batches of 32 sorted by length, which is the faster of its ways; sentence-transformers is asked where
it is installed. Prints one JSON object: texts a second of each, the ratios, and the lowest cosine between ours and
theirs. It exits 1 where that is below 0.99999.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from numpy.typing import NDArray

from langmill.families.folder import load
from langmill.infer.read import embeddings
from langmill.text.tasks import Limit, encode_texts

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import assets

LENGTH, BATCH = 256, 32
Floats = NDArray[np.float32]


def ours(folder: Path) -> Callable[[list[str]], Floats]:
    model, tokenizer = load(folder)
    assert tokenizer is not None
    limit = Limit(LENGTH, "truncate")

    def run(texts: list[str]) -> Floats:
        return np.stack(list(embeddings(model, encode_texts(tokenizer, texts, limit, Counter()))))

    return run


def theirs(folder: Path) -> Callable[[list[str]], Floats]:
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()

    @torch.inference_mode()
    def run(texts: list[str]) -> Floats:
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        found = np.empty((len(texts), model.config.hidden_size), np.float32)
        for at in range(0, len(order), BATCH):
            group = order[at : at + BATCH]
            batch = tokenizer(
                [texts[i] for i in group],
                padding=True,
                truncation=True,
                max_length=LENGTH,
                return_tensors="pt",
            )
            hidden, mask = model(**batch).last_hidden_state, batch.attention_mask[..., None]
            found[group] = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).numpy()
        return found

    return run


def sentence_transformers(folder: Path) -> Callable[[list[str]], Floats]:
    from sentence_transformers import SentenceTransformer, models  # type: ignore[import-not-found]

    body = models.Transformer(str(folder), max_seq_length=LENGTH)
    pooling = models.Pooling(body.get_word_embedding_dimension())
    model = SentenceTransformer(modules=[body, pooling, models.Normalize()], device="cpu")
    return lambda texts: model.encode(texts, batch_size=BATCH, show_progress_bar=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder, rows = assets.fetch("minilm"), assets.fetch("ddtp") / "descriptions.jsonl"
    lines = rows.read_text(encoding="utf-8").splitlines()
    step = max(1, len(lines) // options.texts)
    texts = [json.loads(line)["text"] for line in lines[::step][: options.texts]]
    calls = {"langmill": ours(folder), "transformers": theirs(folder)}
    if importlib.util.find_spec("sentence_transformers"):
        calls["sentence_transformers"] = sentence_transformers(folder)
    rates: dict[str, list[float]] = {name: [] for name in calls}
    vectors: dict[str, Floats] = {}
    for round_ in range(options.rounds + 1):  # the first warms up, on a few
        some = texts if round_ else texts[:BATCH]
        for name, call in calls.items():
            began = time.perf_counter()
            vectors[name] = call(some)
            if round_:
                rates[name].append(len(some) / (time.perf_counter() - began))
    cosines = {name: float((vectors["langmill"] * other).sum(1).min()) for name, other in vectors.items()}
    ratios = {
        name: sorted(a / b for a, b in zip(rates["langmill"], own, strict=True))
        for name, own in rates.items()
        if name != "langmill"
    }
    figures = {
        "texts": len(texts),
        "texts_per_second": {name: statistics.median(own) for name, own in rates.items()},
        "ratio": {name: [own[0], statistics.median(own), own[-1]] for name, own in ratios.items()},
        "lowest_cosine": cosines,
    }
    print(json.dumps(figures))
    return 0 if min(cosines.values()) >= 0.99999 else 1


if __name__ == "__main__":
    sys.exit(main())
