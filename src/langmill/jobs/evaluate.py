"""`langmill evaluate`: how well a model does on text, questions, labels, translations or as a search, alone or against
another."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from langmill.common.errors import DataError, ModelError, UsageError
from langmill.common.metrics import Report
from langmill.common.progress import track
from langmill.common.settings import EvaluateSettings, TrainSettings
from langmill.data.pipeline import Ledger
from langmill.data.readers import read
from langmill.data.shards import Shards, write_shards
from langmill.data.tasks import read_labels, read_questions, read_translations, read_words
from langmill.evaluate.compare import Difference, Figures, Ints, differences, intervals
from langmill.evaluate.loss import Encoded, Interval, Scores, score
from langmill.evaluate.yardstick import Yardstick
from langmill.families.folder import outline
from langmill.infer.ready import ready
from langmill.jobs import evaluate_report as reports
from langmill.jobs import evaluate_rows as asked
from langmill.jobs import evaluate_tasks as tasks
from langmill.jobs import evaluate_vectors as vectors
from langmill.jobs.corpus import Corpus
from langmill.jobs.pretrain_task import (
    KINDS,
    Guessed,
    fingerprint_at,
    guess,
    kind_of,
    task_for,
    tokenizer_for,
)
from langmill.jobs.pretrain_task_report import WHAT
from langmill.jobs.report import shown
from langmill.text.document import text_hash
from langmill.text.tokenizer import Tokenizer

_WINDOW = 1024  # tokens, where the settings name no length: longer contexts cost much and change little
Part = tuple[Shards, NDArray[np.int64]]  # shards, and which of their documents to score
_WORDS = {
    "choices": "multiple choice",
    "generate": "generation",
    "answer": "answers in texts",
    "classify": "labels",
    "tag": "spans",
    "translate": "translation",
    "sts": "cosines against scores",
    "embed": "search by vectors",
}


def run(settings: EvaluateSettings, *, quiet: bool = False) -> Report:
    """A model's scores on the rows or text of `on`, with 95 % intervals over rows or documents.

    Text gives loss (nats a token), perplexity and bits_per_byte, and what gzip and xz make of the same bytes; of a
    model that was trained to guess hidden tokens, or what damaged texts were, loss and accuracy of its guesses. What
    other rows give say jobs/evaluate_tasks.py and jobs/evaluate_vectors.py. Each figure comes with NAME_interval
    ([low, high], or None for a single row). With `against` a second model is asked the same, and `against` of the
    report holds for every figure both scores, their difference (first - second), its paired interval and a verdict.
    """
    reports.check_out(settings)
    kind = asked.kind_of(settings)
    if kind == "generate" and settings.task is None and tasks.taught_at(settings.model) == "answer":
        kind = "answer"
    asked.check(settings, kind)
    return _on_text(settings, quiet) if kind == "text" else _on_rows(settings, kind, quiet)


def _on_rows(settings: EvaluateSettings, kind: asked.Kind, quiet: bool) -> Report:
    ledger, replaced = Ledger(), Counter[str]()
    rows, template, before, ask = _reader(settings, kind, ledger, replaced)
    outcomes: dict[str, tasks.Outcome] = {}
    about = {}
    for name in _models(settings):
        model, tokenizer = ready(name, settings.dtype, settings.device, settings.threads)
        own = settings.model_copy(update={"model": name})
        with track(_WORDS[kind], total=len(rows), unit="rows", quiet=quiet) as progress:
            outcomes[name] = ask(own, model, tokenizer, rows, on=progress.advance)
        about[name] = reports.of_model(model) | outcomes[name].about
        del model
    ours = outcomes[settings.model]
    figures = ours.figures(np.arange(len(rows)))
    between = intervals(ours.figures, len(rows), settings.resamples, settings.seed)
    found = _compared(settings, {name: one.figures for name, one in outcomes.items()}, len(rows))
    reports.write_rows(settings, {name: one.results for name, one in outcomes.items()})
    dropped = {reason: count.documents for reason, count in ledger.dropped().items()}
    lines = [
        f"{settings.model} on {shown(len(rows))} rows: {_WORDS[kind]}",
        *reports.score_lines(figures, between),
    ]
    for name, one in outcomes.items():
        lines += [f"  {name}: {shown(count)} {what}" for what, count in one.counted.items() if count]
        lines += [f"    {line}" for line in reports.unknown_lines(one.unknown)]
    lines += [f"  set aside: {shown(count)} x {reason}" for reason, count in dropped.items()]
    lines += [f"  {shown(count)} {what}" for what, count in replaced.items()]
    counted = {what: count for what, count in (ours.counted + replaced).items() if count}
    made = reports.record(settings, kind, template or ours.template, before, about)
    extra = {"ledger": ledger.as_dict(), "record": made, "unknown_labels": dict(ours.unknown)}
    counts = {"rows": len(rows), "set_aside": sum(dropped.values()), **counted}
    return _told(settings, found, counts, reports.flat(figures, between), lines, extra)


def _reader(
    settings: EvaluateSettings, kind: asked.Kind, ledger: Ledger, replaced: Counter[str]
) -> tuple[Sequence[Any], str, str, Callable[..., tasks.Outcome]]:
    """(the rows, the prompt's template, the examples before it, what asks a model)."""
    if kind == "translate":
        languages = None
        if settings.source is not None and settings.target is not None:
            languages = (settings.source, settings.target)
        return list(read_translations(settings.on, ledger, _same, languages=languages)), "", "", tasks.render
    if kind == "classify":
        regress = tasks.taught_at(settings.model) == "regress"
        return list(read_labels(settings.on, ledger, _same, regression=regress)), "", "", tasks.classify
    if kind == "tag":
        return list(read_words(settings.on, ledger, _same)), "", "", tasks.mark
    if kind == "answer":
        return list(read_questions(settings.on, ledger, _same)), "", "", tasks.point
    if kind == "sts":
        return vectors.scored(settings, ledger), "", "", vectors.sts
    if kind == "embed":
        return vectors.queries(settings, ledger, replaced), "", "", vectors.search
    rows, template = asked.read(settings.on, kind, settings.template, ledger)
    before = asked.shots(settings, kind, template, rows, replaced)
    ask = tasks.choose if kind == "choices" else tasks.write
    return rows, template, before, partial(ask, before=before)


def _same(row: Any) -> Any:
    return row


def _models(settings: EvaluateSettings) -> list[str]:
    return (
        [settings.model]
        if settings.against is None
        else list(dict.fromkeys((settings.model, settings.against)))
    )


def _compared(settings: EvaluateSettings, figures: dict[str, Figures], count: int) -> list[Difference]:
    if settings.against is None:
        return []
    both = figures[settings.model], figures[settings.against]
    return differences(*both, count, settings.resamples, settings.seed)


def _told(
    settings: EvaluateSettings, found: list[Difference], counts: dict[str, int], figures: dict[str, object],
    lines: list[str], extra: dict[str, Any],
) -> Report:  # fmt: skip
    """The report, with the comparison where there is one."""
    if settings.against is not None:
        lines = lines + reports.difference_lines(settings.model, settings.against, found)
        extra = extra | {"against": {"model": settings.against} | {one.name: one.as_dict() for one in found}}
    return Report(settings.out, counts, figures, "\n".join(lines), extra)


def _on_text(settings: EvaluateSettings, quiet: bool) -> Report:
    kind = _trained_by(settings)
    if kind != "causal":
        return _on_guesses(settings, kind, quiet)
    scores: dict[str, Scores] = {}
    about = {}
    for name in _models(settings):
        own = settings.model_copy(update={"model": name})
        scores[name], about[name], more = _scored(own, quiet)
        if name == settings.model:
            compressed, ledger, length = more
    if len({one.documents for one in scores.values()}) > 1:
        raise DataError(
            "the two models' tokenizers do not leave the same documents: there is nothing to compare"
        )
    found = _compared(
        settings, {name: _of(one) for name, one in scores.items()}, scores[settings.model].documents
    )
    reports.write_rows(settings, {name: list(_results(one)) for name, one in scores.items()})
    told = _report(settings, scores[settings.model], compressed, ledger, length)
    made = reports.record(settings, "text", "", "", about)
    return _told(
        settings, found, dict(told.counts), dict(told.figures), [told.text], {**told.extra, "record": made}
    )


def _trained_by(settings: EvaluateSettings) -> str:
    """The objective of KINDS by which text is scored; ModelError, or UsageError where it is not the same for both."""
    kinds = {name: kind_of(outline(name)[0]) for name in _models(settings)}
    if silent := [name for name, kind in kinds.items() if kind is None]:
        raise ModelError(
            f"{silent[0]} says no words, and {settings.on[0]} has no rows that it could be asked, such as text and "
            "label"
        )
    if len(set(kinds.values())) > 1:
        both = " and ".join(f"{name} is {KINDS[kind or '']}" for name, kind in kinds.items())
        raise UsageError(f"these two cannot be compared on text: {both}")
    return kinds[settings.model] or ""


def _on_guesses(settings: EvaluateSettings, kind: str, quiet: bool) -> Report:
    """The texts are damaged in one way for all models of one tokenizer."""
    found: dict[str, Guessed] = {}
    about, results, prints = {}, dict[str, list[dict[str, Any]]](), set[str]()
    for name in _models(settings):
        model, tokenizer = ready(name, settings.dtype, settings.device, settings.threads)
        prints.add(tokenizer_for(kind, tokenizer).fingerprint)
        if len(prints) > 1:
            raise DataError(
                "the two models have other tokenizers: they guess other things, so nothing can be compared"
            )
        ledger, about[name] = Ledger(), reports.of_model(model)
        length = settings.max_length or min(model.config.length, _WINDOW)
        asked = {"objective": kind, "max_length": length, "micro_batch_size": settings.micro_batch_size}
        train, made = TrainSettings.model_validate(asked), list[Guessed]()
        with tempfile.TemporaryDirectory(prefix="langmill-", ignore_cleanup_errors=True) as scratch:
            parts, where = _parts(settings, tokenizer, ledger, Path(scratch) / "shards", quiet), list[str]()
            for shards, chosen in parts:
                task = task_for(train, Corpus(tokenizer, shards, chosen, chosen), model.config)
                assert task is not None
                made.append(guess(model, task, chosen))
                where += map(shards.id_of, chosen.tolist())
            del parts, shards, task  # an open map cannot be deleted everywhere
        one = found[name] = Guessed.joined(made)
        sums = zip(where, one.nll_N.tolist(), one.tokens_N.tolist(), one.right_N.tolist(), strict=True)
        results[name] = [{"where": w, "nll": n, "guessed": t, "right": r} for w, n, t, r in sums]
    return _told_guesses(settings, kind, found, results, ledger, about)


def _told_guesses(
    settings: EvaluateSettings, kind: str, found: dict[str, Guessed], results: dict[str, list[dict[str, Any]]],
    ledger: Ledger, about: dict[str, dict[str, str]],
) -> Report:  # fmt: skip
    ours = found[settings.model]
    summary = ours.summary(settings.resamples, settings.seed)
    between = {
        name: pair
        for name in ("loss", "accuracy")
        if (pair := getattr(summary, f"{name}_interval")) is not None
    }
    figures = ours.of(np.arange(summary.documents))
    dropped = {reason: count.documents for reason, count in ledger.dropped().items()}
    lines = [
        f"{settings.model} on {shown(summary.documents)} documents: {shown(summary.guessed)} {WHAT[kind]}, nats each",
        *reports.score_lines(figures, between),
        f"  {'frequencies alone':<18}{shown(summary.unigram_entropy):>8}  nats, to compare",
        *(f"  set aside: {shown(count)} x {reason}" for reason, count in dropped.items()),
    ]
    reports.write_rows(settings, results)
    compared = _compared(settings, {name: one.of for name, one in found.items()}, summary.documents)
    counts = {"documents": summary.documents, "guessed": summary.guessed, "set_aside": sum(dropped.values())}
    extra = {"ledger": ledger.as_dict(), "record": reports.record(settings, "text", "", "", about)}
    flat = reports.flat(figures, between) | {"unigram_entropy": summary.unigram_entropy}
    return _told(settings, compared, counts, flat, lines, {**extra, "split": settings.split})


def _of(scores: Scores) -> Figures:
    """Bits per byte of some of the documents: what models with different tokenizers can be compared by."""
    nll, size = scores.nll_N, scores.bytes_N

    def figures(k: Ints) -> dict[str, float]:
        return {"bits_per_byte": float(nll[k].sum() / max(1, size[k].sum()) / math.log(2))}

    return figures


def _results(scores: Scores) -> Iterator[dict[str, Any]]:
    parts = (scores.names, scores.nll_N.tolist(), scores.tokens_N.tolist(), scores.bytes_N.tolist())
    for name, nll, tokens, size in zip(*parts, strict=True):
        yield {"where": name, "nll": nll, "tokens": tokens, "bytes": size}


def _scored(
    settings: EvaluateSettings, quiet: bool
) -> tuple[Scores, dict[str, str], tuple[dict[str, float], Ledger, int]]:
    """(scores, about the model, (what compressors make of the text, the ledger, tokens of a window)).

    Text is tokenised into a temporary folder that only this user can read and that is gone afterwards.
    """
    model, tokenizer = ready(settings.model, settings.dtype, settings.device, settings.threads)
    length = settings.max_length or min(model.config.length, _WINDOW)
    ledger = Ledger()
    with tempfile.TemporaryDirectory(prefix="langmill-", ignore_cleanup_errors=True) as scratch:
        parts = _parts(settings, tokenizer, ledger, Path(scratch) / "shards", quiet)
        total = sum(int(shards.lengths(chosen).sum()) for shards, chosen in parts)
        with track("scoring", total=total, unit="tokens", quiet=quiet) as progress:
            scores = score(
                model,
                _encoded(parts),
                start_id=tokenizer.start_id,
                length=length,
                rows=settings.micro_batch_size,
                resamples=settings.resamples,
                seed=settings.seed,
                on_tokens=progress.advance,
            )
        compressed = _compressed(settings, parts, quiet)
        del parts  # an open map cannot be deleted everywhere
    return scores, reports.of_model(model), (compressed, ledger, length)


def _is_shards(path: str) -> bool:
    return (Path(path) / "shards.json").is_file()


def _parts(
    settings: EvaluateSettings, tokenizer: Tokenizer, ledger: Ledger, scratch: Path, quiet: bool
) -> list[Part]:
    """Every document to score. Text becomes shards first, so that one path serves both."""
    given = [Path(path) for path in settings.on if _is_shards(path)]
    found = [Shards.open(path, expected=fingerprint_at(path, tokenizer)) for path in given]
    if texts := _texts(settings):
        with track("reading", unit="B", quiet=quiet) as progress:
            documents = read(texts, settings.data, ledger)
            advance = lambda _, size: progress.advance(size)  # noqa: E731
            found.append(write_shards(documents, tokenizer, scratch, ledger=ledger, on_batch=advance))
    if settings.split == "all":
        return [(shards, np.arange(shards.documents)) for shards in found]
    parts = [(shards, shards.split(settings.data.holdout)[1]) for shards in found]
    if not any(len(chosen) for _, chosen in parts):
        raise DataError(
            f"of the {sum(shards.documents for shards in found)} documents none is held out with "
            f"data.holdout={settings.data.holdout}: give more text, or evaluate with split=all"
        )
    return parts


def _texts(settings: EvaluateSettings) -> list[str]:
    return [path for path in settings.on if not _is_shards(path)]


def _encoded(parts: Sequence[Part]) -> Iterator[Encoded]:
    for shards, chosen in parts:
        for document in map(int, chosen):
            ids, size = shards.tokens_of(document), int(shards.bytes_of[document])
            yield Encoded(shards.id_of(document), ids, size)


def _compressed(settings: EvaluateSettings, parts: Sequence[Part], quiet: bool) -> dict[str, float]:
    """Bits per byte of general compressors on the scored texts; none where only their tokens are at hand."""
    texts = _texts(settings)
    if len(texts) < len(settings.on):
        return {}
    [(shards, chosen)] = parts
    scored = set(np.asarray(shards.hashes)[chosen].tolist())
    yardstick = Yardstick()
    total = int(shards.bytes_of[chosen].sum(dtype=np.int64))
    with track("compressing, to compare", total=total, unit="B", quiet=quiet) as progress:
        for document in read(texts, settings.data, Ledger()):
            if text_hash(document.text) in scored:
                progress.advance(yardstick.add(document.text))
    return yardstick.bits_per_byte()


def _report(
    settings: EvaluateSettings, scores: Scores, compressed: dict[str, float], ledger: Ledger, length: int
) -> Report:
    rows: list[tuple[str, float, Interval | None, str]] = [
        ("loss", scores.loss, scores.loss_interval, "nats a token"),
        ("perplexity", scores.perplexity, scores.perplexity_interval, ""),
        ("bits_per_byte", scores.bits_per_byte, scores.bits_per_byte_interval, ""),
    ]
    dropped = {reason: count.documents for reason, count in ledger.dropped().items()}
    lines = [
        f"{settings.model} on {shown(scores.documents)} documents, {shown(scores.tokens)} tokens, "
        f"{shown(scores.bytes)} bytes, in windows of {length} tokens"
    ]
    for name, value, interval, unit in rows:
        between = "" if interval is None else f"95 % interval {shown(interval[0])} to {shown(interval[1])}"
        lines.append(f"  {name.replace('_', ' '):<14}{shown(value):>8}  {between:<32}{unit}".rstrip())
    lines += [
        f"  {name:<14}{shown(value):>8}  bits per byte, to compare" for name, value in compressed.items()
    ]
    lines += [f"  set aside: {shown(count)} x {reason}" for reason, count in dropped.items()]
    figures: dict[str, object] = {}
    for name, value, interval, _ in rows:
        figures |= {name: value, f"{name}_interval": None if interval is None else list(interval)}
    return Report(
        counts={
            "documents": scores.documents,
            "tokens": scores.tokens,
            "bytes": scores.bytes,
            "set_aside": sum(dropped.values()),
        },
        figures=figures | {f"{name}_bits_per_byte": value for name, value in compressed.items()},
        text="\n".join(lines),
        extra={"ledger": ledger.as_dict(), "window": length, "split": settings.split},
    )
