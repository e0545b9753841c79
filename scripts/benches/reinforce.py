"""Reward SmolLM2 for answers of one word through `langmill finetune --task reinforce`, before and after.

    scripts/bench reinforce [--steps 40] [--method lora|qlora|full] [--threads 2] [KEY=VALUE ...]

Asked for one word, the model mostly writes sentences. An answer of n words earns 1/n, and one without a word nothing.
500 questions are written here, of which 200 are held out; no question is on both sides. Exit code 1 unless the mean
reward of answers to the held-out ones begins at 0.1 or more and rises by 0.15. Prints one JSON object, in which
"different" counts the answers to the held-out questions that differ: a model that says one word to all earns as much.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HELD, START, RISE = 0.4, 0.1, 0.15
THINGS = ("the sea", "bread", "winter", "a dog", "music", "the moon", "a school", "a train", "coffee", "rain",
          "a garden", "football", "a forest", "money", "a letter", "the sun", "a river", "sleep", "a mountain", "fire",
          "a bicycle", "salt", "a library", "snow", "an apple")  # fmt: skip
ASKED = ("What colour is {t}?", "How does {t} smell?", "What does {t} make you feel?", "What is {t} like?",
         "What goes well with {t}?", "What is the opposite of {t}?", "Who needs {t}?", "Where do you find {t}?",
         "What does {t} need?", "When do you think of {t}?", "What sound fits {t}?", "Is {t} good or bad?",
         "What is {t} made of?", "How old is {t}?", "What animal fits {t}?", "What do you do with {t}?",
         "How big is {t}?", "What is {t} for?", "What comes after {t}?", "Describe {t}.")  # fmt: skip


def brief(completions: list[Any], **fields: Any) -> list[float]:
    """The reward: one over the number of words."""
    counts = [len(re.findall(r"\w+", completion[0]["content"])) for completion in completions]
    return [1 / count if count else 0.0 for count in counts]


def prompts(seed: int = 0) -> list[dict[str, Any]]:
    """Every question about every thing, shuffled."""
    rows = []
    for thing, asked in itertools.product(THINGS, ASKED):
        system = {"role": "system", "content": "Answer with one word."}
        rows.append({"prompt": [system, {"role": "user", "content": asked.format(t=thing)}]})
    random.Random(seed).shuffle(rows)
    return rows


def run(given: argparse.Namespace, base: Path, scratch: Path) -> tuple[dict[str, Any], int]:
    """The report of the run, and how many answers to held-out questions differ after it."""
    data, out = scratch / "prompts.jsonl", scratch / "brief"
    data.write_text("".join(json.dumps(row) + "\n" for row in prompts()), encoding="utf-8")
    words = [sys.executable, "-m", "langmill", "finetune", str(base), "--task", "reinforce", "--json"]
    words += ["--data", str(data), "--out", str(out), "--method", given.method]
    words += ["--reward", f"{Path(__file__).resolve()}:brief", f"holdout={HELD}", f"threads={given.threads}"]
    words += [f"max_steps={given.steps}", f"eval_every={given.steps}", "max_completion_length=12"]
    words += ["prompts_per_step=4", "num_generations=8"]
    done = subprocess.run([*words, *given.settings], check=True, stdout=subprocess.PIPE, text=True)
    answers = json.loads((scratch / "brief.run" / "after.json").read_text(encoding="utf-8"))["answers"]
    return json.loads(done.stdout.splitlines()[-1]), len({answer["text"].lower() for answer in answers})


def main() -> int:
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from assets import fetch

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--method", default="lora", choices=("lora", "qlora", "full"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("settings", nargs="*", help="further settings of langmill finetune")
    given = parser.parse_args()
    base, started = next(fetch("smollm2").glob("*.gguf")), time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        report, different = run(given, base, Path(scratch))
    figures, counts = report["figures"], report["counts"]
    names = (
        "before_reward",
        "reward",
        "before_length",
        "length",
        "before_stopped",
        "stopped",
        "kl",
        "peak_bytes",
    )
    good = figures["before_reward"] >= START and figures["reward"] >= figures["before_reward"] + RISE
    about = {name: counts[name] for name in ("prompts", "held_out_prompts", "answered", "answers", "steps")}
    told = {"ok": good, "seconds": round(time.monotonic() - started), "different": different, **about}
    print(json.dumps({"bench": "reinforce", **told, **{name: figures[name] for name in names}}))
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
