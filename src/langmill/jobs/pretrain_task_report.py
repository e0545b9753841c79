"""What came of pretraining a model that guesses: the page, report.json, the card, the last lines on the terminal."""

from __future__ import annotations

import time
from typing import Any

from langmill import __version__
from langmill.common.metrics import Report
from langmill.common.settings import PretrainSettings
from langmill.jobs import results
from langmill.jobs.card import Text, shape
from langmill.jobs.charts import Bar, bar_chart
from langmill.jobs.corpus import Corpus
from langmill.jobs.pretrain_task import Guesses
from langmill.jobs.report import (
    Html,
    Page,
    Tile,
    bytes_shown,
    commands,
    count_shown,
    folded,
    join,
    loss_chart,
    machine,
    seconds_shown,
    shown,
    speed_chart,
    table,
    text,
)  # fmt: skip
from langmill.jobs.report import settings as shown_settings
from langmill.jobs.results import Entrant, between, path_shown, three
from langmill.model.config import Config
from langmill.model.count import parameters

WHAT = {"masked": "hidden tokens", "denoise": "tokens of damaged texts"}
TASKS = {"masked": "classify", "denoise": "translate"}
PIPELINES = {
    "masked": ("fill-mask", "AutoModelForMaskedLM"),
    "denoise": ("translation", "AutoModelForSeq2SeqLM"),
}


def write_guesses(
    settings: PretrainSettings, corpus: Corpus, entrant: Entrant, scores: Guesses | None, before: Guesses | None,
    seconds: float,
) -> Report:  # fmt: skip
    """Write the page and report.json. Figures: those of Guesses (`before_` the same with --from), training_loss,
    tokens_per_second, training_seconds, peak_bytes, parameters."""
    found: dict[str, Any] = {
        **entrant.figures,
        **({} if scores is None else scores.figures),
        **({} if before is None else {f"before_{name}": value for name, value in before.figures.items()}),
    }
    counts = entrant.counts(corpus)
    page = _page(settings, corpus, entrant, scores, before)
    words = "\n".join(_words(settings, entrant, scores, before))
    extra = {"notices": [], "ledger": corpus.shards.ledger}
    return results.publish(settings.out, entrant.folder, page, counts, found, words, extra, seconds)


def _page(
    settings: PretrainSettings,
    corpus: Corpus,
    entrant: Entrant,
    scores: Guesses | None,
    before: Guesses | None,
) -> Page:
    rows, name = [("", entrant.rows)], settings.out.name
    origin = f", continued from {settings.from_model}," if settings.from_model else ""
    summary = (
        f"{shape(entrant.model.config)}: {count_shown(entrant.parameters)} parameters{origin} read "
        f"{count_shown(entrant.outcome.tokens)} tokens in {seconds_shown(entrant.outcome.seconds)}."
    )
    if scores is not None:
        what = WHAT[settings.train.objective]
        summary += f" Of {what} in documents that it has never seen it guesses {scores.accuracy:.1%} right."
    tiles = results.tiles(entrant, corpus)
    tiles[0] = Tile(
        "held-out loss",
        "–" if scores is None else three(scores.loss),
        f"nats a token; {'' if scores is None else between(scores.loss_interval) or settings.train.objective}",
    )
    resolved = shown_settings(settings.model_dump(mode="json", by_alias=True))
    sections: list[tuple[str, Html]] = [
        ("Held-out text", _scored(settings, corpus, entrant, scores, before)),
        ("How it learned", join(loss_chart(rows), speed_chart(rows))),
        ("The text", results.text_section(corpus)),
        ("Measured choices", results.choices_section([entrant])),
        ("How to go on", commands(next_commands(settings))),
        ("Settings", folded("All settings as resolved", resolved)),
    ]
    kicker = f"langmill pretrain, {settings.train.objective} · {time.strftime('%d %B %Y')} · {machine()}"
    return Page(f"{name}: what was trained, and how well", kicker, summary, tiles, (), sections)


def _scored(
    settings: PretrainSettings,
    corpus: Corpus,
    entrant: Entrant,
    scores: Guesses | None,
    before: Guesses | None,
) -> Html:
    if scores is None:
        return text("No document was held out, so nothing says how well the model guesses in new text.")
    both = [
        (entrant.name, "s0", scores),
        *([] if before is None else [("before this training", "s1", before)]),
    ]
    bars = [Bar(name, found.loss, found.loss_interval, style) for name, style, found in both]
    bars.append(Bar("frequencies alone", scores.unigram_entropy, None, "s2"))
    rows: list[tuple[object, ...]] = [
        (name, three(found.loss), between(found.loss_interval), _share(found)) for name, _, found in both
    ]
    rows.append(("frequencies alone", three(scores.unigram_entropy), None, None))
    caption = (
        f"{scores.guessed:,} {WHAT[settings.train.objective]} of {scores.documents:,} of {len(corpus.held):,} held-out "
        "documents, damaged the same way each time; 95 % intervals by bootstrap over documents. Frequencies alone: the "
        "entropy of those tokens, which no guess beats that does not look at the text."
    )
    chart = bar_chart("Nats a token: lower is better", bars, "nats a guessed token of held-out text")
    return join(
        chart, table(caption, ("", "nats a token", "95 % interval", "guessed right"), rows, numbers=3)
    )


def _share(found: Guesses) -> str:
    """What was guessed right, with its interval."""
    low, high = found.accuracy_interval or (None, None)
    return f"{found.accuracy:.1%}" + ("" if low is None else f" ({low:.1%} to {high:.1%})")


def next_commands(settings: PretrainSettings) -> list[tuple[str, str]]:
    """What to do with the model now."""
    out, paths = path_shown(settings.out), " ".join(map(path_shown, settings.path))
    objective = settings.train.objective
    task = TASKS[objective]
    return [
        ("Teach it a task:", f"langmill finetune {out} --task {task} --data FILE --out {out}-{task}"),
        (
            "Go on training it, on this or other text:",
            f"langmill pretrain {paths} --from {out} --train.objective {objective} --out {out}-2",
        ),
    ]


def _words(
    settings: PretrainSettings, entrant: Entrant, scores: Guesses | None, before: Guesses | None
) -> list[str]:
    outcome = entrant.outcome
    lines = [
        f"{settings.out}: {shape(entrant.model.config)}, {count_shown(entrant.parameters)} parameters",
        f"read {count_shown(outcome.tokens)} tokens in {seconds_shown(outcome.seconds)} "
        f"({outcome.tokens_per_second:,.0f} tokens/s), training loss {shown(outcome.loss)}",
    ]
    if scores is not None:
        range = f" ({between(scores.loss_interval)})" if scores.loss_interval else ""
        was = "" if before is None else f", before {three(before.loss)}"
        lines.append(
            f"held out: {three(scores.loss)} nats{range}{was} for each of {scores.guessed:,} "
            f"{WHAT[settings.train.objective]}, {_share(scores)} right; frequencies alone "
            f"{three(scores.unigram_entropy)}"
        )
    return [*lines, f"report: {entrant.folder / 'report.html'}", f"next: {next_commands(settings)[0][1]}"]


def card(
    name: str, objective: str, config: Config, about: Text, parent: str | None, scores: Guesses | None
) -> str:
    """README.md of the model: what it is for, what it was trained on and how well it guesses. parent: its name."""
    pipeline, loader = PIPELINES[objective]
    origin = f"It continues the training of `{parent}`." if parent else "It was trained from random weights."
    scored = "No document was held out." if scores is None else (
        f"Of {scores.guessed:,} {WHAT[objective]} in {scores.documents:,} documents that were kept out of training it "
        f"guesses {scores.accuracy:.1%} right, at {scores.loss:.3f} nats each."
    )  # fmt: skip
    task = TASKS[objective]
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: {pipeline}\ntags:\n- langmill\n---\n# {name}\n\n"
        f"A language model with {count_shown(parameters(config))} parameters ({shape(config)}), made with Langmill "
        f"{__version__}. {origin} It is meant to be taught a task.\n\n"
        f"## Use\n\n```\nlangmill finetune {name} --task {task} --data FILE\n```\n\nWith transformers:\n\n```python\n"
        f"from transformers import AutoTokenizer, {loader}\n\n"
        f'model = {loader}.from_pretrained("{name}")\ntokenizer = AutoTokenizer.from_pretrained("{name}")\n```\n\n'
        f"## Training text\n\n{about.documents:,} documents, {about.tokens:,} tokens, {bytes_shown(about.bytes)}. "
        "This folder holds none of it; `lineage.json` holds its hash, the settings and the versions.\n\n"
        f"## Evaluation\n\n{scored}\n\n## Limits\n\nWhat it guesses follows the text it has seen, with its errors and "
        "its bias, and can repeat parts of it, private ones included. Nobody has checked it for bias or safety.\n"
    )
