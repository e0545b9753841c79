"""What came of learning preferences: the page, report.json, the card, and the last lines on the terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from langmill.adapt.prefer import Judged
from langmill.common.metrics import Metrics, Report
from langmill.common.settings import FinetuneSettings
from langmill.families.folder import Model
from langmill.jobs import results
from langmill.jobs.card import shape
from langmill.jobs.charts import Series, line_chart
from langmill.jobs.finetune import left_out
from langmill.jobs.finetune_report import answers_shown, next_commands, number_shown, percent_shown, stopped
from langmill.jobs.finetune_report import card as card_of
from langmill.jobs.finetune_report import origin as origin
from langmill.jobs.prefer import Found, Prepared
from langmill.jobs.report import (
    Html,
    Page,
    Tile,
    count_shown,
    join,
    ledger,
    machine,
    seconds_shown,
    text,
)  # fmt: skip
from langmill.model.count import parameters
from langmill.train.loop import Outcome

_ABOUT = {
    "dpo": "DPO (Rafailov et al. 2023)", "ipo": "IPO (Azar et al. 2023)", "kto": "KTO (Ethayarajh et al. 2024)",
    "orpo": "ORPO (Hong et al. 2024)", "simpo": "SimPO (Meng et al. 2024)",
}  # fmt: skip


def write_report(
    settings: FinetuneSettings, model: Model, ready: Prepared, outcome: Outcome, found: Sequence[Found], folder: Path,
    seconds: float,
) -> Report:  # fmt: skip
    """Write the page and report.json; `found` is what was measured before and after."""
    before, after = found
    tokens = int(ready.pairs.predictions(ready.train).sum())
    figures = {
        "parameters": parameters(model.config),
        "trainable_parameters": sum(w.numel() for w in model.parameters() if w.requires_grad),
        "trained_share": ready.trained_tokens / max(1, tokens),
        "training_loss": outcome.loss,
        **before.judged.figures("before_"),
        **after.judged.figures(),
        "before_stopped": stopped(before.answers),
        "stopped": stopped(after.answers),
        "tokens_per_second": outcome.tokens_per_second,
        "training_seconds": outcome.seconds,
        "peak_bytes": outcome.peak_bytes,
    }
    counts = {
        "pairs": len(ready.train),
        "held_out_pairs": len(ready.held),
        "tokens": tokens,
        "trained_tokens": ready.trained_tokens,
        "steps": outcome.steps,
        "answered": len(after.answers),
        **ready.counted,
    }
    page = _page(settings, model, ready, outcome, found, folder, figures)
    words = "\n".join(_words(settings, outcome, figures, counts, folder, left_out(ready.ledger)))
    extra = {"ledger": ready.ledger.as_dict()}
    return results.publish(settings.out, folder, page, counts, figures, words, extra, seconds)


def _page(
    settings: FinetuneSettings, model: Model, ready: Prepared, outcome: Outcome, found: Sequence[Found], folder: Path,
    figures: Mapping[str, Any],
) -> Page:  # fmt: skip
    before, after = found
    rows = Metrics(folder).rows()
    tiles = [
        Tile("prefers the chosen answer", percent_shown(after.judged.accuracy),
             f"of held-out pairs; before {percent_shown(before.judged.accuracy)}"),
        Tile("margin", number_shown(after.judged.margin), f"before {number_shown(before.judged.margin)}"),
        Tile("held-out loss", number_shown(after.judged.loss), f"before {number_shown(before.judged.loss)}"),
        Tile("speed", f"{outcome.tokens_per_second:,.0f}/s", f"tokens of answers; {outcome.choices.dtype}"),
    ]  # fmt: skip
    told = {"model": settings.model, "loss": settings.prefer.loss}
    sections: list[tuple[str, Html]] = [
        ("How it learned", join(*_curves(rows), _meaning(settings))),
        ("Answers before and after", answers_shown(settings, before.answers, after.answers)),
        ("The preferences", join(_counted(ready, figures), ledger(ready.ledger.as_dict()))),
        *results.closing(outcome.choices.why, next_commands(settings), settings.model_dump(mode="json")),
    ]
    kicker = f"langmill finetune, {settings.task} · {time.strftime('%d %B %Y')} · {machine()}"
    summary = (
        f"{told['model']} ({shape(model.config)}) learned from {len(ready.train):,} preferences by "
        f"{_ABOUT[told['loss']]}, {settings.method}, in {seconds_shown(outcome.seconds)}."
    )
    return Page(f"{settings.out.name}: what it prefers now", kicker, summary, tiles, (), sections)


def _curves(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Loss, margin and accuracy during training."""

    def line(name: str, key: str, style: str) -> Series:
        return Series(name, [(row["step"], row[key]) for row in rows if row.get(key) is not None], style)

    losses = [line("training", "loss", "s0"), line("held out", "eval_loss", "v0")]
    charts = [("Loss", losses, "mean over pairs")]
    charts += [
        (title, [line("held out", f"eval_{name}", "s1")], label)
        for title, name, label in (
            ("Margin", "margin", "rewards"),
            ("Prefers the chosen answer", "accuracy", "share"),
        )
    ]
    return [
        line_chart(title, lines, "optimizer steps", label)
        for title, lines, label in charts
        if any(series.points for series in lines)
    ]


def _meaning(settings: FinetuneSettings) -> Html:
    reward = {
        "orpo": "beta times the mean log-probability of its tokens",
        "simpo": "beta times the mean log-probability of its tokens",
    }.get(
        settings.prefer.loss,
        "beta times how much likelier it has become since training began, as a logarithm",
    )
    compared = (
        "every good answer with every bad one" if settings.prefer.loss == "kto" else "the two of each pair"
    )
    return text(
        f"An answer's reward is {reward}. Margin and share compare {compared}; a tie counts half.", note=True
    )


def _counted(ready: Prepared, figures: Mapping[str, Any]) -> Html:
    cut = f" {ready.counted['truncated']} were truncated." if ready.counted["truncated"] else ""
    return text(f"The loss counts {figures['trained_share']:.0%} of the tokens: the answers.{cut}")


def _words(
    settings: FinetuneSettings,
    outcome: Outcome,
    found: Mapping[str, Any],
    counts: Mapping[str, int],
    folder: Path,
    aside: str,
) -> list[str]:
    lines = [
        f"{settings.out}: {settings.prefer.loss} by {settings.method}, "
        f"{count_shown(found['trainable_parameters'])} trained parameters",
        f"trained on {counts['pairs']:,} preferences in {seconds_shown(outcome.seconds)}",
        f"held out ({counts['held_out_pairs']:,}): prefers the chosen answer {percent_shown(found['accuracy'])}, "
        f"before {percent_shown(found['before_accuracy'])}; margin {number_shown(found['margin'])}, before "
        f"{number_shown(found['before_margin'])}; loss {number_shown(found['loss'])}, before "
        f"{number_shown(found['before_loss'])}",
    ]
    lines += [f"longer than a row: {counts['truncated']} truncated"] if counts["truncated"] else []
    lines += [f"left out: {aside}"] if aside else []
    return [*lines, f"report: {folder / 'report.html'}", f"next: {next_commands(settings)[0][1]}"]


def card(settings: FinetuneSettings, ready: Prepared, after: Judged) -> str:
    """README.md."""
    scored = "No preference was held out."
    if after.accuracy is not None:
        scored = (
            f"On preferences that were kept out of training the chosen answer has the higher reward in "
            f"{after.accuracy:.0%} of the comparisons, by {after.margin:.3f} in the mean ({settings.prefer.loss})."
        )
    learned = f"go along with {len(ready.train):,} preferences ({_ABOUT[settings.prefer.loss]})"
    return card_of(settings, learned, "preferences", scored)
