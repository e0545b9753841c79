"""What came of a fine-tuning run: the page, report.json, the card, and the last lines on the terminal."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from langmill.common.metrics import Metrics, Report
from langmill.common.settings import FinetuneSettings
from langmill.data.batches import Ints
from langmill.data.examples import Examples
from langmill.data.pipeline import Ledger
from langmill.families.folder import Model
from langmill.jobs import results
from langmill.jobs.answers import Answer
from langmill.jobs.card import Text, shape
from langmill.jobs.card import lineage as lineage_of
from langmill.jobs.finetune import Measured, Prepared, left_out
from langmill.jobs.report import (
    Html,
    Page,
    Sample,
    Tile,
    count_shown,
    join,
    ledger,
    loss_chart,
    machine,
    samples,
    seconds_shown,
    speed_chart,
    text,
)  # fmt: skip
from langmill.jobs.results import path_shown, three
from langmill.model.count import parameters
from langmill.text.tokenizer import Tokenizer
from langmill.train.loop import Outcome


def write_report(
    settings: FinetuneSettings, model: Model, ready: Prepared, outcome: Outcome, before: Measured, after: Measured,
    folder: Path, seconds: float,
) -> Report:  # fmt: skip
    """Write the page and report.json."""
    tokens = int(ready.examples.predictions(ready.train).sum())
    trainable = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    found = {
        "parameters": parameters(model.config),
        "trainable_parameters": trainable,
        "trained_share": ready.trained_tokens / max(1, tokens),
        "training_loss": outcome.loss,
        "before_loss": before.loss,
        "loss": after.loss,
        "before_stopped": stopped(before.answers),
        "stopped": stopped(after.answers),
        "tokens_per_second": outcome.tokens_per_second,
        "training_seconds": outcome.seconds,
        "peak_bytes": outcome.peak_bytes,
    }
    counts = {
        "examples": len(ready.train),
        "held_out_examples": len(ready.held),
        "tokens": tokens,
        "trained_tokens": ready.trained_tokens,
        "steps": outcome.steps,
        "answered": len(after.answers),
        **ready.counted,
    }
    page = _page(settings, model, ready, outcome, before, after, folder, found)
    words = "\n".join(_words(settings, outcome, found, counts, folder, left_out(ready.ledger)))
    extra = {"ledger": ready.ledger.as_dict()}
    return results.publish(settings.out, folder, page, counts, found, words, extra, seconds)


def stopped(answers: list[Answer]) -> float | None:
    """The share of answers that ended by themselves."""
    return sum(answer.stopped for answer in answers) / len(answers) if answers else None


def _page(
    settings: FinetuneSettings, model: Model, ready: Prepared, outcome: Outcome, before: Measured, after: Measured,
    folder: Path, found: Mapping[str, Any],
) -> Page:  # fmt: skip
    rows = [("", Metrics(folder).rows())]
    tiles = [
        Tile(
            "held-out loss",
            number_shown(after.loss),
            f"before {number_shown(before.loss)}; nats a trained token",
        ),
        Tile(
            "stops by itself",
            percent_shown(found["stopped"]),
            f"before {percent_shown(found['before_stopped'])}",
        ),
        Tile(
            "trained parameters",
            count_shown(found["trainable_parameters"]),
            f"of {count_shown(found['parameters'])}",
        ),
        Tile("speed", f"{outcome.tokens_per_second:,.0f}/s", f"trained tokens; {outcome.choices.dtype}"),
    ]
    sections: list[tuple[str, Html]] = [
        ("Answers before and after", answers_shown(settings, before.answers, after.answers)),
        ("How it learned", join(loss_chart(rows), speed_chart(rows))),
        ("The conversations", join(_mask(ready, found), ledger(ready.ledger.as_dict()))),
        *results.closing(outcome.choices.why, next_commands(settings), settings.model_dump(mode="json")),
    ]
    kicker = f"langmill finetune, {settings.task} · {time.strftime('%d %B %Y')} · {machine()}"
    summary = (
        f"{settings.model} ({shape(model.config)}) learned from {len(ready.train):,} conversations by "
        f"{settings.method} in {seconds_shown(outcome.seconds)}."
    )
    return Page(f"{settings.out.name}: what was taught, and how well", kicker, summary, tiles, (), sections)


def answers_shown(settings: FinetuneSettings, before: Sequence[Answer], after: Sequence[Answer]) -> Html:
    """Side by side, under what was asked."""
    items = []
    for old, new in list(zip(before, after, strict=False))[: settings.samples]:
        items += [
            Sample("asked", "", new.prompt, "s3"),
            Sample("before", "", old.text + ("" if old.stopped else " …"), "s1"),
            Sample("after", "", new.text + ("" if new.stopped else " …"), "s0"),
            Sample("the data's answer", "", new.wanted, "s2"),
        ]
    words = (
        f"{len(after)} held-out prompts were answered, the likeliest token each time; … stands where the model "
        "did not stop by itself."
    )
    return join(text(words, note=True), samples(items))


def _mask(ready: Prepared, found: Mapping[str, Any]) -> Html:
    counted = [f"{count} {what}" for what, count in ready.counted.items() if count]
    more = f" Longer than a row: {', '.join(counted)}." if counted else ""
    return text(f"The loss counts {found['trained_share']:.0%} of the tokens: what the assistant says.{more}")


def next_commands(settings: FinetuneSettings) -> list[tuple[str, str]]:
    """What to do with the result now."""
    out = path_shown(settings.out)
    found = [
        ("Talk to it:", f"langmill chat {out}"),
        ("Ask once:", f'langmill generate {out} --chat "Hello"'),
    ]
    if settings.method != "full":
        found.append(("Make one model of it and its base:", f"langmill merge {out} --out {out}-merged"))
    return found


def _words(
    settings: FinetuneSettings,
    outcome: Outcome,
    found: Mapping[str, Any],
    counts: Mapping[str, int],
    folder: Path,
    aside: str,
) -> list[str]:
    lines = [
        f"{settings.out}: {settings.method}, {count_shown(found['trainable_parameters'])} trained parameters",
        f"trained on {counts['examples']:,} conversations, {count_shown(outcome.tokens)} trained tokens "
        f"({found['trained_share']:.0%} of all) in {seconds_shown(outcome.seconds)}",
        f"held out: loss {number_shown(found['loss'])}, before {number_shown(found['before_loss'])}; stops by itself "
        f"{percent_shown(found['stopped'])}, before {percent_shown(found['before_stopped'])} "
        f"({counts['answered']} prompts)",
    ]
    long = [f"{counts[what]} {what}" for what in ("truncated", "split") if counts[what]]
    lines += [f"longer than a row: {', '.join(long)}"] if long else []
    lines += [f"left out: {aside}"] if aside else []
    return [*lines, f"report: {folder / 'report.html'}", f"next: {next_commands(settings)[0][1]}"]


class Learned(Protocol):
    """What a model was taught with, whatever the task."""

    @property
    def examples(self) -> Examples: ...
    @property
    def held(self) -> Ints: ...
    @property
    def ledger(self) -> Ledger: ...


def origin(
    settings: FinetuneSettings, ready: Learned, tokenizer: Tokenizer, measured: Mapping[str, Any]
) -> dict[str, Any]:
    """lineage.json."""
    return lineage_of(settings, _about(ready, tokenizer), settings.model, measured)


def _about(ready: Learned, tokenizer: Tokenizer) -> Text:
    kept = ready.ledger.total("kept")
    manifest = hashlib.sha256(ready.examples.identity()["examples"].encode()).hexdigest()
    tokens = len(ready.examples.ids)
    return Text(kept.documents, len(ready.held), tokens, kept.bytes, manifest, tokenizer.fingerprint)


def adapter_card(settings: FinetuneSettings, ready: Prepared, measured: Mapping[str, Any]) -> str:
    """README.md of a model that learned from conversations."""
    loss = measured.get("held_out_loss")
    scored = "No conversation was held out." if loss is None else (
        f"Held-out loss: {loss:.3f} nats a token of the assistant's, over conversations that were kept out of training."
    )  # fmt: skip
    learned = f"answer as the assistant of {len(ready.train):,} conversations does"
    return card(settings, learned, "conversations", scored)


def card(settings: FinetuneSettings, learned: str, data: str, scored: str) -> str:
    """README.md: what the model was taught to do, from what, and how well it does."""
    name, base = settings.out.name, Path(settings.model).name
    whole = settings.method == "full"
    head = "library_name: transformers" if whole else f"library_name: peft\nbase_model: {base}"
    kind = (
        "model, all of whose weights were trained" if whole else f"LoRA adapter (rank {settings.lora.lora_r})"
    )
    return (
        f"---\n{head}\npipeline_tag: text-generation\ntags:\n- langmill\n---\n# {name}\n\nA {kind} that makes `{base}` "
        f"{learned}.\n\n## Use\n\n```\nlangmill chat {name}\n```\n\n## Training\n\nThis folder holds none of the "
        f"{data}; `lineage.json` holds their hash, the settings and the versions.\n\n## Evaluation\n\n{scored}\n\n"
        "## Limits\n\nThe model can be wrong, and it can repeat passages of what it was trained on, private ones "
        "included. Nobody has checked it for bias or safety.\n"
    )


def number_shown(value: float | None) -> str:
    """Three digits, or a dash for none."""
    return "–" if value is None else three(value)


def percent_shown(value: float | None) -> str:
    """A share, or a dash for none."""
    return "–" if value is None else f"{value:.0%}"
