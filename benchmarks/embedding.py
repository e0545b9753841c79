"""Sentence vectors beside transformers and sentence-transformers: the same texts and weights, interleaved in one run.

    scripts/bench embedding [--texts 1000] [--rounds 5] [--threads 2] [--peers PYTHON]

MiniLM (asset `minilm`) on Debian's package descriptions (asset `ddtp`), of which 256 tokens at most are read.
transformers gets batches of 32 sorted by length, which is the faster of its ways. sentence-transformers, at batches of
32 as well, runs in a process of its own, of PYTHON: that belongs to an environment which has it, and the first use
makes one in .venv-peers. It times itself, and waits while the others work. `langmill_8_bits` is `langmill embed
--bits 8`. Prints one JSON object: texts a second of each, the ratios of both to the peers and to the faster peer, the
lowest cosine of a text's vectors, ours and theirs, and the mean and lowest of those in 8 bits to ours in float32. It
exits 1 where a vector in float32 is below 0.99999, or those in 8 bits below 0.995 in the mean or 0.98.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from _figures import HUBLESS, spread
from finetune import peers
from numpy.typing import NDArray

from langmill.families.folder import load
from langmill.infer.native_embed import NativeEmbedder, eight_bits
from langmill.infer.read import embeddings
from langmill.text.tasks import Limit, encode_texts

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import assets

ROOT = Path(__file__).resolve().parents[1]
OWN, PEER = ROOT / ".venv-peers" / "bin" / "python", ROOT / "benchmarks" / "peers" / "sentence_vectors.py"
PACKAGE = "sentence-transformers==6.2.0"
LENGTH, BATCH = 256, 32
Floats = NDArray[np.float32]


def ours(folder: Path) -> Callable[[list[str]], Floats]:
    model, tokenizer = load(folder)
    assert tokenizer is not None
    limit = Limit(LENGTH, "truncate")

    def run(texts: list[str]) -> Floats:
        return np.stack(list(embeddings(model, encode_texts(tokenizer, texts, limit, Counter()))))

    return run


def ours_in_8_bits(folder: Path) -> Callable[[list[str]], Floats]:
    model, tokenizer = load(folder)
    assert tokenizer is not None
    eight_bits(model)
    limit, embedder = Limit(LENGTH, "truncate"), NativeEmbedder(model)

    def run(texts: list[str]) -> Floats:
        found = encode_texts(tokenizer, texts, limit, Counter())
        return embedder.embed([np.array(document.ids, np.int64) for document in found])

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


def equipped(python: Path) -> None:
    """Make the peers' environment where it is not there, with sentence-transformers; SystemExit where another's own
    environment lacks it."""
    peers(python)
    asked = "import importlib.util as u, sys; sys.exit(u.find_spec('sentence_transformers') is None)"
    if subprocess.run([python, "-c", asked]).returncode == 0:
        return
    words = [str(python), "-m", "pip", "install", "-c", str(ROOT / "constraints.txt"), PACKAGE]
    if python != OWN:
        raise SystemExit(f"{python} has no sentence-transformers: {' '.join(words)}")
    print("installing sentence-transformers into .venv-peers", file=sys.stderr)
    subprocess.run([*words, "-q"], check=True)


@contextmanager
def sentence_transformers(
    options: argparse.Namespace, folder: Path, texts: list[str]
) -> Iterator[Callable[[int], tuple[float, Floats]]]:
    """What reads so many of the texts, from the first: (seconds, vectors), by the peer's own process."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        given, out = Path(scratch) / "texts.json", Path(scratch) / "vectors.npy"
        given.write_text(json.dumps(texts), encoding="utf-8")
        words = [options.peers, PEER, folder, given, out]
        words += ["--length", LENGTH, "--batch", BATCH, "--threads", options.threads]
        process = subprocess.Popen(
            [*map(str, words)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=HUBLESS
        )
        assert process.stdin is not None and process.stdout is not None
        asked, told = process.stdin, process.stdout

        def run(count: int) -> tuple[float, Floats]:
            print(count, file=asked, flush=True)
            found: dict[str, Any] = json.loads(told.readline() or "{}")
            if not found:
                raise SystemExit("sentence-transformers ended before it answered: its message stands above")
            return found["seconds"], np.load(out)

        try:
            yield run
        finally:
            asked.close()
            process.wait()


def timed(call: Callable[[list[str]], Floats], texts: list[str]) -> Callable[[int], tuple[float, Floats]]:
    """The same for what runs in this process."""

    def run(count: int) -> tuple[float, Floats]:
        began = time.perf_counter()
        vectors = call(texts[:count])
        return time.perf_counter() - began, vectors

    return run


def cosines(ours: Floats, theirs: Floats) -> NDArray[np.float64]:
    """The cosine of the two vectors of each text."""
    a, b = (np.asarray(side, np.float64) for side in (ours, theirs))
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def over(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """The spread of the ratios, round by round."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)], 3)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", type=Path, default=OWN)
    options = parser.parse_args()
    equipped(options.peers)
    torch.set_num_threads(options.threads)
    folder, rows = assets.fetch("minilm"), assets.fetch("ddtp") / "descriptions.jsonl"
    lines = rows.read_text(encoding="utf-8").splitlines()
    step = max(1, len(lines) // options.texts)
    texts = [json.loads(line)["text"] for line in lines[::step][: options.texts]]
    made = {"langmill": ours, "langmill_8_bits": ours_in_8_bits, "transformers": theirs}
    calls = {name: timed(make(folder), texts) for name, make in made.items()}
    vectors: dict[str, Floats] = {}
    with sentence_transformers(options, folder, texts) as peer:
        calls["sentence_transformers"] = peer
        rates: dict[str, list[float]] = {name: [] for name in calls}
        for round_ in range(options.rounds + 1):  # the first warms up, on a few
            count = len(texts) if round_ else min(BATCH, len(texts))
            for name, call in calls.items():
                seconds, vectors[name] = call(count)
                if round_:
                    rates[name].append(count / seconds)
    own = ("langmill", "langmill_8_bits")
    others = [name for name in calls if name not in own]
    faster = max(others, key=lambda name: statistics.median(rates[name]))
    lowest = {name: float(cosines(vectors["langmill"], vectors[name]).min()) for name in others}
    eight = cosines(vectors["langmill"], vectors["langmill_8_bits"])
    figures = {
        "texts": len(texts),
        "threads": options.threads,
        "texts_per_second": {name: spread(each, 1) for name, each in rates.items()},
        "ratio": {name: {peer: over(rates[name], rates[peer]) for peer in others} for name in own},
        "faster_peer": faster,
        "over_faster": {name: over(rates[name], rates[faster]) for name in own},
        "eight_over_float": over(rates["langmill_8_bits"], rates["langmill"]),
        "lowest_cosine": lowest,
        "cosine_8_bits": {"mean": float(eight.mean()), "min": float(eight.min())},
    }
    print(json.dumps(figures))
    return 0 if min(lowest.values()) >= 0.99999 and eight.mean() >= 0.995 and eight.min() >= 0.98 else 1


if __name__ == "__main__":
    sys.exit(main())
