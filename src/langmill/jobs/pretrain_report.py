"""What came of a pretraining run: the page, report.json, and the last lines on the terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from langmill.common.metrics import Report
from langmill.common.settings import PretrainSettings
from langmill.evaluate.loss import Scores
from langmill.jobs import results
from langmill.jobs.card import shape
from langmill.jobs.corpus import Corpus
from langmill.jobs.heldout import figures, prompts, samples, yardsticks
from langmill.jobs.report import (
    Html,
    Page,
    commands,
    count_shown,
    folded,
    join,
    loss_chart,
    machine,
    seconds_shown,
    shown,
    speed_chart,
    text,
)  # fmt: skip
from langmill.jobs.report import samples as shown_samples
from langmill.jobs.report import settings as shown_settings
from langmill.jobs.results import Entrant, between, path_shown, three


def write_report(
    settings: PretrainSettings, corpus: Corpus, entrant: Entrant, before: Scores | None, seconds: float
) -> Report:
    """Write the page and report.json. `before`: the score of the model that the run went on from."""
    outcome, scores = entrant.outcome, entrant.scores
    compressed = yardsticks(corpus, corpus.held_out(scores.tokens)) if scores is not None else {}
    found: dict[str, Any] = {
        **entrant.figures,
        **(figures(scores) if scores is not None else {}),
        **{f"{name}_bits_per_byte": value for name, value in compressed.items()},
        **{
            f"before_{name}": value for name, value in (figures(before) if before is not None else {}).items()
        },
    }
    counts = entrant.counts(corpus)
    notices: list[str] = []
    if not settings.from_model:
        notices = results.too_little(entrant.parameters, outcome.tokens, corpus.train_tokens)
    page = _page(settings, corpus, entrant, before, compressed, notices)
    words = "\n".join(_words(settings, entrant, before, compressed, notices))
    extra = {"notices": notices, "ledger": corpus.shards.ledger}
    return results.publish(settings.out, entrant.folder, page, counts, found, words, extra, seconds)


def _page(
    settings: PretrainSettings, corpus: Corpus, entrant: Entrant, before: Scores | None,
    compressed: Mapping[str, float], notices: list[str],
) -> Page:  # fmt: skip
    name, rows = settings.out.name, [("", entrant.rows)]
    texts = prompts(corpus, 4)
    written = samples(entrant.model, corpus.tokenizer, texts, "", "s0", settings.seed)
    begun = text("Each prompt is the beginning of a held-out document.", note=True)
    resolved = shown_settings(settings.model_dump(mode="json", by_alias=True))
    sections: list[tuple[str, Html]] = [
        ("Held-out text", _scored(corpus, entrant, before, compressed)),
        ("How it learned", join(loss_chart(rows), speed_chart(rows))),
        ("What it writes", join(begun, shown_samples(written))),
        ("The text", results.text_section(corpus)),
        ("Measured choices", results.choices_section([entrant])),
        ("How to go on", commands(next_commands(settings))),
        ("Settings", folded("All settings as resolved", resolved)),
    ]
    kicker = f"langmill pretrain · {time.strftime('%d %B %Y')} · {machine()}"
    title = f"{name}: what was trained, and how well"
    return Page(title, kicker, _summary(settings, entrant), results.tiles(entrant, corpus), notices, sections)


def _summary(settings: PretrainSettings, entrant: Entrant) -> str:
    origin = f", continued from {settings.from_model}," if settings.from_model else ""
    words = (
        f"{shape(entrant.model.config)}: {count_shown(entrant.parameters)} parameters{origin} read "
        f"{count_shown(entrant.outcome.tokens)} tokens in {seconds_shown(entrant.outcome.seconds)}."
    )
    if entrant.scores is None:
        return words
    return f"{words} It needs {entrant.scores.bits_per_byte:.3f} bits for each byte of text that it has never seen."


def _scored(corpus: Corpus, entrant: Entrant, before: Scores | None, compressed: Mapping[str, float]) -> Html:
    if entrant.scores is None:
        return text("No document was held out, so nothing says how well the model predicts new text.")
    scored = [(entrant.name, "s0", entrant.parameters, entrant.scores)]
    if before is not None:
        scored.append(("before this training", "s1", entrant.parameters, before))
    return results.comparison(scored, compressed, corpus)


def next_commands(settings: PretrainSettings) -> list[tuple[str, str]]:
    """What to do with the model now."""
    out, paths = path_shown(settings.out), " ".join(map(path_shown, settings.path))
    return [
        ("Write with it:", f'langmill generate {out} "Once upon a time" --temperature 0.7'),
        ("Score it on other text:", f"langmill evaluate {out} --on FILE"),
        (
            "Go on training it, on this or other text:",
            f"langmill pretrain {paths} --from {out} --out {out}-2",
        ),
    ]


def _words(
    settings: PretrainSettings, entrant: Entrant, before: Scores | None, compressed: Mapping[str, float],
    notices: list[str],
) -> list[str]:  # fmt: skip
    outcome, scores = entrant.outcome, entrant.scores
    lines = [
        f"{settings.out}: {shape(entrant.model.config)}, {count_shown(entrant.parameters)} parameters",
        f"trained on {count_shown(outcome.tokens)} tokens in {seconds_shown(outcome.seconds)} "
        f"({outcome.tokens_per_second:,.0f} tokens/s), training loss {shown(outcome.loss)}",
    ]
    if scores is not None:
        was = "" if before is None else f", before {three(before.bits_per_byte)}"
        interval = scores.bits_per_byte_interval and f" ({between(scores.bits_per_byte_interval)})"
        others = ", ".join(f"{name} {three(value)}" for name, value in compressed.items())
        lines.append(f"held out: {three(scores.bits_per_byte)} bits per byte{interval or ''}{was}; {others}")
    lines += [f"note: {notice}" for notice in notices]
    return [*lines, f"report: {entrant.folder / 'report.html'}", f"next: {next_commands(settings)[0][1]}"]
