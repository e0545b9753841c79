"""What a task brings to a fine-tuning run: items packed into rows, an objective, and how a model is scored on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from langmill.common.settings import FinetuneSettings, FinetuneTrainSettings
from langmill.data.batches import Batch, Ints
from langmill.data.pipeline import Ledger
from langmill.data.rows import Source, TaskRows
from langmill.jobs.report import Html
from langmill.model.config import ModelConfig
from langmill.model.transformer import Transformer
from langmill.text.tasks import READS, Limit
from langmill.text.tokenizer import Tokenizer
from langmill.train.objectives import Objective
from langmill.train.step import tensors

PASS_TOKENS = 2048  # places in one pass on a CPU: more gains nothing there
RATE = 5e-5  # that suits all weights of a pretrained encoder (Devlin et al. 2018, appendix A.3: 2e-5 to 5e-5)
BUCKETS = 64  # rows are as long as a multiple of this


@dataclass(frozen=True)
class Scored:
    """A model on the held-out items. sections: what the report shows of it, a heading each."""

    figures: dict[str, float]
    sections: list[tuple[str, Html]] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """Everything that a run needs to know of its task.

    score: figures of a model in evaluation mode on `held`, "loss" among them only where it is made on the way; `whole`
    asks for the report's parts too.
    best: the figure by which the best checkpoint is chosen, `higher` or lower. what: the items' name in words.
    note: what the user should know of the items beside their counts. settle: writes into the model's settings what the
    last figures, made with items held out, say of its use. owners: for each item the number of the text or question
    whose window it is; None: each is one. limit: how texts were cut, where a use of the model can follow it.
    """

    model: Transformer
    source: Source
    train: Ints
    held: Ints
    objective: Objective
    score: Callable[[Transformer, bool], Scored]
    best: str
    higher: bool
    ledger: Ledger
    counted: Mapping[str, int]
    what: str
    use: Sequence[tuple[str, str]]
    facts: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    settle: Callable[[Transformer, Mapping[str, float]], None] | None = None
    owners: Ints | None = None
    limit: Limit | None = None

    def count(self, items: Ints) -> int:
        """How many texts, questions or pairs these items are of: one in several windows is several items."""
        return len(items) if self.owners is None else len(np.unique(self.owners[items]))

    def counted_in_words(self, items: Ints) -> str:
        """The same for people, with the windows where there are more."""
        count = self.count(items)
        windows = f" ({len(items):,} windows)" if len(items) > count else ""
        return f"{count:,} {self.what}{windows}"


Prepare = Callable[[FinetuneSettings, Transformer, Tokenizer, Ledger, bool], Work]


def chosen(settings: FinetuneSettings, work: Work, on_cpu: bool) -> FinetuneTrainSettings:
    """The training settings with nothing left open: a row holds the longest item, a step about `tasks.batch_size`."""
    t, sizes = settings.train, work.source.predictions(work.train)
    config: ModelConfig = work.model.config
    mean, longest = float(sizes.mean()), int(sizes.max())
    whole = settings.tasks.batch_size * mean  # places of a step
    places = max(longest, min(PASS_TOKENS, whole)) if on_cpu else max(longest, whole)
    length = t.max_length or math.ceil(places / BUCKETS) * BUCKETS
    rows = t.micro_batch_size or 1
    passes = t.gradient_accumulation_steps
    if "gradient_accumulation_steps" not in t.model_fields_set:
        passes = max(1, round(whole / (rows * length)))
    narrow = config.main.dim < 512
    rate = t.learning_rate or RATE * (2 if narrow else 1)
    found = {"max_length": length, "micro_batch_size": rows, "gradient_accumulation_steps": passes}
    return t.model_copy(update=found | {"learning_rate": rate})


def rows_of(settings: FinetuneSettings, work: Work, numbers: Ints) -> TaskRows:
    """Batches of some of the items."""
    t = settings.train
    assert t.max_length and t.micro_batch_size
    return TaskRows(work.source, numbers, t.max_length, t.micro_batch_size, settings.seed)


@torch.no_grad()
def mean_loss(model: Any, objective: Objective, batches: Iterable[Batch]) -> float:
    """An objective's mean over what all the batches score; NaN where that is nothing."""
    device, total, count = next(model.parameters()).device, 0.0, 0
    for batch in batches:
        loss, scored = objective(model, tensors(batch, device))
        total, count = total + float(loss), count + int(scored)
    return total / count if count else math.nan


def scored(settings: FinetuneSettings, work: Work, model: Any, whole: bool) -> Scored:
    """The task's figures on the held-out items, with the objective's mean as "loss"; NaN alone where there are none."""
    if not len(work.held):
        return Scored({"loss": math.nan})
    found = work.score(model, whole)
    if "loss" not in found.figures:
        found.figures["loss"] = mean_loss(model, work.objective, rows_of(settings, work, work.held).once())
    return found


def limit_of(settings: FinetuneSettings, model: Transformer, policy: str = "truncate") -> Limit:
    """What becomes of texts longer than the model reads, or than `tasks.length`."""
    reads = min(model.config.length, settings.tasks.length or READS)
    return Limit(reads, settings.tasks.long_texts or policy, settings.tasks.overlap)
