"""Labels and answers that no model was taught, beside transformers and lm-evaluation-harness on the same weights.

    scripts/bench zero_shot topic    [--rows N]             20 newsgroups' test by MiniLM's similarity to written labels
    scripts/bench zero_shot choices  [--rows N] [--shots K] CommonsenseQA and PIQA by SmolLM2's likelihood

    [--threads 2] [--keep FOLDER]

topic: `langmill classify --labels "computer graphics" ...` on the first 512 tokens of each text (assets `minilm` and
`newsgroups`), beside vectors that plain transformers makes of the same texts (the mean of the last states). Accuracies
with 95 % bootstrap intervals, how often both say the same label, and how near the two labels were where they do not.
It exits 1 where these were further apart than 0.0001 of a cosine.

choices: `langmill evaluate` (asset `questions`) beside lm-evaluation-harness, which builds its own prompts and asks its
own model class over transformers, with float32 weights that Langmill saved from the GGUF file (asset `smollm2`). With
--shots the last 50 rows of a set are asked by nobody: the examples are drawn from these. It exits 1 where a prompt
differs, a score, or a log-likelihood by more than 0.001 nats.

Prints one JSON object. Both sides go through the rows in parts; what they said of a part is kept in FOLDER, and what is
there is not asked again: a bench that was stopped goes on. --rows: so many rows alone, evenly over the file.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _figures import read_rows, write_rows
from numpy.typing import NDArray

import langmill
from langmill.apps import classify
from langmill.apps.zero_shot import SHARPNESS
from langmill.common.configure import configure
from langmill.common.settings import ClassifySettings, EvaluateSettings
from langmill.data.pipeline import Ledger
from langmill.evaluate.labels import interval
from langmill.jobs import evaluate, evaluate_rows

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import assets

Rows = list[dict[str, Any]]
PART, POOL, LENGTH, BATCH = 250, 50, 512, 32
SETS = ("commonsenseqa", "piqa")
TEMPLATE = "Question: {question}\nAnswer:"
TOPICS = {
    "alt.atheism": "atheism",
    "comp.graphics": "computer graphics",
    "comp.os.ms-windows.misc": "Microsoft Windows",
    "comp.sys.ibm.pc.hardware": "IBM PC hardware",
    "comp.sys.mac.hardware": "Apple Macintosh hardware",
    "comp.windows.x": "the X Window System",
    "misc.forsale": "things for sale",
    "rec.autos": "cars",
    "rec.motorcycles": "motorcycles",
    "rec.sport.baseball": "baseball",
    "rec.sport.hockey": "hockey",
    "sci.crypt": "cryptography",
    "sci.electronics": "electronics",
    "sci.med": "medicine",
    "sci.space": "space",
    "soc.religion.christian": "Christianity",
    "talk.politics.guns": "politics of guns",
    "talk.politics.mideast": "politics of the Middle East",
    "talk.politics.misc": "politics",
    "talk.religion.misc": "religion",
}


def some(rows: Rows, most: int | None) -> Rows:
    """At most so many rows, evenly over all."""
    return rows if most is None else rows[:: max(1, len(rows) // most)][:most]


class Kept:
    """What was said of each part of the rows, kept in a folder where there is one."""

    def __init__(self, folder: Path | None, about: dict[str, Any]):
        self.folder, self.about = folder, about

    def __call__(self, name: str, rows: Rows, make: Callable[[Rows], list[Any]]) -> list[Any]:
        """What `make` says of the rows, part by part."""
        found: list[Any] = []
        for at in range(0, len(rows), PART):
            found += self._part(f"{name}-{at // PART}.json", lambda at=at: make(rows[at : at + PART]))  # type: ignore[misc]
            print(f"{name}: {len(found)} of {len(rows)}", file=sys.stderr)
        return found

    def _part(self, name: str, make: Callable[[], list[Any]]) -> list[Any]:
        path = self.folder and self.folder / name
        if path and path.exists():
            held = json.loads(path.read_text(encoding="utf-8"))
            if held["about"] != self.about:
                raise SystemExit(
                    f"{path} was made by {held['about']}, not by {self.about}: choose another --keep"
                )
            return list(held["found"])
        found = make()
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"about": self.about, "found": found}), encoding="utf-8")
        return found


def rate(hits: list[bool] | list[float]) -> dict[str, Any]:
    """The mean and its interval."""
    values = np.array(hits, np.float64)
    return {
        "value": float(values.mean()),
        "interval": interval(lambda k: float(values[k].mean()), len(values)),
    }


def scores_by_langmill(rows: Rows, threads: int) -> list[list[float]]:
    """The scores of each text's labels, in the order of TOPICS, as `langmill classify` gives them."""
    with tempfile.TemporaryDirectory() as scratch:
        write_rows(Path(scratch, "texts.jsonl"), ({"text": row["text"]} for row in rows))
        given = {"model": str(assets.fetch("minilm")), "file": Path(scratch, "texts.jsonl"), "threads": threads,
                 "labels": list(TOPICS.values()), "long_texts": "truncate"}  # fmt: skip
        asked = configure(ClassifySettings, None, [], **given)
        found = classify.run(asked, quiet=True, as_json=True).extra["results"]
    return [[one["scores"][label] for label in TOPICS.values()] for one in found]


def cosines_by_transformers(rows: Rows) -> list[list[float]]:
    """The cosines of each text's vector with those of the labels."""
    import transformers

    folder = assets.fetch("minilm")
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()

    @torch.inference_mode()
    def vectors(texts: list[str]) -> torch.Tensor:
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        found = torch.empty((len(texts), model.config.hidden_size))
        for at in range(0, len(order), BATCH):
            group = order[at : at + BATCH]
            batch = tokenizer(
                [texts[i] for i in group], padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"
            )  # fmt: skip
            hidden, mask = model(**batch).last_hidden_state, batch.attention_mask[..., None]
            found[group] = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        return found

    cosines: list[list[float]] = (
        vectors([row["text"] for row in rows]) @ vectors(list(TOPICS.values())).T
    ).tolist()
    return cosines


def topic(options: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """(figures, whether both sides agree)."""
    rows = some(read_rows(assets.fetch("newsgroups") / "test.jsonl"), options.rows)
    kept = Kept(options.keep, {"task": "topic", "rows": len(rows), "labels": TOPICS})
    names = list(TOPICS)
    truth = np.array([names.index(row["label"]) for row in rows])
    ours_KC = np.array(
        kept("topic-langmill", rows, lambda part: scores_by_langmill(part, options.threads)), np.float64
    )
    theirs_KC = np.array(kept("topic-transformers", rows, cosines_by_transformers), np.float64)
    said: dict[str, NDArray[np.int64]] = {"langmill": ours_KC.argmax(1), "transformers": theirs_KC.argmax(1)}
    log_KC = np.log(ours_KC) / SHARPNESS  # our cosines, but for one number a text
    apart = (log_KC - log_KC.mean(1, keepdims=True)) - (theirs_KC - theirs_KC.mean(1, keepdims=True))
    differ = np.flatnonzero(said["langmill"] != said["transformers"])
    margins = [
        float(theirs_KC[i, said["transformers"][i]] - theirs_KC[i, said["langmill"][i]]) for i in differ
    ]
    figures = {
        "task": "topic",
        "texts": len(rows),
        "accuracy": {name: rate((own == truth).tolist()) for name, own in said.items()},
        "agreement": 1 - len(differ) / len(rows),
        "margins_where_they_differ": margins,
        "largest_difference_of_cosines": float(np.abs(apart).max()),
    }
    return figures, all(margin <= 1e-4 for margin in margins)


def by_langmill(model: Path, rows: Rows, pool: Path, options: argparse.Namespace) -> Rows:
    """What `langmill evaluate` says of each row: its whole prompt, the choices' logs, whether they are right."""
    with tempfile.TemporaryDirectory() as scratch:
        on, out = Path(scratch, "asked.jsonl"), Path(scratch, "rows.jsonl")
        write_rows(on, rows)
        few = {"shots": options.shots, "examples": pool} if options.shots else {}
        given = {"model": str(model), "on": [str(on)], "out": out, "resamples": 1, "threads": options.threads}
        settings = configure(EvaluateSettings, None, [], **given, **few)
        evaluate.run(settings, quiet=True)
        asked, template = evaluate_rows.read(settings.on, "choices", settings.template, Ledger())
        before = evaluate_rows.shots(settings, "choices", template, asked)
        return [
            {"prompt": before + row["prompt"], **{name: row[name] for name in ("logs", "acc", "acc_norm")}}
            for row in read_rows(out)
        ]


def examples(rows: Rows, pool: Path, options: argparse.Namespace) -> Rows:
    """The rows that `langmill evaluate` shows before every prompt, in their order."""
    settings = configure(EvaluateSettings, None, [], model="", on=[""], shots=options.shots, examples=pool)
    filled = {f"{prompt(row)} {row['choices'][row['answer']]}": row for row in read_rows(pool)}
    taken = evaluate_rows.few(settings, "choices", TEMPLATE).taken({prompt(row) for row in rows})
    return [filled[one.shown] for one in taken]


def prompt(row: dict[str, Any]) -> str:
    return TEMPLATE.replace("{question}", str(row["question"]))


def by_harness(model: Any, rows: Rows, shown: Rows) -> Rows:
    """What lm-evaluation-harness says of each row, with prompts of its own making."""
    from datasets import Dataset
    from lm_eval import simple_evaluate

    task = {
        "task": "local",
        "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": TEMPLATE.replace("{question}", "{{question}}"),
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "num_fewshot": len(shown),
        "fewshot_config": {"sampler": "first_n", "samples": shown},
    }
    found: Any = simple_evaluate(model=model, tasks=[task], log_samples=True, bootstrap_iters=0)
    return [
        {
            "prompt": one["arguments"][0][0],
            "logs": [float(response[0]) for response in one["filtered_resps"]],
            "acc": float(one["acc"]),
            "acc_norm": float(one["acc_norm"]),
        }
        for one in sorted(found["samples"]["local"], key=lambda one: one["doc_id"])
    ]


def compared(ours: Rows, theirs: Rows) -> tuple[dict[str, Any], bool]:
    """(the figures of both sides, whether they are equal)."""
    pairs = list(zip(ours, theirs, strict=True))
    apart = max(abs(a - b) for one, other in pairs for a, b in zip(one["logs"], other["logs"], strict=True))
    unlike = sum(one["prompt"] != other["prompt"] for one, other in pairs)
    differ = {name: sum(one[name] != other[name] for one, other in pairs) for name in ("acc", "acc_norm")}
    figures = {
        "rows": len(ours),
        "langmill": {name: rate([row[name] for row in ours]) for name in differ},
        "harness": {name: float(np.mean([row[name] for row in theirs])) for name in differ},
        "prompts_that_differ": unlike,
        "rows_judged_differently": differ,
        "largest_difference_nats": apart,
    }
    return figures, not unlike and not any(differ.values()) and apart <= 1e-3


def choices(options: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """(figures of each set, whether both sides agree)."""
    gguf = next(assets.fetch("smollm2").glob("*.gguf"))
    made: dict[str, Any] = {"task": "choices", "shots": options.shots}
    equal = True
    with tempfile.TemporaryDirectory() as scratch:
        folder, pool = (options.keep or Path(scratch)) / "smollm2", Path(scratch, "pool.jsonl")
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            langmill.save(*langmill.load(gguf), folder)
        theirs: list[Any] = []  # the harness's model, once it is needed

        def model() -> Any:
            from lm_eval.models.huggingface import HFLM

            if not theirs:
                theirs.append(HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=8))
            return theirs[0]

        for name in SETS:
            every = read_rows(assets.fetch("questions") / f"{name}.jsonl")
            rows = some(every[:-POOL] if options.shots else every, options.rows)
            asked = {row["question"] for row in rows}
            write_rows(pool, [row for row in every[-POOL:] if row["question"] not in asked])
            shown = examples(rows, pool, options) if options.shots else []
            kept = Kept(options.keep, {"set": name, "rows": len(rows), "shots": options.shots})
            about = f"{name}-{options.shots}"
            ours = kept(f"{about}-langmill", rows, lambda part: by_langmill(gguf, part, pool, options))
            other = kept(f"{about}-harness", rows, lambda part, shown=shown: by_harness(model(), part, shown))  # type: ignore[misc]
            made[name], same = compared(ours, other)
            equal &= same
            print(json.dumps(made[name]), file=sys.stderr)
    return made, equal


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=("topic", "choices"))
    parser.add_argument("--rows", type=int)
    parser.add_argument("--shots", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    if options.shots and options.task == "topic":
        parser.error("--shots is for choices: an encoder compares texts with labels alone")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all is here; before what reads it is imported
    torch.set_num_threads(options.threads)
    figures, equal = (topic if options.task == "topic" else choices)(options)
    print(json.dumps(figures))
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
