"""What came of a pretraining run: the page, report.json, and the last lines on the terminal."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from langmill.common.files import atomic_write, write_json
from langmill.common.metrics import Metrics, Report
from langmill.common.settings import PretrainSettings
from langmill.evaluate.loss import Scores
from langmill.jobs.card import shape
from langmill.jobs.charts import Bar, bar_chart
from langmill.jobs.corpus import Corpus
from langmill.jobs.heldout import Model, figures, prompts, samples, yardsticks
from langmill.jobs.report import (
    Html, Page, Tile, bytes_shown, commands, count_shown, folded, join, ledger, loss_chart, machine, render,
    seconds_shown, shown, speed_chart, table, text,
)  # fmt: skip
from langmill.jobs.report import samples as shown_samples
from langmill.jobs.report import settings as shown_settings
from langmill.model.count import parameters
from langmill.train.loop import Outcome

ENOUGH = 20  # tokens a parameter: Hoffmann et al. 2022, arXiv:2203.15556, table 3
FEW = 5  # below this the report says that the text is too small for the model


@dataclass(frozen=True)
class Result:
    """A trained model with what was measured; `before` is the score of the --from model, `folder` the run's."""

    model: Model
    outcome: Outcome
    scores: Scores | None
    before: Scores | None
    folder: Path


def write_report(
    settings: PretrainSettings, corpus: Corpus, result: Result, folder: Path, seconds: float, quiet: bool
) -> Report:
    """Write report.html and, last of all, report.json; hand back what the command prints."""
    outcome, scores, before = result.outcome, result.scores, result.before
    found: dict[str, Any] = {
        "parameters": parameters(result.model.config),
        "training_loss": outcome.loss,
        "tokens_per_second": outcome.tokens_per_second,
        "training_seconds": outcome.seconds,
        "peak_bytes": outcome.peak_bytes,
    }
    if scores is not None:
        chosen = corpus.held_out(scores.tokens)
        found |= figures(scores) | {f"{k}_bits_per_byte": v for k, v in yardsticks(corpus, chosen).items()}
    if before is not None:
        found |= {f"before_{name}": value for name, value in figures(before).items()}
    counts = {
        "documents": corpus.shards.documents,
        "held_out_documents": len(corpus.held),
        "tokens": corpus.shards.tokens,
        "bytes": corpus.shards.bytes,
        "vocabulary": corpus.tokenizer.vocab_size,
        "steps": outcome.steps,
        "tokens_trained": outcome.tokens,
        "skipped_steps": outcome.skipped,
    }
    notices = too_little(settings, corpus, found["parameters"], outcome)
    page = _page(settings, corpus, result, found, notices, quiet)
    atomic_write(folder / "report.html", render(page))
    words = _words(settings, result, found, notices, folder)
    extra = {"run": str(folder), "report": str(folder / "report.html"), "notices": notices, "ledger": corpus.shards.ledger}
    saved = {"counts": counts, "figures": found, "text": words, "extra": extra, "seconds": seconds}
    write_json(folder / "report.json", saved, "report", 1)
    return Report(settings.out, counts, found, words, extra)


def too_little(settings: PretrainSettings, corpus: Corpus, count: int, outcome: Outcome) -> list[str]:
    """What to know about a run whose text, or time, is too small for its model, and the way out."""
    ratio, unique = outcome.tokens / count, corpus.train_tokens / count
    if settings.from_model or ratio >= FEW:
        return []
    short = "text" if unique < FEW else "training"
    return [
        f"The {short} is small for this model: it has seen {ratio:.2g} tokens for each parameter, and about {ENOUGH} "
        "make good use of one (Hoffmann et al. 2022). What it writes will look like the text without making much "
        "sense. To go on from a model that can write already: langmill pretrain PATH --from MODEL --out DIR (a folder, "
        ".gguf file or hub id); or choose a smaller --size, or give more text."
    ]


def _page(
    settings: PretrainSettings, corpus: Corpus, result: Result, found: dict[str, Any], notices: list[str], quiet: bool
) -> Page:
    outcome, scores = result.outcome, result.scores
    name = settings.out.name
    rows = Metrics(result.folder).rows()
    t = settings.train
    epochs = outcome.tokens / corpus.train_tokens
    summary = (
        f"{shape(result.model.config)}: {count_shown(found['parameters'])} parameters"
        f"{f', continued from {settings.from_model},' if settings.from_model else ''} read "
        f"{count_shown(outcome.tokens)} tokens ({epochs:.2g} times the text) in {seconds_shown(outcome.seconds)}."
    )
    if scores is not None:
        summary += f" It needs {scores.bits_per_byte:.3f} bits for each byte of text that it has never seen."
    tiles = [
        Tile("held-out bits per byte", "–" if scores is None else f"{scores.bits_per_byte:.3f}", _interval(scores)),
        Tile("parameters", count_shown(found["parameters"]), f"vocabulary {corpus.tokenizer.vocab_size:,}"),
        Tile("tokens read", count_shown(outcome.tokens), f"{outcome.steps:,} steps of {t.micro_batch_size} × {t.max_length}"),
        Tile("speed", f"{outcome.tokens_per_second:,.0f}/s", f"tokens; {outcome.choices.threads} threads, {outcome.choices.dtype}"),
    ]
    written = samples(result.model, corpus.tokenizer, prompts(corpus, 4), name, "s0", settings.seed)
    sections: list[tuple[str, Html]] = [
        ("Held-out text", _scored(result, found, corpus)),
        ("How it learned", join(loss_chart([("", rows)]), speed_chart([("", rows)]))),
        ("What it writes", join(text("Each prompt is the beginning of a held-out document.", note=True), shown_samples(written))),
        ("The text", join(ledger(corpus.shards.ledger), text(corpus.shards.manifest["encoder"], note=True))),
        ("Measured choices", table("Measured once, kept for the whole run", ("choice",), [(why,) for why in outcome.choices.why])),
        ("How to go on", commands(next_commands(settings))),
        ("Settings", folded("All settings as resolved", shown_settings(settings.model_dump(mode="json", by_alias=True)))),
    ]  # fmt: skip
    kicker = f"langmill pretrain · {time.strftime('%d %B %Y')} · {machine()}"
    return Page(f"{name}: what was trained, and how well", kicker, summary, tiles, notices, sections)


def _interval(scores: Scores | None) -> str:
    if scores is None or scores.bits_per_byte_interval is None:
        return ""
    low, high = scores.bits_per_byte_interval
    return f"95 % interval {low:.3f} to {high:.3f}"


def _scored(result: Result, found: dict[str, Any], corpus: Corpus) -> Html:
    scores, before = result.scores, result.before
    if scores is None:
        return text("No document was held out, so nothing says how well the model predicts new text.")
    models = [("this model", scores, "s0")] + ([("before", before, "s1")] if before is not None else [])
    others = [(name, found[f"{name}_bits_per_byte"], f"s{i}") for i, name in enumerate(("xz", "gzip"), 2)]
    bars = [Bar(name, s.bits_per_byte, s.bits_per_byte_interval, style) for name, s, style in models]
    bars += [Bar(name, value, None, style) for name, value, style in others]
    rows: list[tuple[object, ...]] = [
        (name, f"{s.bits_per_byte:.3f}", _interval(s), f"{s.loss:.3f}", shown(s.perplexity)) for name, s, _ in models
    ]
    rows += [(name, f"{value:.3f}", None, None, None) for name, value, _ in others]
    caption = (
        f"{scores.documents:,} of {len(corpus.held):,} held-out documents, {bytes_shown(scores.bytes)}, each scored in its "
        "own context; intervals by bootstrap over documents. The compressors see them as one stream."
    )
    head = ("", "bits per byte", "interval", "nats a token", "perplexity")
    return join(bar_chart("Bits per byte: lower is better", bars, "bits per byte of held-out text"), table(caption, head, rows))


def next_commands(settings: PretrainSettings) -> list[tuple[str, str]]:
    """What to do with the model now."""
    out = shlex.quote(settings.out.as_posix())
    path = " ".join(map(shlex.quote, settings.path))
    return [
        ("Write with it:", f'langmill generate {out} "Once upon a time" --temperature 0.7'),
        ("Score it on other text:", f"langmill evaluate {out} --on FILE"),
        ("Go on training it, on this or other text:", f"langmill pretrain {path} --from {out} --out {out}-2"),
    ]


def _words(
    settings: PretrainSettings, result: Result, found: dict[str, Any], notices: list[str], folder: Path
) -> str:
    outcome, scores, before = result.outcome, result.scores, result.before
    lines = [
        f"{settings.out}: {shape(result.model.config)}, {count_shown(found['parameters'])} parameters",
        f"trained on {count_shown(outcome.tokens)} tokens in {seconds_shown(outcome.seconds)} "
        f"({outcome.tokens_per_second:,.0f} tokens/s), training loss {shown(outcome.loss)}",
    ]
    if scores is not None:
        was = "" if before is None else f" (before: {before.bits_per_byte:.3f})"
        lines.append(
            f"held out: {scores.bits_per_byte:.3f} bits per byte{was}, {_interval(scores) or 'one document'}; "
            f"xz {found['xz_bits_per_byte']:.3f}, gzip {found['gzip_bits_per_byte']:.3f}"
        )
    lines += [f"note: {notice}" for notice in notices]
    lines += [f"report: {folder / 'report.html'}", f"next: {next_commands(settings)[0][1]}"]
    return "\n".join(lines)
