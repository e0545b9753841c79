"""`langmill finetune --task classify | tag | answer | translate | embed`: labelled texts in, a model of one's own out.

    rows → items → model with the task's head → fit, best checkpoint kept → held-out scores → OUT → report

As in `finetune`, each stage's result is whole or absent, and what is private lies in OUT.run.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from langmill.common.configure import save_settings
from langmill.common.errors import DataError, ModelError, UsageError
from langmill.common.metrics import Metrics, Report
from langmill.common.settings import FinetuneSettings
from langmill.data.pipeline import Ledger
from langmill.data.rows import tokens_of
from langmill.families.folder import Model, check_match, save
from langmill.infer.ready import find_device
from langmill.jobs import memory, results
from langmill.jobs.card import Text, shape
from langmill.jobs.card import lineage as lineage_of
from langmill.jobs.finetune import left_out
from langmill.jobs.foretell import foretold
from langmill.jobs.report import (  # fmt: skip
    Html,
    Page,
    Tile,
    count_shown,
    join,
    ledger,
    loss_chart,
    machine,
    seconds_shown,
    shown,
    speed_chart,
    text,
)
from langmill.jobs.work import Prepare, Scored, Work, chosen, rows_of, scored
from langmill.model.count import parameters
from langmill.model.transformer import Transformer
from langmill.text.tokenizer import Tokenizer
from langmill.text.translate import closed
from langmill.train import checkpoint
from langmill.train.loop import Outcome, State, fit

TASKS = ("classify", "tag", "answer", "translate", "embed")
TIE = 1e-7  # what the loss counts beside the figure: it decides between equals
PIPELINES = {
    "classify": "text-classification", "tag": "token-classification", "answer": "question-answering",
    "translate": "translation", "embed": "sentence-similarity",
}  # fmt: skip


def check(settings: FinetuneSettings) -> None:
    """UsageError for what these tasks cannot do."""
    if settings.method not in (None, "full"):
        raise UsageError(
            f"--task {settings.task} trains all weights: method {settings.method} is for chat and prefer"
        )


def readable(model: Model) -> Transformer:
    """The model, if it can be taught tasks."""
    if not isinstance(model, Transformer):
        raise ModelError("an LSTM cannot be taught tasks: take a Transformer")
    return model


def prepared(
    settings: FinetuneSettings, model: Model, tokenizer: Tokenizer, ledger: Ledger, quiet: bool
) -> Work:
    """The task's work of the rows. A DataError about those that are left says which were not."""
    prepare: Prepare = importlib.import_module(f"langmill.jobs.task_{settings.task}").prepare
    try:
        return prepare(settings, readable(model), tokenizer, ledger, quiet)
    except DataError as error:
        dropped = left_out(ledger) if ledger.total("kept").documents else ""
        raise DataError(f"{error}; left out: {dropped}" if dropped else str(error)) from error


def run(
    settings: FinetuneSettings, model: Model, tokenizer: Tokenizer, folder: Path, quiet: bool, started: float
) -> Report:
    """Teach `model` the task and write OUT, a model folder that holds the labels.

    Figures: those of the task (task_classify and its neighbours say which), loss (held out), tokens_per_second,
    peak_bytes. DataError where no row is usable or there is nothing to tell apart.
    """
    work = prepared(settings, model, tokenizer, Ledger(folder / "errors.jsonl"), quiet)
    check_match(work.model.config, tokenizer, settings.model)
    device = find_device(settings.train.device)
    settings = settings.model_copy(
        update={"method": "full", "train": chosen(settings, work, device.type == "cpu")}
    )
    save_settings(settings, folder / "settings.yaml")
    memory.check(work.model.config, settings.train, device)
    if not quiet:
        tokens = int(work.source.predictions(work.train).sum())
        print(foretold(work.model.config, settings.train, tokens, device), file=sys.stderr)
    work.model.to(device)
    outcome = learn(settings, work, folder, quiet)
    found = scored(settings, work, work.model.eval(), True)
    figures = {**found.figures, "loss": _finite(found.figures["loss"])}
    if work.settle is not None and len(work.held):
        work.settle(work.model, found.figures)
    if not settings.out.exists():
        lineage = lineage_of(
            settings, _about(work, tokenizer), settings.model, {"steps": outcome.steps, **figures}
        )
        own = closed(tokenizer) if settings.task == "translate" else tokenizer
        save(work.model, own, settings.out, lineage=lineage, card=card(settings, work, figures))
    return _report(settings, work, outcome, found, figures, folder, time.monotonic() - started)


def learn(settings: FinetuneSettings, work: Work, folder: Path, quiet: bool) -> Outcome:
    """Fit the model in place, and go back to its best checkpoint."""

    def validate(model: Any) -> dict[str, float]:
        figures = scored(settings, work, model, False).figures
        criterion = round(figures[work.best] * (-1 if work.higher else 1), 4)
        return {**figures, "criterion": criterion + TIE * min(figures["loss"], 100.0)}

    patience = settings.tasks.patience

    def enough(step: int, state: State) -> bool:
        evaluations = state.evaluations_since_best
        return patience is not None and evaluations >= patience

    outcome = fit(
        work.model,
        rows_of(settings, work, work.train),
        work.objective,
        settings.train,
        folder,
        seed=settings.seed,
        resume=settings.resume,
        validate=validate if len(work.held) else None,
        name_of=work.source.name,
        tokens_of=tokens_of,
        hooks=[enough],
        tensorboard=settings.track,
        quiet=quiet,
    )
    if outcome.best_step and outcome.best_step != outcome.steps:
        checkpoint.load_step(folder / "checkpoints", outcome.best_step, work.model)
    return outcome


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _about(work: Work, tokenizer: Tokenizer) -> Text:
    kept, sizes = work.ledger.total("kept"), work.source.predictions(work.train)
    manifest = hashlib.sha256(str(work.source.identity()).encode()).hexdigest()
    return Text(kept.documents, len(work.held), int(sizes.sum()), kept.bytes, manifest, tokenizer.fingerprint)


def card(settings: FinetuneSettings, work: Work, figures: Mapping[str, Any]) -> str:
    """README.md of the model: what it does, how to use it, how well."""
    name = settings.out.name
    scores = "\n".join(f"| {key.replace('_', ' ')} | {shown(value)} |" for key, value in figures.items())
    use = "\n".join(line for _, line in work.use)
    labels = work.model.config.head.labels if work.model.config.head else ()
    known = f"\n## Labels\n\n{', '.join(f'`{label}`' for label in labels[:200])}\n" if labels else ""
    head = (
        f"---\nlibrary_name: transformers\npipeline_tag: {PIPELINES[settings.task]}\ntags:\n- langmill\n---"
    )
    return (
        f"{head}\n# {name}\n\n`{Path(settings.model).name}`, taught to {settings.task} by {len(work.train):,} "
        f"{work.what}.\n\n## Use\n\n```\n{use}\n```\n{known}\n## Evaluation\n\nOn {len(work.held):,} {work.what} that "
        f"were kept out of training:\n\n| | |\n|---|---|\n{scores}\n\n## Training\n\nThis folder holds none of the "
        "texts; `lineage.json` holds their hash, the settings and the versions.\n\n## Limits\n\nThe model can be wrong "
        "where texts differ from those it learned from. Nobody has checked it for bias.\n"
    )


def _report(
    settings: FinetuneSettings, work: Work, outcome: Outcome, held: Scored, figures: Mapping[str, Any],
    folder: Path, seconds: float,
) -> Report:  # fmt: skip
    counts = {
        "examples": len(work.train),
        "held_out_examples": len(work.held),
        "tokens": outcome.tokens,
        "steps": outcome.steps,
        "best_step": outcome.best_step or outcome.steps,
        **work.counted,
    }
    found = {
        **figures,
        "parameters": parameters(work.model.config),
        "training_loss": outcome.loss,
        "tokens_per_second": outcome.tokens_per_second,
        "training_seconds": outcome.seconds,
        "peak_bytes": outcome.peak_bytes,
    }
    words = [
        f"{settings.out}: taught to {settings.task} by {len(work.train):,} {work.what} "
        f"in {seconds_shown(outcome.seconds)}, best after step {counts['best_step']} of {outcome.steps}",
        f"held out ({len(work.held):,}): "
        + ", ".join(f"{name.replace('_', ' ')} {shown(value)}" for name, value in figures.items())
        if len(work.held)
        else "held out: none, so nothing is known of how well: give more rows, or a larger --holdout",
    ]
    words += [", ".join(f"{count:,} {what}" for what, count in work.counted.items() if count)] * any(
        work.counted.values()
    )
    words += aside(work)
    words += [f"report: {folder / 'report.html'}", f"next: {work.use[0][1]}"]
    page = _page(settings, work, outcome, held, found, folder)
    extra = {"ledger": work.ledger.as_dict(), "note": work.note, **work.facts, **held.extra}
    return results.publish(settings.out, folder, page, counts, found, "\n".join(words), extra, seconds)


def aside(work: Work) -> list[str]:
    """Lines about the rows that were left out, and what was not looked at."""
    dropped = left_out(work.ledger)
    return [f"left out: {dropped}"] * bool(dropped) + [f"note: {work.note}"] * bool(work.note)


def _page(
    settings: FinetuneSettings,
    work: Work,
    outcome: Outcome,
    held: Scored,
    found: Mapping[str, Any],
    folder: Path,
) -> Page:
    rows = [("", Metrics(folder).rows())]
    first = [work.best, *(name for name in held.figures if name not in (work.best, "loss"))][:3]
    tiles = [
        Tile(name.replace("_", " "), shown(found[name]), f"on {len(work.held):,} held-out {work.what}")
        for name in first
        if name in found
    ]
    tiles.append(Tile("speed", f"{outcome.tokens_per_second:,.0f}/s", f"tokens; {outcome.choices.dtype}"))
    noted = [text(work.note, note=True)] if work.note else []
    sections: list[tuple[str, Html]] = [
        *held.sections,
        ("How it learned", join(loss_chart(rows), speed_chart(rows))),
        (f"The {work.what}", join(ledger(work.ledger.as_dict()), *noted)),
        *results.closing(outcome.choices.why, work.use, settings.model_dump(mode="json")),
    ]
    kicker = f"langmill finetune, {settings.task} · {time.strftime('%d %B %Y')} · {machine()}"
    summary = (
        f"{settings.model} ({shape(work.model.config)}) learned from {len(work.train):,} {work.what} in "
        f"{seconds_shown(outcome.seconds)}; {count_shown(found['parameters'])} parameters."
    )
    return Page(f"{settings.out.name}: what was taught, and how well", kicker, summary, tiles, (), sections)
