"""Filling gaps: pretrain a small model by infilling, then fill gaps of one to eight words in texts it never read.

    scripts/bench infill [--size 1M] [--vocabulary 2000] [--steps 4000] [--gaps 500] [--threads 2] [--keep FOLDER]
        [KEY=VALUE ...]

Texts: descriptions of packages (asset `ddtp`). Of each gap: nats a token of its right filling, by the same model, with
the text behind it, with that of another gap, and as plain text goes on, without any; and whether the likeliest text
fills it word for word. Exit code 1 where the right text behind the gap does not help more than another. Prints one JSON
object. What is in FOLDER is not made again.
KEY=VALUE: other settings of the pretraining.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from langmill.common.configure import configure
from langmill.common.settings import PretrainSettings
from langmill.evaluate.labels import interval
from langmill.families.folder import load
from langmill.infer.choices import likelihoods
from langmill.infer.running import writer
from langmill.infer.sampling import Sampling
from langmill.jobs import pretrain
from langmill.model.config import gap_order
from langmill.text.infill import gap_ids

sys.path.insert(0, str(Path(__file__).parent.parent))
import assets

HELD, ROOM = 500, 24


def gaps(texts: list[str], count: int) -> list[tuple[str, str, str]]:
    """(before, filling, after): the filling is one to eight words with the space before them."""
    found, lot = [], random.Random(0)
    for text in texts:
        words = list(re.finditer(r"\s+\S+", text[:400]))
        if len(words) > 30:
            first = lot.randrange(8, len(words) - 16)
            last = words[first + lot.randrange(8)]
            found.append(
                (
                    text[: words[first].start()],
                    text[words[first].start() : last.end()],
                    text[last.end() : 500],
                )
            )
    return found[:count]


def learned(given: argparse.Namespace) -> tuple[Any, Any, list[str]]:
    """The model, its tokenizer and all rows, the first 2 × HELD of which it never read."""
    lines = (assets.fetch("ddtp") / "descriptions.jsonl").read_text(encoding="utf-8").splitlines()
    random.Random(0).shuffle(lines)
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "model").exists():
            (folder / "texts.jsonl").write_text("\n".join(lines[2 * HELD :]), encoding="utf-8")
            words = [
                "objective=infill", f"size={given.size}", f"max_steps={given.steps}", "max_length=256",
                f"tokenizer.vocab_size={given.vocabulary}", f"threads={given.threads}", *given.settings,
            ]  # fmt: skip
            asked = configure(
                PretrainSettings, None, words, path=[str(folder / "texts.jsonl")], out=folder / "model"
            )
            pretrain.run(asked, quiet=False)
        model, tokenizer = load(folder / "model")
    return model, tokenizer, lines


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="1M")
    parser.add_argument("--vocabulary", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--gaps", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_args()
    model, tokenizer, lines = learned(given)
    torch.set_num_threads(given.threads)
    chosen = gaps([json.loads(line)["text"] for line in lines[: 2 * HELD]], given.gaps)
    prompts = [gap_ids(tokenizer, before, after, gap_order(model.config)) for before, _, after in chosen]
    orders, logs, sizes = (
        gap_order(model.config),
        dict[str, list[float]](with_=[], another=[], without=[]),
        list[int](),
    )
    for number, (before, filling, _) in enumerate(chosen):
        ids, another = tokenizer.encode(filling), chosen[number - 1][2]
        starts = {
            "with_": prompts[number],
            "another": gap_ids(tokenizer, before, another, orders),
            "without": [*tokenizer.prompt_ids(""), *tokenizer.encode(before)],
        }
        for name, start in starts.items():
            logs[name].append(likelihoods(model, start, [ids])[0].log)
        sizes.append(len(ids))
    texts = [""] * len(chosen)
    write = writer(model, tokenizer, 16, max(map(len, prompts)) + ROOM)
    for events in write(prompts, Sampling(max_new_tokens=ROOM, temperature=0.0)):
        for event in events:
            texts[event.request] += event.text
    nats, sizes_N = {name: -np.array(own) for name, own in logs.items()}, np.array(sizes)

    def gain(other: str) -> Any:
        def difference(rows: Any) -> float:
            return float((nats[other][rows] - nats["with_"][rows]).sum() / sizes_N[rows].sum())

        return interval(difference, len(chosen))

    right = [text == filling for text, (_, filling, _) in zip(texts, chosen, strict=True)]
    examples = [
        {"before": before[-60:], "filled": text, "right": filling, "after": after[:60]}
        for text, (before, filling, after) in list(zip(texts, chosen, strict=True))[:8]
    ]
    figures = {
        "gaps": len(chosen),
        "nats_a_token": {name.strip("_"): own.sum() / sizes_N.sum() for name, own in nats.items()},
        "gain_over_another": gain("another"),
        "gain_over_none": gain("without"),
        "word_for_word": float(np.mean(right)),
        "examples": examples,
    }
    print(json.dumps(figures, ensure_ascii=False))
    least = figures["gain_over_another"]
    return 0 if least is not None and least[0] > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
