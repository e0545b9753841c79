"""Words with tags for a fine-tuning run.

Figures: precision, recall and f1 over spans that agree in both ends and label (as conlleval and seqeval count them),
and word_accuracy.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from functools import partial

import numpy as np

from langmill.adapt.heads import with_head
from langmill.common.progress import track
from langmill.common.settings import FinetuneSettings
from langmill.data.items import Tagged
from langmill.data.pipeline import Ledger
from langmill.data.rows import Text
from langmill.data.tasks import WordRow, read_words
from langmill.evaluate import labels as scores
from langmill.infer.read import token_scores
from langmill.jobs.report import shown, table
from langmill.jobs.results import path_shown
from langmill.jobs.strata import contradicted, stratified, unscored
from langmill.jobs.work import Scored, Work, limit_of
from langmill.model.transformer import Transformer
from langmill.text.classify import Labels, class_weights
from langmill.text.tag import OUTSIDE, WordWindow, best_tags, encode_words, spans_of, tag_targets, word_scores
from langmill.text.tokenizer import Tokenizer
from langmill.train import tasks as objectives
from langmill.train.objectives import IGNORED

CONTRADICTED = "rows whose text others tag otherwise"


def prepare(
    settings: FinetuneSettings, model: Transformer, tokenizer: Tokenizer, ledger: Ledger, quiet: bool
) -> Work:
    """Rows to items: the windows of a text are several, on one side of the split."""
    counted, limit = Counter[str](), limit_of(settings, model, "window")
    with track("reading", unit="texts", quiet=quiet) as progress:

        def make(row: WordRow) -> tuple[WordRow, list[WordWindow]]:
            progress.advance(1)
            counted["tags repaired"] += row.repaired
            counted["spans widened to whole words"] += row.widened
            counted["words read in parts, as running text gives them"] += row.cut
            return row, encode_words(tokenizer, [row.words], limit, counted)

        read = list(read_words(settings.data, ledger, make))
    labels = Labels.of([OUTSIDE, *(tag for row, _ in read for tag in row.tags)], "tag")
    windows = [(number, window) for number, (_, own) in enumerate(read) for window in own]
    keys = [repr(row.words.text) for row, _ in read]
    items = [
        Text(read[number][0].where, window.encoded.ids, window.encoded.types, key=keys[number])
        for number, window in windows
    ]
    tags = [tag_targets(window, read[number][0].tags, labels) for number, window in windows]
    source = Tagged.of(items, tags, tokenizer.fill_id)
    spelt = [{label for _, _, label in spans_of(row.tags)} for row, _ in read]
    train, held = stratified(source.texts.keys, [spelt[number] for number, _ in windows], settings.holdout)
    owners = np.array([number for number, _ in windows])
    count, found = contradicted((row.where, row.words, row.tags) for row, _ in read)
    counted[CONTRADICTED] += count
    note = " ".join(filter(None, (unscored(spelt, set(owners[held].tolist())), found)))
    weights = None
    if settings.tasks.class_weights:
        seen = [tag for item in train.tolist() for tag in tags[item] if tag != IGNORED]
        weights = tuple(class_weights(seen, len(labels.names)).tolist())
    rows = [row for row, _ in read]
    heldout = _Held(labels, rows, [windows[item] for item in held.tolist()])
    return Work(
        model=with_head(model, "tag", labels.names, settings.seed),
        source=source,
        train=train,
        held=held,
        objective=partial(objectives.tag, weights=weights),
        score=heldout.score,
        best="f1",
        higher=True,
        ledger=ledger,
        counted=counted,
        what="texts",
        use=[("Find spans in a text:", f'langmill tag {path_shown(settings.out)} "A text"')],
        facts={"labels": list(labels.names)},
        note=note,
        owners=owners,
        limit=limit,
    )


class _Held:
    """The held-out texts, and how a model does on them."""

    def __init__(self, labels: Labels, rows: list[WordRow], windows: list[tuple[int, WordWindow]]):
        self.labels, self.rows, self.windows = labels, rows, windows

    def score(self, model: Transformer, whole: bool) -> Scored:
        """Figures of the tags, each word's from the window where it counts."""
        own = defaultdict(list)
        outputs = token_scores(model, (window.encoded for _, window in self.windows))
        for (number, window), output in zip(self.windows, outputs, strict=True):
            own[number].append((window, output))
        truth, said, right, words = [], [], 0, 0
        for number, parts in own.items():
            tags = self.rows[number].tags
            scores_NC = word_scores(
                len(tags), [window for window, _ in parts], [output for _, output in parts]
            )
            guess = best_tags(scores_NC, self.labels)
            right += int(np.sum([a == b for a, b in zip(tags, guess, strict=True)]))
            words += len(tags)
            truth.append(spans_of(tags))
            said.append(spans_of(guess))
        total, rows = scores.spans(truth, said)
        figures = {**total, "word_accuracy": right / max(1, words)}
        if not whole:
            return Scored(figures)
        head = ("label", "precision", "recall", "F1", "spans")
        cells = [
            (row["label"], shown(row["precision"]), shown(row["recall"]), shown(row["f1"]), str(row["count"]))
            for row in rows
        ]
        shown_table = table("Held-out spans of each label", head, cells, numbers=4)
        return Scored(figures, [("Each label", shown_table)], {"by_label": rows})
