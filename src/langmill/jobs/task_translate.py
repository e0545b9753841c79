"""Texts with their translations for a fine-tuning run.

Figures: perplexity (a token of the target), and with the eval extra installed bleu and chrf (sacrebleu, greedy search,
of at most SEARCHED held-out pairs).
"""

from __future__ import annotations

import math
from collections import Counter
from functools import partial
from typing import Any

from langmill.common.errors import ModelError
from langmill.common.progress import track
from langmill.common.settings import FinetuneSettings
from langmill.data.items import Translated
from langmill.data.languages import Languages
from langmill.data.pipeline import Ledger
from langmill.data.rows import TaskRows, Text
from langmill.data.tasks import TranslationRow, read_translations
from langmill.evaluate import overlap
from langmill.infer.beam import beam_search
from langmill.jobs.report import Sample, samples, text
from langmill.jobs.report import join as joined
from langmill.jobs.results import path_shown
from langmill.jobs.work import Scored, Work, limit_of, mean_loss
from langmill.model.transformer import Transformer
from langmill.text.frames import Encoded
from langmill.text.tokenizer import Tokenizer
from langmill.text.translate import encode_source, encode_target
from langmill.train import tasks as objectives

SEARCHED = (
    200  # held-out pairs that are translated for the report; while training perplexity alone is measured
)
CUT = "held-out translations cut off"  # at the most tokens that one may have
ROWS = 16
LONGEST = 2048  # places of a row when held-out pairs are scored


def prepare(
    settings: FinetuneSettings, model: Transformer, tokenizer: Tokenizer, ledger: Ledger, quiet: bool
) -> Work:
    """Rows to items; pairs that share a text on either side are on one side of the split."""
    decoder = model.config.decoder_input
    if decoder is None or decoder.start is None or model.config.encoder is None or model.config.rereads:
        raise ModelError(
            f"{settings.model} cannot translate: take an encoder-decoder (Marian, BART, T5), or make one with "
            "langmill pretrain --objective denoise"
        )
    t, counted, limit = settings.tasks, Counter[str](), limit_of(settings, model, "error")
    given = {"source": t.source, "target": t.target}
    languages = (t.source, t.target) if given.keys() & t.model_fields_set else None
    told = Languages() if t.check_languages else None
    with track("reading", unit="pairs", quiet=quiet) as progress:

        def make(row: TranslationRow) -> tuple[TranslationRow, Encoded, list[int]]:
            progress.advance(1)
            read = encode_source(tokenizer, row.source, limit, counted)
            return row, read, encode_target(tokenizer, row.target, limit, counted)

        check = told.wrong if told else None
        read = list(read_translations(settings.data, ledger, make, given, languages, check))
    sources = (Text(row.where, encoded.ids, key=row.source) for row, encoded, _ in read)
    source = Translated.of(sources, [ids for _, _, ids in read], decoder.start, tokenizer.fill_id)
    train, held = source.split(settings.holdout)
    objective = partial(objectives.seq2seq, label_smoothing=t.label_smoothing)
    heldout = _Held(settings, tokenizer, source, held, [(row, e.ids) for row, e, _ in read], counted)
    return Work(
        model=model,
        source=source,
        train=train,
        held=held,
        objective=objective,
        score=heldout.score,
        best="perplexity",
        higher=False,
        ledger=ledger,
        counted=counted,
        what="pairs",
        use=[("Translate:", f'langmill translate {path_shown(settings.out)} "A text" --plain')],
        note=told.note if told else "",
    )


class _Held:
    """The held-out pairs, and how a model does on them."""

    def __init__(
        self, settings: FinetuneSettings, tokenizer: Tokenizer, source: Translated, held: Any, read: list[Any],
        counted: Counter[str],
    ):  # fmt: skip
        self.settings, self.tokenizer, self.source, self.held = settings, tokenizer, source, held
        self.counted = counted
        self.pairs = [read[number] for number in held[:SEARCHED].tolist()]

    def score(self, model: Transformer, whole: bool) -> Scored:
        """Perplexity; for the report also translations and their scores."""
        length = max(LONGEST // 4, int(self.source.predictions(self.held).max()))
        rows = TaskRows(self.source, self.held, length, 1, self.settings.seed)
        loss = mean_loss(model, objectives.seq2seq, rows.once())
        figures = {"perplexity": math.exp(min(loss, 100.0))}
        plain = (
            {} if self.settings.tasks.label_smoothing else {"loss": loss}
        )  # what the objective is without smoothing
        if not whole:
            return Scored(figures | plain)
        written = self._written(model)
        figures |= _overlap(written, [row.target for row, _ in self.pairs])
        items = []
        for (row, _), ours in list(zip(self.pairs, written, strict=True))[: self.settings.samples]:
            items += [
                Sample("source", "", row.source, "s3"),
                Sample("the model", "", ours, "s0"),
                Sample("the data", "", row.target, "s2"),
            ]
        cut = f" {self.counted[CUT]} did not end by themselves." if self.counted[CUT] else ""
        words = text(
            f"{len(written)} held-out texts were translated, the likeliest token each time.{cut}", note=True
        )
        return Scored(figures | plain, [("Translations", joined(words, samples(items)))])

    def _written(self, model: Transformer) -> list[str]:
        order = sorted(range(len(self.pairs)), key=lambda i: -len(self.pairs[i][1]))
        found = [""] * len(self.pairs)
        for at in range(0, len(order), ROWS):
            group = order[at : at + ROWS]
            sources = [self.pairs[i][1] for i in group]
            most = 2 * max(map(len, sources)) + 16
            answers = beam_search(model, sources, stops=self.tokenizer.stop_ids, beams=1, max_new_tokens=most)
            for i, own in zip(group, answers, strict=True):
                self.counted[CUT] += not own[0].ended
                found[i] = self.tokenizer.decode(own[0].ids).strip()
        return found


def _overlap(written: list[str], wanted: list[str]) -> dict[str, float]:
    """bleu and chrf; nothing where sacrebleu is not installed."""
    try:
        return overlap.scores(overlap.counts(written, wanted))
    except ImportError:
        return {}
