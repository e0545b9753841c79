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
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from langmill.apps import sentence
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
    table,
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
DIGITS = 4  # of the figure by which checkpoints are compared
CRITERION = "eval_criterion"  # as the metrics have it
TIE = 1e-7  # what the loss counts beside it: it decides between equals, and stays below its last digit
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
    figures = {name: _finite(value) for name, value in found.figures.items()}
    if work.settle is not None and len(work.held):
        work.settle(work.model, found.figures)
    _keep_limit(work)
    if not settings.out.exists():
        lineage = lineage_of(
            settings, _about(work, tokenizer), settings.model, {"steps": outcome.steps, **figures}
        )
        embed = settings.task == "embed" and not tokenizer.frame.stated
        own = closed(tokenizer) if settings.task == "translate" or embed else tokenizer
        save(work.model, own, settings.out, lineage=lineage, card=card(settings, work, figures))
    if (
        settings.task == "embed"
    ):  # again after an interruption, since it is no part of what `save` does at once
        sentence.write(settings.out, **work.facts["vectors"])
    return _report(settings, work, outcome, found, figures, folder, time.monotonic() - started)


def learn(settings: FinetuneSettings, work: Work, folder: Path, quiet: bool) -> Outcome:
    """Fit the model in place, and go back to its best checkpoint."""
    seen: list[float | None] = []  # the figure at each validation, the lower the better, None for none

    def validate(model: Any) -> dict[str, float]:
        if not seen:  # those before an interruption, with what the loss counted
            seen.extend(row[CRITERION] for row in Metrics(folder).rows() if CRITERION in row)
        figures = scored(settings, work, model, False).figures
        criterion = round(figures[work.best] * (-1 if work.higher else 1), DIGITS)
        seen.append(_finite(criterion))
        return {**figures, "criterion": criterion + TIE * min(figures["loss"], 100.0)}

    patience = settings.tasks.patience

    def enough(step: int, state: State) -> bool:
        return patience is not None and _since_best(seen) >= patience

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


def _since_best(seen: Sequence[float | None]) -> int:
    """Validations since the lowest figure was first reached: that the loss fell further is no gain."""
    plain = [math.inf if figure is None else round(figure, DIGITS) for figure in seen]
    return len(plain) - 1 - plain.index(min(plain)) if plain else 0


def _keep_limit(work: Work) -> None:
    """How texts were cut goes with the model, so that its use cuts them so too."""
    head = work.model.config.head
    if head is not None and work.limit is not None:
        work.model.config = replace(work.model.config, head=replace(head, limit=work.limit))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _told(name: str, value: Any) -> str:
    """A figure for people; a threshold that is none is never reached."""
    return "never" if name == "answer_threshold" and value is None else shown(value)


def _about(work: Work, tokenizer: Tokenizer) -> Text:
    kept, sizes = work.ledger.total("kept"), work.source.predictions(work.train)
    manifest = hashlib.sha256(str(work.source.identity()).encode()).hexdigest()
    return Text(
        kept.documents, work.count(work.held), int(sizes.sum()), kept.bytes, manifest, tokenizer.fingerprint
    )


def card(settings: FinetuneSettings, work: Work, figures: Mapping[str, Any]) -> str:
    """README.md of the model: what it does, how to use it, how well."""
    name = settings.out.name
    scores = "\n".join(f"| {key.replace('_', ' ')} | {_told(key, value)} |" for key, value in figures.items())
    use = "\n".join(line for _, line in work.use)
    labels = work.model.config.head.labels if work.model.config.head else ()
    known = f"\n## Labels\n\n{', '.join(f'`{label}`' for label in labels[:200])}\n" if labels else ""
    limit = work.limit
    long = (
        f"\nOf a text it reads {limit.length} tokens at once; with longer ones it does as in training (`--long-texts "
        f"{limit.policy}`), where nothing else is asked for.\n"
        if limit
        else ""
    )
    head = (
        f"---\nlibrary_name: transformers\npipeline_tag: {PIPELINES[settings.task]}\ntags:\n- langmill\n---"
    )
    return (
        f"{head}\n# {name}\n\n`{Path(settings.model).name}`, taught to {settings.task} by "
        f"{work.counted_in_words(work.train)}.\n\n## Use\n\n```\n{use}\n```\n{long}{known}\n"
        f"## Evaluation\n\nOn {work.counted_in_words(work.held)} that were kept out of training:\n\n| | |\n"
        f"|---|---|\n{scores}\n\n## Training\n\nThis folder holds none of the texts; `lineage.json` "
        "holds their hash, the settings and the versions.\n\n## Limits\n\nThe model can be wrong where texts differ "
        "from those it learned from. Nobody has checked it for bias.\n"
    )


def _report(
    settings: FinetuneSettings, work: Work, outcome: Outcome, held: Scored, figures: Mapping[str, Any],
    folder: Path, seconds: float,
) -> Report:  # fmt: skip
    examples, held_out = work.count(work.train), work.count(work.held)
    in_windows = examples + held_out < len(work.train) + len(work.held)
    windows = {"training_windows": len(work.train), "held_out_windows": len(work.held)} if in_windows else {}
    counts = {
        "examples": examples,
        "held_out_examples": held_out,
        **windows,
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
        f"{settings.out}: taught to {settings.task} by {work.counted_in_words(work.train)} "
        f"in {seconds_shown(outcome.seconds)}, best after step {counts['best_step']} of {outcome.steps}",
        f"held out ({held_out:,}): "
        + ", ".join(f"{name.replace('_', ' ')} {_told(name, value)}" for name, value in figures.items())
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
        Tile(
            name.replace("_", " "),
            _told(name, found[name]),
            f"on {work.count(work.held):,} held-out {work.what}",
        )
        for name in first
        if name in found
    ]
    tiles.append(Tile("speed", f"{outcome.tokens_per_second:,.0f}/s", f"tokens; {outcome.choices.dtype}"))
    noted = [text(work.note, note=True)] if work.note else []
    sections: list[tuple[str, Html]] = [
        *(held.sections or _figures(work, held)),
        ("How it learned", join(loss_chart(rows), speed_chart(rows))),
        (f"The {work.what}", join(ledger(work.ledger.as_dict()), *noted)),
        *results.closing(outcome.choices.why, work.use, settings.model_dump(mode="json")),
    ]
    kicker = f"langmill finetune, {settings.task} · {time.strftime('%d %B %Y')} · {machine()}"
    summary = (
        f"{settings.model} ({shape(work.model.config)}) learned from {work.counted_in_words(work.train)} in "
        f"{seconds_shown(outcome.seconds)}; {count_shown(found['parameters'])} parameters."
    )
    return Page(f"{settings.out.name}: what was taught, and how well", kicker, summary, tiles, (), sections)


def _figures(work: Work, held: Scored) -> list[tuple[str, Html]]:
    """All figures, of a task that shows no more of them."""
    if not len(work.held):
        return []
    rows = [(name.replace("_", " "), _told(name, value)) for name, value in held.figures.items()]
    caption = f"On {work.count(work.held):,} held-out {work.what}"
    return [("How well", table(caption, ("figure", "value"), rows, numbers=1))]
