"""Teach SmolLM2 to prefer kind, short answers to curt ones through `langmill finetune --task prefer`, before and after.

    scripts/bench prefer [--pairs 160] [--method lora|qlora|full] [KEY=VALUE ...]

The pairs are written here: a question about a thing at home, a helpful answer in two sentences, and one that sends the
asker away; every fifth pair is held out, and no other asks the same of the same thing. Exit code 1 unless margin and
accuracy on the held-out pairs rise. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HELD = 0.2
THINGS = ("bicycle chain", "kitchen tap", "radiator", "door hinge", "wooden table", "window blind", "garden hose",
          "coffee machine", "doorbell", "bookshelf", "washing machine", "desk lamp", "lawn mower", "sofa leg",
          "cutting board", "garage door")  # fmt: skip
# question, what to look at, what to do next
TROUBLES = (
    ("My {t} makes a strange noise. Any idea?", "dust or a loose screw is the usual reason for a noise in a {t}",
     "Clean it first, then tighten what you can reach"),
    ("How often should I look after my {t}?", "twice a year is plenty for a {t} that is used every day",
     "Put a note in your calendar for spring and autumn"),
    ("Can I repair a {t} myself?", "most faults of a {t} need no more than a screwdriver",
     "Take a photo before you loosen anything, so that you can put it back"),
    ("The {t} broke again. What now?", "a {t} that breaks twice has often one worn part",
     "Write down which part it was and ask the shop for that one alone"),
    ("Where do I get parts for an old {t}?", "parts for a {t} are sold for about ten years",
     "Look for the number on its underside and search for that"),
    ("Is it worth keeping my {t}?", "a {t} that is cared for lasts far longer than a cheap new one",
     "Compare the price of the repair with half of a new one"),
    ("What should I clean a {t} with?", "lukewarm water and a soft cloth do no harm to a {t}",
     "Dry it well afterwards and leave strong cleaners away"),
    ("My neighbour wants to borrow the {t}. Should I lend it?", "lending a {t} is fine where both know its state",
     "Agree on a day for its return and look at it together"),
    ("The {t} came without a manual. What do I do?", "most makers of a {t} keep the manual on their site",
     "Search for the model's name, which stands on the label"),
    ("How do I move a {t} without damage?", "a {t} travels best wrapped in an old blanket",
     "Ask a second person to hold the other end"),
)  # fmt: skip
KIND = (
    "Good question: {a}. {b}.",
    "Happy to help: {a}. {b}.",
    "No worry, {a}. {b}.",
    "Glad you ask, {a}. {b}.",
)
CURT = ("Why do you ask me? Look it up yourself.", "That is not my problem. Buy a new one and stop asking.",
        "Honestly, anybody knows that. Next question.", "No idea, and I do not care about your {t}.",
        "You should have thought of that before. I cannot help you.")  # fmt: skip


def pairs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Things with troubles, shuffled; no two ask the same of the same thing."""
    dice, rows = random.Random(seed), []
    for thing, (asked, reason, step) in itertools.product(THINGS, TROUBLES):
        kind = dice.choice(KIND).format(a=reason.format(t=thing), b=step)
        turns = ((asked.format(t=thing), "user"), (kind, "assistant"),
                 (dice.choice(CURT).format(t=thing), "assistant"))  # fmt: skip
        prompt, chosen, rejected = ([{"role": role, "content": text}] for text, role in turns)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    dice.shuffle(rows)
    return rows[:count]


def main() -> int:
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from assets import fetch

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=len(THINGS) * len(TROUBLES))
    parser.add_argument("--method", default="lora", choices=("lora", "qlora", "full"))
    parser.add_argument("settings", nargs="*", help="further settings of langmill finetune")
    given = parser.parse_args()
    base = next(fetch("smollm2").glob("*.gguf"))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        data, out = Path(scratch) / "pairs.jsonl", Path(scratch) / "kinder"
        data.write_text("".join(json.dumps(row) + "\n" for row in pairs(given.pairs)), encoding="utf-8")
        words = [sys.executable, "-m", "langmill", "finetune", str(base), "--task", "prefer", "--json"]
        words += ["--data", str(data), "--out", str(out), "--method", given.method]
        words += [f"holdout={HELD}", "train.num_train_epochs=1"]
        done = subprocess.run([*words, *given.settings], check=True, stdout=subprocess.PIPE, text=True)
    report = json.loads(done.stdout.splitlines()[-1])
    figures, counts = report["figures"], report["counts"]
    names = ("before_margin", "margin", "before_accuracy", "accuracy", "before_loss", "loss", "peak_bytes")
    good = figures["margin"] > figures["before_margin"] and figures["accuracy"] > figures["before_accuracy"]
    about = {name: counts[name] for name in ("pairs", "held_out_pairs", "steps")}
    print(json.dumps({"bench": "prefer", "ok": good, **about, **{name: figures[name] for name in names}}))
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
