"""English to German from scratch beside transformers' Seq2SeqTrainer: the same weights, pairs and steps, as JSON.

    scripts/bench translation [--steps 3000] [--out RESULTS.json]     both learn, then both translate: BLEU
    scripts/bench translation --rates [--rounds 3] [--steps 30]       tokens a second of both, interleaved
    scripts/bench translation --beams [--rounds 3] [--model FOLDER]   sentences a second of both, beam 5, interleaved

    [--size 7.5M] [--vocab 8000] [--batch 64] [--rate 7e-4] [--pairs N] [--peers PYTHON]

Package descriptions and office help (assets `ddtp-de`, `libreoffice-help`), 2,000 pairs held out; a group of nearly
equal sources stands on one side, and no text of a held-out pair, on either side of it, is learned. Both start from one
Marian of random weights and one vocabulary, made of the training pairs. Both use AdamW (0.9, 0.98), a cosine schedule,
clipping at 1, label smoothing 0.1, no dropout. The peer groups by length; its better number type counts. PYTHON belongs
to an environment with transformers, accelerate and datasets; the first use makes one in .venv-peers.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import assets
from _figures import said, spread, write_rows
from finetune import peers

from langmill.apps.translate import search
from langmill.common.configure import configure
from langmill.common.settings import FinetuneSettings, ModelSettings, TranslateSettings
from langmill.evaluate import overlap
from langmill.families.folder import load, save
from langmill.jobs import finetune
from langmill.jobs.size import config_for
from langmill.model.count import parameters
from langmill.model.init import init_
from langmill.model.transformer import Transformer
from langmill.text.tasks import Limit
from langmill.text.tokenizer import Tokenizer
from langmill.text.translate import encode_source, encode_target

ROOT = Path(__file__).resolve().parents[1]
PEER = ROOT / "benchmarks" / "peers" / "marian_trainer.py"
HELD, LENGTH = 2000, 128
TYPES = ("float32", "bfloat16")
Pair = tuple[str, str]


def pairs_of() -> list[tuple[str, Pair]]:
    """(group, (English, German)) of both sets."""
    found = []
    files = (("ddtp-de", "pairs.jsonl"), ("libreoffice-help", "en-de.jsonl"))
    for name, file in files:
        for line in (assets.fetch(name) / file).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            found.append((f"{name} {row['group']}", (row["translation"]["en"], row["translation"]["de"])))
    return found


def split(most: int | None) -> tuple[list[Pair], list[Pair]]:
    """(learned, held out): whole groups, and no text of a held-out pair among the learned."""
    groups: dict[str, list[Pair]] = {}
    for group, pair in pairs_of():
        groups.setdefault(group, []).append(pair)
    names = sorted(groups)
    random.Random(0).shuffle(names)
    held: list[Pair] = []
    while len(held) < HELD:
        held += groups.pop(names.pop())[: HELD - len(held)]
    taken = {text.casefold() for pair in held for text in pair}
    learned = [
        pair for name in names for pair in groups[name] if not taken & {text.casefold() for text in pair}
    ]
    return list(dict.fromkeys(learned))[:most], held


def prepared(given: argparse.Namespace, scratch: Path) -> tuple[list[Pair], dict[str, Any]]:
    """Write start/, train.jsonl, train.ids.jsonl and held.ids.jsonl; the held-out pairs and what there is."""
    learned, held = split(given.pairs)
    tokenizer = Tokenizer.train((text for pair in learned for text in pair), given.vocab)
    model, limit, counted = given.model, Limit(LENGTH), Counter[str]()
    if model:
        tokenizer = load(model)[1]
    else:
        shape = ModelSettings(family="marian", size=given.size)
        config = config_for(shape, tokenizer.vocab_size, 512, tokenizer.fill_id)
        fresh = Transformer(config)
        init_(fresh, 0)
        save(fresh, tokenizer, scratch / "start", replace=True)
        model = scratch / "start"
    rows, dropped = [], 0
    for english, german in learned:
        sizes = len(tokenizer.encode(english)), len(tokenizer.encode(german))
        dropped += max(sizes) >= LENGTH - 1
        if max(sizes) < LENGTH - 1:
            rows.append((english, german))
    held = [pair for pair in held if max(len(tokenizer.encode(text)) for text in pair) < LENGTH - 1]

    def ids(pair: Pair) -> dict[str, list[int]]:
        return {
            "input_ids": encode_source(tokenizer, pair[0], limit, counted).ids,
            "labels": encode_target(tokenizer, pair[1], limit, counted),
        }

    write_rows(scratch / "train.jsonl", [{"translation": {"en": en, "de": de}} for en, de in rows])
    write_rows(scratch / "train.ids.jsonl", map(ids, rows))
    write_rows(scratch / "held.ids.jsonl", map(ids, held))
    known = load(model)[0]
    assert isinstance(known, Transformer)
    about = {
        "learned": len(rows),
        "held_out": len(held),
        "left_out_as_too_long": dropped,
        "parameters": parameters(known.config),
        "vocabulary": tokenizer.vocab_size,
    }
    return held, about


def learn(given: argparse.Namespace, start: Path, scratch: Path, out: Path) -> dict[str, Any]:
    """`langmill finetune --task translate`, in a process of its own."""
    words = [
        f"max_steps={given.steps}", f"learning_rate={given.rate}", "warmup_ratio=0.1", "weight_decay=0", "beta2=0.98",
        f"threads={given.threads}", "compile=false", f"eval_every={given.steps}", "holdout=0.005",
        f"tasks.batch_size={given.batch}", "tasks.label_smoothing=0.1", "tasks.source=en", "tasks.target=de",
    ]  # fmt: skip
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import translation; translation.work()"
    job = json.dumps(
        {"model": str(start), "data": [str(scratch / "train.jsonl")], "out": str(out), "words": words}
    )
    return said([sys.executable, "-c", code, job])


def work() -> None:
    """One run of ours, told by the last word of the command line."""
    job = json.loads(sys.argv[-1])
    settings = configure(
        FinetuneSettings, None, job["words"], model=job["model"], task="translate", data=job["data"],
        out=Path(job["out"]),
    )  # fmt: skip
    figures = finetune.run(settings, quiet=False).figures
    tokens = figures["tokens_per_second"] * figures["training_seconds"]
    print(
        json.dumps(
            {"tokens": tokens, "seconds": figures["training_seconds"], "loss": figures["training_loss"]}
        )
    )


def theirs(given: argparse.Namespace, model: Path, pairs: Path, *words: object) -> dict[str, Any]:
    """The peer's script, in a process of its own."""
    return said([given.peers, PEER, model, pairs, "--threads", given.threads, *words])


def taught(given: argparse.Namespace, scratch: Path, dtype: str, *words: object) -> dict[str, Any]:
    steps = ("--steps", given.steps, "--batch", given.batch, "--rate", given.rate, "--dtype", dtype)
    return theirs(given, scratch / "start", scratch / "train.ids.jsonl", *steps, *words)


def rate(run: dict[str, Any]) -> float:
    return float(run["tokens"] / run["seconds"])


def rates(given: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Tokens a second, one run of each a round."""
    found: dict[str, list[float]] = {name: [] for name in ("langmill", *TYPES)}
    for number in range(given.rounds):
        found["langmill"].append(rate(learn(given, scratch / "start", scratch, scratch / f"rate-{number}")))
        for dtype in TYPES:
            found[dtype].append(rate(taught(given, scratch, dtype)))
        print({name: round(values[-1]) for name, values in found.items()}, file=sys.stderr)
    best = max(TYPES, key=lambda name: statistics.median(found[name]))
    over = [a / b for a, b in zip(found["langmill"], found[best], strict=True)]
    return {
        "tokens_per_second": {name: spread(values, 0) for name, values in found.items()},
        f"over_{best}": spread(over, 3),
    }


def translated(given: argparse.Namespace, model: Path, scratch: Path, count: int | None) -> dict[str, Any]:
    """Ours: ids of the translations of the held-out sources, beam 5, and the seconds."""
    lines = (scratch / "held.ids.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    sources = [json.loads(line)["input_ids"] for line in lines]
    network, tokenizer = load(model)
    assert isinstance(network, Transformer)
    torch.set_num_threads(given.threads)
    settings = TranslateSettings(model=str(model), beams=5)
    began = time.perf_counter()
    found = search(network.eval(), tokenizer, sources, settings, Counter())
    return {"seconds": time.perf_counter() - began, "ids": [own[0].ids for own in found]}


def beams(given: argparse.Namespace, model: Path, scratch: Path) -> dict[str, Any]:
    """Sentences a second with the same weights, and how many translations are the same."""
    count = given.sentences
    ours, others, same = [], {16: list[float](), 64: list[float]()}, 0
    for _ in range(given.rounds):
        mine = translated(given, model, scratch, count)
        ours.append(len(mine["ids"]) / mine["seconds"])
        for rows, values in others.items():
            words = ("--beams", 5, "--rows", rows, *(("--count", count) if count else ()))
            found = theirs(given, model, scratch / "held.ids.jsonl", *words)
            values.append(len(found["ids"]) / found["seconds"])
            same = sum(a == b for a, b in zip(mine["ids"], found["ids"], strict=True))
        print(
            round(ours[-1], 2),
            {rows: round(values[-1], 2) for rows, values in others.items()},
            file=sys.stderr,
        )
    best = max(others, key=lambda rows: statistics.median(others[rows]))
    return {
        "sentences": len(mine["ids"]),
        "same_translations": same,
        "sentences_per_second": {"langmill": spread(ours, 2)}
        | {f"transformers, {rows} at once": spread(values, 2) for rows, values in others.items()},
        "over_best": spread([a / b for a, b in zip(ours, others[best], strict=True)], 3),
    }


def quality(given: argparse.Namespace, held: list[Pair], scratch: Path) -> dict[str, Any]:
    """BLEU of both after as many steps, each by its own beam search."""
    mine = learn(given, scratch / "start", scratch, scratch / "ours")
    print(mine, file=sys.stderr)
    trained = taught(given, scratch, given.dtype, "--save", scratch / "theirs")
    print(
        {"tokens": trained["tokens"], "seconds": trained["seconds"], "loss": trained["losses"][-1]},
        file=sys.stderr,
    )
    tokenizer = load(scratch / "ours")[1]
    words = ("--beams", 5, "--rows", 16)
    written = {
        "langmill": translated(given, scratch / "ours", scratch, None)["ids"],
        "transformers": theirs(given, scratch / "theirs", scratch / "held.ids.jsonl", *words)["ids"],
    }
    texts = {name: [tokenizer.decode(one).strip() for one in ids] for name, ids in written.items()}
    wanted = [german for _, german in held]
    return {
        "steps": given.steps,
        "scores": {name: overlap.scores(overlap.counts(own, wanted)) for name, own in texts.items()},
        "examples": [[held[i][0], wanted[i], *(own[i] for own in texts.values())] for i in range(5)],
        "tokens_per_second": {"langmill": rate(mine), f"transformers {given.dtype}": rate(trained)},
        "tokens": {"langmill": mine["tokens"], "transformers": trained["tokens"]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rates", action="store_true")
    parser.add_argument("--beams", action="store_true")
    parser.add_argument("--model", type=Path, help="--beams: a folder trained before")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sentences", type=int, default=200, help="--beams: of the held-out ones")
    parser.add_argument("--size", default="7.5M")
    parser.add_argument("--vocab", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=7e-4)
    parser.add_argument("--pairs", type=int, help="so many learned pairs alone, to see that this file works")
    parser.add_argument(
        "--dtype", choices=TYPES, default="bfloat16", help="the peer's, where BLEU is measured"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers" / "bin" / "python")
    parser.add_argument("--keep", type=Path, help="work in this folder and leave it")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    given.steps = given.steps or (30 if given.rates else 3000)
    peers(given.peers)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        scratch = given.keep or Path(temporary)
        scratch.mkdir(parents=True, exist_ok=True)
        held, found = prepared(given, scratch)
        print(found, file=sys.stderr)
        if given.rates:
            found |= rates(given, scratch)
        elif given.beams:
            found |= beams(given, given.model or scratch / "start", scratch)
        else:
            found |= quality(given, held, scratch)
    print(json.dumps(found, ensure_ascii=False))
    if given.out:
        given.out.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
