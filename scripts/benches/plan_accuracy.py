"""How far `langmill plan` is from the run that follows it: step time and peak memory, median over five pairs.

    scripts/bench plan_accuracy [--rounds 5] [--steps 12] [--size small] [KEY=VALUE ...]

Each round plans a run on the manual that CPython carries and at once makes it, so that both meet the machine in the
same minute. Prints one JSON object; exit code 1 where the median of the step time's error is above 25 % or that of
the peak memory's above 15 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from langmill.jobs.manual import manual

STEP_TIME, PEAK_MEMORY = 0.25, 0.15  # errors that may not be exceeded


def langmill(*words: str) -> dict[str, Any]:
    """The JSON object of one command."""
    done = subprocess.run(
        [sys.executable, "-m", "langmill", *words, "--json", "--quiet"],
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        check=False,
    )
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    if not answer["ok"]:
        raise SystemExit(f"langmill {' '.join(words)}: {answer['error']['message']}")
    return answer


def pair(text: Path, out: Path, words: list[str]) -> dict[str, float]:
    """A plan and its run: what was foretold, what was, and the relative errors."""
    foretold = langmill("plan", str(text), *words)["figures"]
    was = langmill("pretrain", str(text), "--out", str(out), *words)
    step = was["figures"]["training_seconds"] / was["counts"]["steps"]
    peak = was["figures"]["peak_bytes"]
    return {
        "planned_step_seconds": foretold["step_seconds"],
        "step_seconds": step,
        "step_time_error": foretold["step_seconds"] / step - 1,
        "planned_peak_bytes": foretold["peak_bytes"],
        "peak_bytes": peak,
        "peak_memory_error": foretold["peak_bytes"] / peak - 1,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--size", default="small")
    parser.add_argument("settings", nargs="*", help="further settings of both commands")
    given = parser.parse_args()
    words = [f"model.size={given.size}", f"train.max_steps={given.steps}", *given.settings]
    with tempfile.TemporaryDirectory(prefix="langmill-", ignore_cleanup_errors=True) as scratch:
        text = Path(scratch) / "manual.jsonl"
        rows = (json.dumps({"text": page.text}) + "\n" for page in manual().documents)
        text.write_text("".join(rows), encoding="utf-8")
        rounds = []
        for number in range(given.rounds):
            rounds.append(pair(text, Path(scratch) / f"model-{number}", words))
            print(json.dumps(rounds[-1]), file=sys.stderr, flush=True)
    medians = {
        name: statistics.median(abs(found[name]) for found in rounds)
        for name in ("step_time_error", "peak_memory_error")
    }
    good = medians["step_time_error"] <= STEP_TIME and medians["peak_memory_error"] <= PEAK_MEMORY
    print(json.dumps({"size": given.size, "ok": good, **medians, "rounds": rounds}))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
