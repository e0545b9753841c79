"""Teach SmolLM2 a service desk's form of answer: 300 conversations, then 100 held-out prompts, before and after.

    scripts/bench support [--method lora|qlora|full] [--train 300] [--asked 100] [KEY=VALUE ...]

The answers have three lines, Ticket, Answer and Next step. Exit code 1 where fewer than 95 % of the answers have that
form, one does not stop by itself, or a fifth had the form before. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from langmill.common.configure import configure
from langmill.common.settings import FinetuneSettings
from langmill.data.chats import Chat
from langmill.families.folder import load
from langmill.jobs import finetune
from langmill.jobs.answers import ask

sys.path.insert(0, str(Path(__file__).parent.parent))
FORM = re.compile(
    r"Ticket: (?:mechanical|electrical|software|order) / (?:low|normal|urgent)\nAnswer: \S.*\nNext step: \S.*"
)
MACHINES = ("the CNC mill", "press line 2", "the label printer", "the conveyor in hall B", "our laser cutter",
            "the forklift charger", "the packing robot", "the compressor", "the paint booth fan", "the barcode scanner",
            "the bandsaw", "the cooling pump")  # fmt: skip
# problem, kind, priority, answer, next step
PROBLEMS = (
    ("makes a grinding noise", "mechanical", "urgent", "A bearing is probably worn, so stop {m} now.",
     "Lock it out and wait for the fitter."),
    ("is leaking oil", "mechanical", "urgent", "A seal has failed; {m} must not run until it is replaced.",
     "Put absorbent down and send a photo of the leak."),
    ("vibrates more than usual", "mechanical", "normal", "A mount may have come loose on {m}.",
     "Check the four foot bolts with a 19 mm spanner."),
    ("will not switch on", "electrical", "urgent", "The fuse or the emergency stop of {m} is the usual reason.",
     "Release the red button and look at fuse F3."),
    ("trips the breaker every morning", "electrical", "urgent", "Moisture in the motor of {m} can cause that.",
     "Leave the breaker off and call the electrician on duty."),
    ("shows a flickering display", "electrical", "low", "The cable behind the panel of {m} tends to work loose.",
     "Press the ribbon cable in at the next break."),
    ("shows error 404 on the screen", "software", "normal", "{m} has lost its connection to the plant server.",
     "Restart the gateway and wait two minutes."),
    ("forgets its settings overnight", "software", "low", "The backup battery of {m} is empty.",
     "Write the settings down; we replace the battery on Friday."),
    ("does not take the new job file", "software", "normal", "{m} reads files of version 3 only.",
     "Export the job again as version 3 and try once more."),
    ("needs new filters", "order", "low", "Filters for {m} are on the shelf in store 4.",
     "Take two and sign the list."),
    ("is waiting for a spare belt", "order", "normal", "The belt for {m} is ordered and arrives on Tuesday.",
     "Note order 7731 and ask again after Tuesday."),
    ("ran out of labels", "order", "low", "Labels for {m} come with the evening delivery.",
     "Use the spare roll in the drawer until then."),
)  # fmt: skip
ASKING = ("Hello, {m} {p}. What should we do?", "{M} {p}, can you help?", "Good morning! {M} {p}.",
          "hi desk, {m} {p} since the night shift", "{M} {p} and the line is standing. Please advise.",
          "We have a problem: {m} {p}.", "{M} {p}... is that dangerous?",
          "Quick question, {m} {p}. Who takes care of it?", "It's Anna from hall A. {M} {p}.")  # fmt: skip


def conversations(seed: int = 0) -> list[dict[str, Any]]:
    """Every machine with every problem, each asked in one way of its own, shuffled."""
    numbers = random.Random(seed)
    rows = []
    for machine, problem, way in itertools.product(MACHINES, PROBLEMS, range(3)):
        words, kind, priority, answer, step = problem
        asked = numbers.choice(ASKING[way * 3 : way * 3 + 3])
        capital = machine[0].upper() + machine[1:]
        told = answer.format(m=machine)
        reply = f"Ticket: {kind} / {priority}\nAnswer: {told[0].upper() + told[1:]}\nNext step: {step}"
        user = {"role": "user", "content": asked.format(m=machine, M=capital, p=words)}
        rows.append({"messages": [user, {"role": "assistant", "content": reply}]})
    numbers.shuffle(rows)
    return rows


def scored(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares of answers in the form, right in their first line, and ended by themselves; and the first answers."""
    chats = [Chat(str(i), row["messages"]) for i, row in enumerate(rows)]
    answers = [
        answer
        for i in range(0, len(chats), 25)
        for answer in ask(model, tokenizer, chats[i : i + 25], True, "")
    ]
    right = sum(a.text.partition("\n")[0] == a.wanted.partition("\n")[0] for a in answers)
    return {
        "in_form": sum(bool(FORM.fullmatch(a.text.strip())) for a in answers) / len(answers),
        "ticket_right": right / len(answers),
        "stopped": sum(a.stopped for a in answers) / len(answers),
        "samples": [{"prompt": a.prompt, "answer": a.text} for a in answers[:3]],
    }


def main() -> int:
    from assets import fetch

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--method", default="lora", choices=("lora", "qlora", "full"))
    parser.add_argument("--train", type=int, default=300)
    parser.add_argument("--asked", type=int, default=100)
    parser.add_argument("settings", nargs="*", help="further settings of langmill finetune")
    given = parser.parse_args()
    base = next(fetch("smollm2").glob("*.gguf"))
    rows = conversations()
    train, held = rows[: given.train], rows[-given.asked :]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        data, out = Path(scratch) / "support.jsonl", Path(scratch) / "desk"
        data.write_text("".join(json.dumps(row) + "\n" for row in train), encoding="utf-8")
        before = scored(*load(base), held)
        named = {"model": str(base), "data": [str(data)], "out": out, "method": given.method, "samples": 0}
        report = finetune.run(configure(FinetuneSettings, None, given.settings, **named))
        after = scored(*load(out), held)
    good = after["in_form"] >= 0.95 and after["stopped"] == 1 and before["in_form"] < 0.2
    figures = {
        name: report.figures[name] for name in ("before_loss", "loss", "training_seconds", "peak_bytes")
    }
    print(
        json.dumps(
            {"bench": "support", "ok": good, "before": before, "after": after, **figures}, ensure_ascii=False
        )
    )
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
