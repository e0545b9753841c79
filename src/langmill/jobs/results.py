"""What the reports of training jobs have in common: who took part, how they compare, what was chosen."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from langmill.common.files import atomic_write, write_json
from langmill.common.metrics import Metrics, Report
from langmill.evaluate.loss import Interval, Scores
from langmill.families.folder import Model
from langmill.jobs.charts import Bar, bar_chart
from langmill.jobs.corpus import Corpus
from langmill.jobs.report import (
    Html,
    Page,
    Tile,
    bytes_shown,
    commands,
    count_shown,
    folded,
    join,
    ledger,
    render,
    settings,
    table,
    text,
)  # fmt: skip
from langmill.model.count import parameters
from langmill.train.loop import Outcome

ENOUGH = 20  # tokens a parameter: Hoffmann et al. 2022, arXiv:2203.15556, table 3
FEW = 5  # below this the report says that the text is too small for the model
YARDSTICKS = (("xz", "xz", "s2"), ("gzip", "gzip -9", "s3"))


@dataclass(frozen=True)
class Entrant:
    """A trained model with what was measured. `folder` holds its metrics, `style` is its colour in charts."""

    name: str
    model: Model
    outcome: Outcome
    scores: Scores | None
    folder: Path
    style: str = "s0"

    @property
    def parameters(self) -> int:
        return parameters(self.model.config)

    @property
    def rows(self) -> list[dict[str, Any]]:
        return Metrics(self.folder).rows()

    @property
    def figures(self) -> dict[str, Any]:
        """What training it was like."""
        outcome = self.outcome
        return {
            "parameters": self.parameters,
            "training_loss": outcome.loss,
            "tokens_per_second": outcome.tokens_per_second,
            "training_seconds": outcome.seconds,
            "peak_bytes": outcome.peak_bytes,
        }

    def counts(self, corpus: Corpus) -> dict[str, int]:
        """Of the text and of the run."""
        done = self.outcome
        return {
            **corpus.counts,
            "steps": done.steps,
            "tokens_trained": done.tokens,
            "skipped_steps": done.skipped,
        }


def too_little(count: int, trained: int, unique: int) -> list[str]:
    """What to know about a model of `count` parameters whose text, or time, was too small for it, and the way out."""
    ratio = trained / count
    if ratio >= FEW:
        return []
    short = "text" if unique < FEW * count else "training"
    return [
        f"The {short} is small for this model: it has seen {ratio:.2g} tokens for each parameter, and about {ENOUGH} "
        "make good use of one (Hoffmann et al. 2022). What it writes will look like the text without making much "
        "sense. To go on from a model that can write already: langmill pretrain PATH --from MODEL --out DIR (a folder, "
        ".gguf file or hub id); or choose a smaller --size, or give more text."
    ]


def tiles(entrant: Entrant, corpus: Corpus) -> list[Tile]:
    """The figures that a report begins with."""
    scores, outcome, choices = entrant.scores, entrant.outcome, entrant.outcome.choices
    score = "–" if scores is None else three(scores.bits_per_byte)
    interval = "" if scores is None else between(scores.bits_per_byte_interval)
    times = f"{outcome.tokens / corpus.train_tokens:.2g} times the text"
    return [
        Tile("held-out bits per byte", score, interval),
        Tile("parameters", count_shown(entrant.parameters), f"vocabulary {corpus.tokenizer.vocab_size:,}"),
        Tile("tokens read", count_shown(outcome.tokens), times),
        Tile(
            "speed",
            f"{outcome.tokens_per_second:,.0f}/s",
            f"tokens; {choices.threads} threads, {choices.dtype}",
        ),
    ]


def comparison(
    scored: Sequence[tuple[str, str, int, Scores]], compressed: Mapping[str, float], corpus: Corpus
) -> Html:
    """Bits per byte of models (name, style, parameters, scores) and compressors, as a chart and a table."""
    bars, rows = [], list[tuple[object, ...]]()
    for name, style, count, s in scored:
        bars.append(Bar(name, s.bits_per_byte, s.bits_per_byte_interval, style))
        cells = (three(s.bits_per_byte), between(s.bits_per_byte_interval), three(s.loss))
        rows.append((name, count, *cells))
    for key, name, style in YARDSTICKS:
        bars.append(Bar(name, compressed[key], None, style))
        rows.append((name, None, three(compressed[key]), None, None))
    first = scored[0][3]
    caption = (
        f"{first.documents:,} of {len(corpus.held):,} held-out documents, {bytes_shown(first.bytes)}, each scored "
        "in its own context; 95 % intervals by bootstrap over documents. The compressors see the documents as one "
        "stream, so they may learn from earlier ones."
    )
    best = min(range(len(bars)), key=lambda i: bars[i].value)
    head = ("", "parameters", "bits per byte", "95 % interval", "nats a token")
    chart = bar_chart("Bits per byte: lower is better", bars, "bits per byte of held-out text")
    return join(chart, table(caption, head, rows, numbers=4, best=best))


def text_section(corpus: Corpus) -> Html:
    """The ledger, and how the text was encoded."""
    manifest = corpus.shards.manifest
    return join(ledger(corpus.shards.ledger), text(f"Encoded by {manifest['encoder']}.", note=True))


def choices_section(entrants: Sequence[Entrant]) -> Html:
    """What was measured on this machine and chosen."""
    rows = [(e.name, why) for e in entrants for why in e.outcome.choices.why]
    return table("Measured once at the start and kept for the whole run", ("model", "choice"), rows)


def closing(
    choices: Sequence[str], use: Iterable[tuple[str, str]], resolved: Mapping[str, Any]
) -> list[tuple[str, Html]]:
    """The last sections of a report: what was measured and chosen, what to do now, all settings."""
    return [
        ("Measured choices", table("Measured once at the start", ("choice",), [(why,) for why in choices])),
        ("How to go on", commands(use)),
        ("Settings", folded("All settings as resolved", settings(resolved))),
    ]


def publish(
    out: Path, folder: Path, page: Page, counts: Mapping[str, Any], figures: Mapping[str, Any], words: str,
    extra: Mapping[str, Any], seconds: float,
) -> Report:  # fmt: skip
    """Write report.html and, last of all, report.json; hand back what the command prints."""
    atomic_write(folder / "report.html", render(page))
    extra = {"run": str(folder), "report": str(folder / "report.html"), **extra}
    saved = {"counts": counts, "figures": figures, "text": words, "extra": extra, "seconds": seconds}
    write_json(folder / "report.json", saved, "report", 1)
    return Report(out, counts, figures, words, extra)


def path_shown(path: Path | str) -> str:
    """A path as it stands in a command line."""
    return shlex.quote(path.as_posix() if isinstance(path, Path) else path)


def three(value: float) -> str:
    """Three digits behind the point."""
    return f"{value:.3f}"


def between(interval: Interval | None) -> str:
    """A 95 % interval in words."""
    return "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
