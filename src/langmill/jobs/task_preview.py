"""`langmill finetune --task … --preview N`: the first items as the model will see them, with what is learnt of each."""

from __future__ import annotations

from typing import Any

import numpy as np

from langmill.common.metrics import Report
from langmill.common.settings import FinetuneSettings
from langmill.data.items import Contrasted, Labelled, Spanned, Tagged, Translated
from langmill.data.pipeline import Ledger
from langmill.data.rows import Texts
from langmill.families.folder import Model
from langmill.jobs.finetune_task import aside, prepared
from langmill.jobs.work import Work
from langmill.text.tokenizer import Tokenizer


def preview(settings: FinetuneSettings, model: Model, tokenizer: Tokenizer, quiet: bool) -> Report:
    """Text: the first items, a stanza each. Counts: rows kept, items trained and held out, and what was cut."""
    work = prepared(settings, model, tokenizer, Ledger(), quiet)
    numbers = work.train[: settings.preview or 3].tolist()
    items = [f"{work.source.name(number)}\n{shown(work, tokenizer, number)}" for number in numbers]
    counts = {"trained": work.count(work.train), "held_out": work.count(work.held), **work.counted}
    told = ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in counts.items())
    lines = "\n".join([told, *aside(work)])
    return Report(None, counts, {}, "\n\n".join([*items, lines]), {"ledger": work.ledger.as_dict()})


def shown(work: Work, tokenizer: Tokenizer, number: int) -> str:
    """One item, special tokens spelt out, ⟦ and ⟧ around what is learnt within the text."""
    source: Any = work.source
    if isinstance(source, Labelled):
        return f"{_text(tokenizer, source.texts, number)}\n→ {_label(work, source.labels[number])}"
    if isinstance(source, Tagged):
        cells = slice(source.texts.starts[number], source.texts.starts[number + 1])
        names = work.facts["labels"]
        pairs = zip(source.texts.ids[cells].tolist(), source.tags[cells].tolist(), strict=True)
        parts = [tokenizer.decode([id], False) + (f"⟦{names[tag]}⟧" if tag >= 0 else "") for id, tag in pairs]
        return " ".join(part.strip() for part in parts)
    if isinstance(source, Spanned):
        ids, (first, last) = source.texts.tokens_of(number).tolist(), source.spans[number].tolist()
        if last == 0:
            return f"{tokenizer.decode(ids, False)}\n→ no answer"
        cuts = (ids[:first], ids[first : last + 1], ids[last + 1 :])
        before, inside, after = (tokenizer.decode(part, False) for part in cuts)
        return f"{before}⟦{inside}⟧{after}"
    if isinstance(source, Translated):
        return f"{_text(tokenizer, source.read, number)}\n→ {_text(tokenizer, source.written, number)}"
    assert isinstance(source, Contrasted)
    first, *others = source.members(np.array([number])).tolist()
    signs = ["=", *["≠"] * (len(others) - 1)]
    lines = [
        f"{sign} {_text(tokenizer, source.texts, other)}" for sign, other in zip(signs, others, strict=True)
    ]
    return "\n".join([_text(tokenizer, source.texts, first), *lines])


def _text(tokenizer: Tokenizer, texts: Texts, number: int) -> str:
    return tokenizer.decode(texts.tokens_of(number).tolist(), skip_specials=False)


def _label(work: Work, label: Any) -> str:
    names = work.facts["labels"]
    if np.ndim(label):
        return (
            ", ".join(name for name, held in zip(names, label.tolist(), strict=True) if held == 1) or "none"
        )
    return f"{label:g}" if isinstance(label, np.floating) else str(names[int(label)])
