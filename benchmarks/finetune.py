"""LoRA fine-tuning against TRL's SFTTrainer with PEFT, interleaved: real tokens a second and peak memory, as JSON.

    scripts/bench finetune [--rounds 3] [--steps 4] [--peers PYTHON]
    scripts/bench finetune --same          the same eight conversations in each pass of both
    scripts/bench finetune --quality       held-out loss of both after the same 96 conversations
    scripts/bench finetune --parity        the first step's loss and gradient norm of both, on the same eight rows

SmolLM2-135M, rank 16 on all linear layers, conversations of unequal lengths (chitchat), 512 tokens, batch 8: rows of
packed conversations here and one conversation a row there, so that a pass here holds more of them; with --same it
holds the same eight, which pack into fewer rows. Every measurement is a process of its own. PYTHON belongs to an
environment with trl, peft and datasets; the first use makes one in .venv-peers. The first step of each process warms
up and does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _figures import spread

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
PEER = Path(__file__).parent / "peers" / "trl_lora.py"
OURS = {"langmill": ["--compile", "false"], "langmill_compiled": ["--compile", "true"]}
THEIRS = {"trl_float32": ["--dtype", "float32"], "trl_bfloat16": ["--dtype", "bfloat16"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--conversations", type=int, default=200)
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers" / "bin" / "python")
    parser.add_argument("--only", nargs="*", choices=[*OURS, *THEIRS])
    parser.add_argument("--parity", action="store_true")
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--same", action="store_true")
    parser.add_argument("--worker", nargs=3, metavar=("MODEL", "DATA", "OUT"), help=argparse.SUPPRESS)
    parser.add_argument("--compile", default="false", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        return work(*given.worker, given)
    peers(given.peers)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        model, data = inputs(Path(scratch), given.conversations)
        if given.quality:
            return print(json.dumps(quality(model, data, Path(scratch), given)))
        if given.parity:
            return print(json.dumps(parity(model, data, Path(scratch), given)))
        names = given.only or [*OURS, *THEIRS]
        if given.same:
            names = [name for name in names if name != "langmill_compiled"]  # it would compile for every pass
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for number in range(given.rounds):
            for name in names:
                found[name].append(measured(name, model, data, Path(scratch) / f"out-{name}-{number}", given))
                rate = statistics.median(found[name][-1]["tokens_per_second"][1:])
                print(
                    name,
                    f"{rate:.1f} tokens/s",
                    f"{found[name][-1]['peak_bytes'] / 1e9:.2f} GB",
                    file=sys.stderr,
                )
    print(json.dumps(report(found)))


def report(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Rates and peaks by name, and the ratios of our best to theirs, round by round."""
    rates = {
        name: [statistics.median(run["tokens_per_second"][1:]) for run in runs]
        for name, runs in found.items()
    }
    peaks = {name: statistics.median(run["peak_bytes"] for run in runs) for name, runs in found.items()}
    answer: dict[str, Any] = {
        "tokens_a_pass": {name: runs[0]["tokens"] for name, runs in found.items()},
        "tokens_per_second": {name: spread(values, 1) for name, values in rates.items()},
        "peak_gigabytes": {name: round(peak / 1e9, 2) for name, peak in peaks.items()},
        "first_losses": {name: runs[0]["losses"][:1] for name, runs in found.items()},
    }
    ours, theirs = [n for n in rates if n in OURS], [n for n in rates if n in THEIRS]
    if ours and theirs:
        mine = max(ours, key=lambda name: statistics.median(rates[name]))
        best = max(theirs, key=lambda name: statistics.median(rates[name]))
        answer["over_" + best] = spread([a / b for a, b in zip(rates[mine], rates[best], strict=True)], 2)
        answer["memory_over"] = {name: round(peaks[mine] / peaks[name], 2) for name in theirs}
        answer["ours"] = mine
    return answer


def peers(python: Path) -> None:
    """Make the peers' environment where it is not there."""
    if python.exists():
        return
    print("installing trl, peft and datasets into .venv-peers", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", python.parent.parent], check=True)
    constraints = ROOT / "constraints.txt"
    packages = ["trl==1.16.0", "peft>=0.21", "datasets"]
    subprocess.run([python, "-m", "pip", "install", "-q", "-c", constraints, *packages], check=True)


def inputs(scratch: Path, count: int) -> tuple[Path, Path]:
    """SmolLM2 as a float32 folder, and so many conversations."""
    from assets import fetch

    from langmill.families.folder import load, save

    model, tokenizer = load(next(fetch("smollm2").glob("*.gguf")))
    save(model, tokenizer, scratch / "model")
    template = scratch / "model" / "chat_template.jinja"
    template.write_text(marked(template.read_text(encoding="utf-8")), encoding="utf-8")
    with open(fetch("chitchat") / "conversations.jsonl", encoding="utf-8") as file:
        rows = [line for line, _ in zip(file, range(count), strict=False)]
    (scratch / "data.jsonl").write_text("".join(rows), encoding="utf-8")
    return scratch / "model", scratch / "data.jsonl"


def marked(template: str) -> str:
    """SmolLM2's template with {% generation %}, which TRL needs to train on the assistant's turns alone."""
    turn = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    assert turn in template
    answer = (
        "{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}"
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    )
    return template.replace(turn, f"{answer}{turn}{{% endif %}}")


def measured(name: str, model: Path, data: Path, out: Path, given: argparse.Namespace) -> dict[str, Any]:
    """One process's figures."""
    common = ["--steps", str(given.steps), "--threads", str(given.threads), *["--same"] * given.same]
    if name in OURS:
        words = [sys.executable, __file__, "--worker", str(model), str(data), str(out), *OURS[name], *common]
    else:
        words = [str(given.peers), str(PEER), str(model), str(data), *THEIRS[name], *common]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        words, stdout=subprocess.PIPE, text=True, check=True, env=environment, cwd=out.parent
    )
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def parity(model: Path, data: Path, scratch: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Loss and gradient norm of one step over eight prompts and completions, all weights and an adapter, of both."""
    pairs = []
    for line in data.read_text(encoding="utf-8").splitlines()[:8]:
        asked, answered = (turn["content"] for turn in json.loads(line)["messages"][:2])
        pairs.append(json.dumps({"prompt": asked, "completion": f" {answered}"}) + "\n")
    data.write_text("".join(pairs), encoding="utf-8")
    answer: dict[str, Any] = {}
    for method in ("full", "lora"):
        adapter = scratch / "adapter"
        mine = first_step(model, data, scratch / f"run-{method}", method, adapter)
        words = [str(given.peers), str(PEER), str(model), str(data), "--steps", "1"]
        words += ["--all-tokens", *(["--full"] if method == "full" else ["--adapter", str(adapter)])]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            words, stdout=subprocess.PIPE, text=True, check=True, env=environment, cwd=scratch
        )
        theirs = json.loads(done.stdout.strip().splitlines()[-1])
        answer[method] = {
            "langmill": mine,
            "trl": {"loss": theirs["losses"][0], "grad_norm": theirs["norms"][0]},
        }
    return answer


def quality(model: Path, data: Path, scratch: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Held-out loss on 32 conversations before, and after one epoch of 96 with the same settings, ours and theirs."""
    import torch

    from langmill.common.configure import configure
    from langmill.common.settings import FinetuneSettings
    from langmill.families.peft import load_adapted
    from langmill.jobs import finetune

    rows = data.read_text(encoding="utf-8").splitlines(keepends=True)
    data.write_text("".join(rows[:96]), encoding="utf-8")
    (scratch / "held.jsonl").write_text("".join(rows[96:128]), encoding="utf-8")
    words = ["holdout=0", "samples=0", "train.max_length=511", "train.micro_batch_size=8", "train.num_train_epochs=1",
             "train.learning_rate=0.001", "train.schedule=constant", "train.warmup_ratio=0"]  # fmt: skip
    named = {"model": str(model), "data": [str(data)], "out": scratch / "ours", "too_long": "truncate"}
    finetune.run(configure(FinetuneSettings, None, words, **named))
    theirs = [str(given.peers), str(PEER), str(model), str(data), "--steps", "12", *THEIRS["trl_bfloat16"]]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    words_saved = [*theirs, "--save", str(scratch / "theirs")]
    subprocess.run(words_saved, stdout=subprocess.DEVNULL, check=True, env=environment, cwd=scratch)
    held = configure(FinetuneSettings, None, words, **{**named, "data": [str(scratch / "held.jsonl")]})
    plain, tokenizer = finetune.opened(held)
    ready = finetune.prepare(held, tokenizer, plain.config.length, None, quiet=True)
    answer = {"before": finetune.held_loss(plain.eval(), ready.examples, ready.train, 511)}
    for name in ("ours", "theirs"):
        adapted, _ = load_adapted(scratch / name, str(model), torch.float32, "cpu")
        answer[name] = finetune.held_loss(adapted.eval(), ready.examples, ready.train, 511)
    return {"held_out_loss": answer, "ours_over_theirs": answer["ours"] / answer["theirs"]}


def first_step(model: Path, data: Path, out: Path, method: str, adapter: Path) -> dict[str, float]:
    """One step of ours over all rows of `data`; with lora, the adapter that it starts from is left in `adapter`."""
    from langmill.adapt.lora import adapt
    from langmill.common.configure import configure
    from langmill.common.settings import FinetuneSettings
    from langmill.families.peft import write_adapter
    from langmill.jobs import finetune

    words = ["holdout=0", "train.max_length=511", "train.micro_batch_size=1", "train.gradient_accumulation_steps=64",
             "train.num_train_epochs=1", "train.dtype=float32", "train.compile=false", "train.log_every=1"]  # fmt: skip
    settings = configure(
        FinetuneSettings, None, words, model=str(model), data=[str(data)], out=out, method=method
    )
    loaded, tokenizer = finetune.opened(settings)
    ready = finetune.prepare(settings, tokenizer, loaded.config.length, None, quiet=True)
    settings = settings.model_copy(
        update={"train": finetune.chosen(settings, ready.examples, ready.train, loaded)}
    )
    if method == "lora":
        adapt(loaded, settings.lora, 0)
        adapter.mkdir()
        write_adapter(loaded, adapter, str(model))
    finetune.train(settings, loaded, ready, out, quiet=True)
    line = json.loads((out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    return {"loss": line["loss"], "grad_norm": line["grad_norm"]}


def work(model: str, data: str, out: str, given: argparse.Namespace) -> None:
    """Our side: the job's own parts, with a count of real tokens."""
    from langmill.adapt.lora import adapt
    from langmill.common.configure import configure
    from langmill.common.settings import FinetuneSettings
    from langmill.data.batches import Packed, pack
    from langmill.jobs import finetune
    from langmill.train.loop import State, fit
    from langmill.train.objectives import causal

    words = [f"train.max_steps={given.steps}", "train.max_length=511", "train.micro_batch_size=8",
             "train.learning_rate=0.001", "train.schedule=constant", "train.warmup_ratio=0", "train.log_every=1",
             f"train.threads={given.threads}", f"train.compile={given.compile}", "holdout=0"]  # fmt: skip
    named = {"model": model, "data": [data], "out": Path(out), "too_long": "truncate"}
    settings = configure(FinetuneSettings, None, words, **named)
    loaded, tokenizer = finetune.opened(settings)
    ready = finetune.prepare(settings, tokenizer, loaded.config.length, None, quiet=True)
    training = finetune.chosen(settings, ready.examples, ready.train, loaded)
    adapt(loaded, settings.lora, 0)
    real: list[int] = []
    marks: list[float] = []

    class Counted(Packed):
        def __next__(self) -> Any:
            batch = super().__next__()
            real.append(int((batch.documents_BT > 0).sum()))
            return batch

    losses: list[float] = []

    def hook(step: int, state: State) -> None:
        marks.append(state.seconds)
        losses.append(state.loss or 0.0)

    class Eight:
        """Pass n holds conversations 8 n to 8 n + 7, packed into as few rows as they need."""

        def __init__(self) -> None:
            self.number = 0

        def __next__(self) -> Any:
            chosen = ready.train[8 * self.number : 8 * self.number + 8]
            self.number += 1
            rows = len(pack(ready.examples.predictions(chosen), 511))
            return next(Counted(ready.examples, chosen, 511, rows, 0))

        def state(self) -> dict[str, Any]:
            return {"number": self.number}

        def restore(self, state: Mapping[str, Any]) -> None:
            self.number = state["number"]

    batches = Eight() if given.same else Counted(ready.examples, ready.train, 511, 8, 0)
    fit(loaded, batches, causal, training, Path(out), seed=0, hooks=[hook], quiet=True)
    counted = real[-given.steps :]
    seconds = [b - a for a, b in zip([0.0, *marks], marks, strict=False)]
    rates = [count / taken for count, taken in zip(counted, seconds, strict=True)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"tokens_per_second": rates, "tokens": counted, "peak_bytes": peak, "losses": losses}))


if __name__ == "__main__":
    main()
