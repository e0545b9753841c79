"""What came of learning from rewards: the page, report.json, the card, and the last lines on the terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from langmill.common.metrics import Metrics, Report
from langmill.common.settings import FinetuneSettings
from langmill.families.folder import Model
from langmill.jobs import results
from langmill.jobs.card import shape
from langmill.jobs.charts import Series, line_chart
from langmill.jobs.finetune import left_out
from langmill.jobs.finetune_report import card as card_of
from langmill.jobs.finetune_report import next_commands, number_shown, percent_shown
from langmill.jobs.finetune_report import origin as origin
from langmill.jobs.prompts import Prepared
from langmill.jobs.reinforce import Found
from langmill.jobs.report import (
    Html,
    Page,
    Sample,
    Tile,
    count_shown,
    join,
    ledger,
    machine,
    samples,
    seconds_shown,
    text,
)  # fmt: skip
from langmill.model.count import parameters
from langmill.train.loop import Outcome

# title, (name, key in metrics.jsonl, style) of each line, what is measured
_CHARTS = (
    ("Reward", (("answers of the step", "reward", "s0"), ("held out", "eval_reward", "v0")), "mean reward"),
    ("How far the model went", (("KL from where it began", "kl", "s1"),), "nats a token"),
    ("Length of answers", (("answers of the step", "length", "s0"), ("held out", "eval_length", "v0")), "tokens"),
    ("Shares", (("ended by themselves", "stopped", "s0"), ("prompts without spread", "no_spread", "s2"),
                ("clipped tokens", "clipped", "s3")), "share"),
)  # fmt: skip


def write_report(
    settings: FinetuneSettings, model: Model, ready: Prepared, outcome: Outcome, before: Found, after: Found,
    folder: Path, seconds: float,
) -> Report:  # fmt: skip
    """Write the page and report.json."""
    rows = Metrics(folder).rows()
    r, names = settings.reinforce, dict.fromkeys(("reward", "length", "stopped", *after.figures))
    figures = {
        "parameters": parameters(model.config),
        "trainable_parameters": sum(w.numel() for w in model.parameters() if w.requires_grad),
        "training_loss": outcome.loss,
        **{f"before_{name}": before.figures.get(name) for name in names},
        **{name: after.figures.get(name) for name in names},
        "training_reward": _last(rows, "reward"),
        "kl": _last(rows, "kl"),
        "tokens_per_second": outcome.tokens_per_second,
        "training_seconds": outcome.seconds,
        "peak_bytes": outcome.peak_bytes,
    }
    counts = {
        "prompts": len(ready.train),
        "held_out_prompts": len(ready.held),
        "answered": len(after.answers),
        "steps": outcome.steps,
        "answers": -(-outcome.steps // r.num_iterations) * r.prompts_per_step * r.num_generations,
        "trained_tokens": outcome.tokens,
    }
    page = _page(settings, model, ready, outcome, (before, after), rows, figures, counts)
    words = "\n".join(_words(settings, outcome, figures, counts, folder, left_out(ready.ledger)))
    extra = {"ledger": ready.ledger.as_dict()}
    return results.publish(settings.out, folder, page, counts, figures, words, extra, seconds)


def _last(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """The last value that was measured."""
    return next((row[key] for row in reversed(rows) if row.get(key) is not None), None)


def _page(
    settings: FinetuneSettings, model: Model, ready: Prepared, outcome: Outcome, found: tuple[Found, Found],
    rows: Sequence[Mapping[str, Any]], figures: Mapping[str, Any], counts: Mapping[str, int],
) -> Page:  # fmt: skip
    now, then = percent_shown(figures["stopped"]), percent_shown(figures["before_stopped"])
    tiles = [
        Tile("reward, held out", number_shown(figures["reward"]), f"before {number_shown(figures['before_reward'])}"),
        Tile("stops by itself", now, f"before {then}"),
        Tile("KL from the start", number_shown(figures["kl"]), "nats a token, in the last step"),
        Tile("speed", f"{outcome.tokens_per_second:,.0f}/s", f"tokens of answers; {outcome.choices.dtype}"),
    ]  # fmt: skip
    named = ", ".join(settings.reinforce.reward)
    sections: list[tuple[str, Html]] = [
        ("How it learned", join(*_curves(rows))),
        ("Answers before and after", _answers(settings, *found)),
        ("The prompts", join(text(f"Answers were judged by {named}."), ledger(ready.ledger.as_dict()))),
        *results.closing(outcome.choices.why, next_commands(settings), settings.model_dump(mode="json")),
    ]
    kicker = f"langmill finetune, {settings.task} · {time.strftime('%d %B %Y')} · {machine()}"
    summary = (
        f"{settings.model} ({shape(model.config)}) learned from the rewards of {counts['answers']:,} answers to "
        f"{len(ready.train):,} prompts by GRPO (Shao et al. 2024), {settings.method}, in "
        f"{seconds_shown(outcome.seconds)}."
    )
    return Page(f"{settings.out.name}: what earns rewards now", kicker, summary, tiles, (), sections)


def _curves(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was measured at each step."""
    charts = []
    for title, lines, label in _CHARTS:
        drawn = [
            Series(name, [(row["step"], row[key]) for row in rows if row.get(key) is not None], style)
            for name, key, style in lines
        ]
        if any(series.points for series in drawn):
            charts.append(line_chart(title, drawn, "optimizer steps", label))
    return charts


def _answers(settings: FinetuneSettings, before: Found, after: Found) -> Html:
    """Side by side, under what was asked, with what each earned."""
    items = []
    for old, new in list(zip(before.answers, after.answers, strict=False))[: settings.samples]:
        items.append(Sample("asked", "", new["prompt"], "s3"))
        for name, answer, style in (("before", old, "s1"), ("after", new, "s0")):
            shown = answer["text"] + ("" if answer["stopped"] else " …")
            items.append(Sample(name, f"reward {answer['reward']:.3g}", shown, style))
    words = (
        f"{len(after.answers)} held-out prompts were answered once, drawn at temperature "
        f"{settings.reinforce.temperature:g}; … stands where the model did not stop by itself. Answers written during "
        "training are in the run folder, under samples."
    )
    return join(text(words, note=True), samples(items))


def _words(
    settings: FinetuneSettings, outcome: Outcome, found: Mapping[str, Any], counts: Mapping[str, int], folder: Path,
    aside: str,
) -> list[str]:  # fmt: skip
    lines = [
        f"{settings.out}: GRPO by {settings.method}, {count_shown(found['trainable_parameters'])} trained parameters",
        f"learned from {counts['answers']:,} answers to {counts['prompts']:,} prompts in "
        f"{seconds_shown(outcome.seconds)}; KL from the start {number_shown(found['kl'])} nats a token",
        f"held out ({counts['answered']:,} prompts): reward {number_shown(found['reward'])}, before "
        f"{number_shown(found['before_reward'])}; stops by itself {percent_shown(found['stopped'])}, before "
        f"{percent_shown(found['before_stopped'])}",
    ]
    lines += [f"left out: {aside}"] if aside else []
    return [*lines, f"report: {folder / 'report.html'}", f"next: {next_commands(settings)[0][1]}"]


def card(settings: FinetuneSettings, ready: Prepared, before: Found, after: Found) -> str:
    """README.md."""
    scored = "No prompt was held out."
    if after.answers:
        scored = (
            f"Drawn answers to {len(after.answers)} prompts that were kept out of training earn "
            f"{after.figures['reward']:.3f} in the mean; before it {before.figures['reward']:.3f}."
        )
    learned = f"earn rewards on {len(ready.train):,} prompts (GRPO, Shao et al. 2024)"
    return card_of(settings, learned, "prompts", scored)
