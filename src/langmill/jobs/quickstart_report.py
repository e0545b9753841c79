"""What the quickstart shows: two models and two compressors on the same held-out text."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from langmill.common.metrics import Report
from langmill.common.settings import QuickstartSettings, TrainSettings
from langmill.jobs import results
from langmill.jobs.card import shape
from langmill.jobs.corpus import Corpus
from langmill.jobs.heldout import difference, prompts, samples, yardsticks
from langmill.jobs.report import (
    Html,
    Page,
    Sample,
    bytes_shown,
    commands,
    count_shown,
    folded,
    join,
    loss_chart,
    machine,
    seconds_shown,
    speed_chart,
    text,
)  # fmt: skip
from langmill.jobs.report import samples as shown_samples
from langmill.jobs.report import settings as shown_settings
from langmill.jobs.results import Entrant, between, path_shown, three

# Beginnings that a page of the manual could have; no page begins with them.
MANUAL_PROMPTS = ("The with statement", "Return the number of", "class Reader(object)\n\n")


def write_report(
    settings: QuickstartSettings, corpus: Corpus, entrants: Sequence[tuple[Entrant, TrainSettings]],
    notes: list[str], seconds: float,
) -> Report:  # fmt: skip
    """Write the page and report.json. The first entrant is the product, the second the baseline to beat."""
    (ours, _), (lstm, _) = entrants
    compressed = yardsticks(corpus, corpus.held) if len(corpus.held) else {}
    found: dict[str, Any] = {f"{name}_bits_per_byte": value for name, value in compressed.items()}
    for prefix, entrant in (("", ours), ("lstm_", lstm)):
        s, outcome = entrant.scores, entrant.outcome
        found |= {f"{prefix}parameters": entrant.parameters, f"{prefix}training_loss": outcome.loss}
        found[f"{prefix}tokens_per_second"] = outcome.tokens_per_second
        if s is not None:
            found[f"{prefix}bits_per_byte"] = s.bits_per_byte
            found[f"{prefix}bits_per_byte_interval"] = s.bits_per_byte_interval
    if ours.scores and lstm.scores:
        behind, interval = difference(ours.scores, lstm.scores, settings.seed)
        found |= {"lstm_behind": behind, "lstm_behind_interval": interval}
    counts = {
        **corpus.counts,
        "steps": ours.outcome.steps,
        "tokens_trained": ours.outcome.tokens,
    }
    notices = results.too_little(ours.parameters, ours.outcome.tokens, corpus.train_tokens) + notes
    texts = prompts(corpus, 3) if settings.text else list(MANUAL_PROMPTS)
    written: list[Sample] = []
    for entrant, _ in entrants:
        written += samples(entrant.model, corpus.tokenizer, texts, entrant.name, entrant.style, settings.seed)
    page = _page(settings, corpus, entrants, found, written, notices, seconds)
    words = "\n".join(_words(settings, entrants, found, written, notices, seconds))
    shown = [{"model": s.by, "prompt": s.prompt, "text": s.text} for s in written]
    extra = {"notices": notices, "samples": shown, "ledger": corpus.shards.ledger}
    return results.publish(settings.out, ours.folder, page, counts, found, words, extra, seconds)


def _page(
    settings: QuickstartSettings, corpus: Corpus, entrants: Sequence[tuple[Entrant, TrainSettings]],
    found: Mapping[str, Any], written: Sequence[Sample], notices: list[str], seconds: float,
) -> Page:  # fmt: skip
    both = [entrant for entrant, _ in entrants]
    rows = [(entrant.name, entrant.rows) for entrant in both]
    begun = text("The marked beginning is given, the rest is the model's, at temperature 0.7.", note=True)
    used = [
        folded(
            f"Training of the {entrant.name}",
            shown_settings({"shape": shape(entrant.model.config), "train": train.model_dump(mode="json")}),
        )
        for entrant, train in entrants
    ]
    sections: list[tuple[str, Html]] = [
        ("Held-out text", _compared(corpus, both, found)),
        ("How they learned", join(loss_chart(rows), speed_chart(rows))),
        ("What they write", join(begun, shown_samples(written))),
        ("The text", results.text_section(corpus)),
        ("Measured choices", results.choices_section(both)),
        ("How to go on", commands(next_commands(settings))),
        ("Settings", join(*used)),
    ]
    took = f"{seconds_shown(seconds)} in all"
    kicker = f"langmill quickstart · {time.strftime('%d %B %Y')} · {machine()} · {took}"
    title = f"{'Your text' if settings.text else 'The Python manual'} became a language model"
    return Page(
        title, kicker, _summary(corpus, both[0], found), results.tiles(both[0], corpus), notices, sections
    )


def _summary(corpus: Corpus, ours: Entrant, found: Mapping[str, Any]) -> str:
    words = (
        f"A Transformer with {count_shown(ours.parameters)} parameters read {count_shown(ours.outcome.tokens)} tokens "
        f"of {bytes_shown(corpus.shards.bytes)} of text in {seconds_shown(ours.outcome.seconds)}."
    )
    if "lstm_behind" not in found:
        return words
    return words + (
        f" It needs {found['bits_per_byte']:.2f} bits for each byte of text that it has never seen; an LSTM of the "
        f"same size, trained on the same tokens in the same order, needs {found['lstm_bits_per_byte']:.2f}, "
        f"xz {found['xz_bits_per_byte']:.2f} and gzip {found['gzip_bits_per_byte']:.2f}."
    )


def _compared(corpus: Corpus, both: Sequence[Entrant], found: Mapping[str, Any]) -> Html:
    scored = [(e.name, e.style, e.parameters, e.scores) for e in both if e.scores]
    if "lstm_behind" not in found:
        return text(
            "The text is a single document, so none could be held out and nothing says how well the models predict "
            "new text."
        )
    compressed = {key: found[f"{key}_bits_per_byte"] for key, _, _ in results.YARDSTICKS}
    behind, interval = found["lstm_behind"], found["lstm_behind_interval"]
    within = f" (95 % interval {interval[0]:+.3f} to {interval[1]:+.3f})" if interval else ""
    pair = f"Paired by document, the LSTM needs {behind:+.3f} bits per byte against the Transformer{within}."
    return join(results.comparison(scored, compressed, corpus), text(pair))


def next_commands(settings: QuickstartSettings) -> list[tuple[str, str]]:
    """What to do after the quickstart."""
    out, paths = path_shown(settings.out), " ".join(map(path_shown, settings.text)) or "FOLDER"
    begin = "Once upon a time" if settings.text else MANUAL_PROMPTS[0]
    larger = f"langmill plan {paths} --size small\nlangmill pretrain {paths} --out my-model --size small"
    found = [
        ("Write with the model:", f'langmill generate {out} "{begin}" --temperature 0.7'),
        ("Do the same with your own text:", "langmill quickstart --text FOLDER --out my-first-model"),
        ("Train a larger model for longer; plan says beforehand what it takes:", larger),
        (
            "Teach your text to a model that can write already (a folder, .gguf file or hub id):",
            f"langmill pretrain {paths} --from MODEL --out my-model",
        ),
    ]
    return [pair for pair in found if not settings.text or "quickstart" not in pair[1]]


def _words(
    settings: QuickstartSettings, entrants: Sequence[tuple[Entrant, TrainSettings]], found: Mapping[str, Any],
    written: Sequence[Sample], notices: list[str], seconds: float,
) -> list[str]:  # fmt: skip
    ours = entrants[0][0]
    count = count_shown(ours.parameters)
    lines = [
        f"{settings.out}: {shape(ours.model.config)}, {count} parameters, made in {seconds_shown(seconds)}"
    ]
    if "lstm_behind" in found:
        lines.append("bits per byte of held-out text, lower is better:")
        for name, key in (("Transformer", ""), ("LSTM", "lstm_"), ("xz", "xz_"), ("gzip", "gzip_")):
            interval = between(found.get(f"{key}bits_per_byte_interval"))
            behind = "same size, same tokens" if key == "lstm_" else ""
            value = three(found[f"{key}bits_per_byte"])
            lines.append(f"  {name:12}{value}  {interval:16}  {behind}".rstrip())
    if written:
        lines += ["", f"{written[0].prompt}▸{written[0].text}", ""]
    lines += [f"note: {notice}" for notice in notices]
    return [*lines, f"report: {ours.folder / 'report.html'}", f"next: {next_commands(settings)[0][1]}"]
