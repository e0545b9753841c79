"""What pretraining can learn beside the next token: hidden tokens, middles of texts, and texts that were damaged.

The damage follows from the run's seed and the epoch; held-out documents are damaged the same way each time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from langmill.common.errors import ModelError
from langmill.common.settings import TrainSettings
from langmill.data.batches import Ints
from langmill.data.corrupt import (
    BlankInfilling,
    Denoising,
    FillInMiddle,
    Masking,
    SpanCorruption,
    Words,
    flags,
)
from langmill.data.fresh import Denoised, Infilled, Masked
from langmill.data.rows import Source, TaskRows, tokens_of
from langmill.evaluate.compare import intervals
from langmill.evaluate.loss import Interval
from langmill.jobs.corpus import Corpus
from langmill.model.config import Config, LSTMConfig, ModelConfig, Relative
from langmill.text.tokenizer import Tokenizer
from langmill.text.training import FIM, MARKS, SENTINEL
from langmill.text.translate import closed, source_room
from langmill.train import tasks as objectives
from langmill.train.objectives import CHUNK, IGNORED, Objective, causal
from langmill.train.step import tensors

HELD_SEED = 0  # of the damage done to held-out documents
# Of T5's spans the encoder reads about 0.9 of a text and the decoder writes 0.2: rows of a quarter hold them.
SPAN_RATIO = (4, 1)
KINDS = {"masked": "an encoder with a masked head", "denoise": "an encoder-decoder", "causal": "a decoder"}
STOPS = tuple(".!?。！？…؟।\n")  # a token that ends so ends a sentence


@dataclass(frozen=True)
class Task:
    """Documents as rows of what is read and what is to be said of it. writes: what is learned is to write on, and is
    scored as such; else by its guesses."""

    source: Source
    objective: Objective
    length: int
    rows: int
    writes: bool = False

    @property
    def tokens_of(self) -> Callable[[Any], int] | None:
        """How a batch's tokens are counted, where most are not scored."""
        return None if self.writes else tokens_of

    def batches(self, chosen: Ints, seed: int) -> TaskRows:
        """Endless packed batches of these documents; equal arguments give equal batches."""
        return TaskRows(self.source, chosen, self.length, self.rows, seed)


@dataclass(frozen=True)
class Guesses:
    """How held-out documents were guessed: nats a token, the share that was right, how many tokens were guessed, of how
    many documents, and the entropy of those tokens, below which no guess gets that does not look at the text; with 95 %
    intervals over the documents, None below two."""

    loss: float
    accuracy: float
    guessed: int
    documents: int
    unigram_entropy: float
    loss_interval: Interval | None = None
    accuracy_interval: Interval | None = None

    @property
    def figures(self) -> dict[str, Any]:
        """For a report."""
        return asdict(self)

    @classmethod
    def restore(cls, saved: Mapping[str, Any]) -> Guesses:
        """From the JSON of `figures`."""
        given: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in saved.items()}
        return cls(**given)


@dataclass(frozen=True)
class Guessed:
    """Of each of N documents the sum of nats, the tokens that were guessed and how many of them were right; and how
    often each of V entries was to be guessed."""

    nll_N: NDArray[np.float64]
    tokens_N: NDArray[np.int64]
    right_N: NDArray[np.int64]
    counts_V: NDArray[np.int64]

    @classmethod
    def joined(cls, parts: Sequence[Guessed]) -> Guessed:
        """The documents of several, in order."""
        nll_N, tokens_N, right_N = (
            np.concatenate([getattr(one, name) for one in parts]) for name in ("nll_N", "tokens_N", "right_N")
        )
        return cls(nll_N, tokens_N, right_N, np.sum([one.counts_V for one in parts], axis=0))

    def of(self, chosen: Ints) -> dict[str, float]:
        """loss and accuracy over some of the documents."""
        guessed = max(1, int(self.tokens_N[chosen].sum()))
        return {
            "loss": float(self.nll_N[chosen].sum()) / guessed,
            "accuracy": int(self.right_N[chosen].sum()) / guessed,
        }

    def summary(self, resamples: int = 1000, seed: int = 0) -> Guesses:
        """Over all documents. resamples 0: without intervals."""
        documents, shares = len(self.nll_N), self.counts_V[self.counts_V > 0] / max(1, self.counts_V.sum())
        found = self.of(np.arange(documents))
        between = intervals(self.of, documents, resamples, seed) if resamples else {}
        return Guesses(
            **found, guessed=int(self.counts_V.sum()), documents=documents,
            unigram_entropy=float(-(shares * np.log(shares)).sum()),
            loss_interval=between.get("loss"), accuracy_interval=between.get("accuracy"),
        )  # fmt: skip


def specials_for(objective: str, family: str | None) -> tuple[str, ...]:
    """The control tokens that a tokenizer trained for an objective needs beside the usual ones."""
    if objective == "infill":
        return MARKS["fim"]
    if objective == "blanks" or (objective == "denoise" and family == "t5"):
        return MARKS["sentinels"]
    return () if objective == "causal" else MARKS["mask"]


def kind_of(config: Config) -> str | None:
    """The objective of KINDS that trains a model of this shape; None where no head says words."""
    if not isinstance(config, ModelConfig) or config.writes:
        return "causal"
    if config.head is None or config.head.task != "text":
        return None
    return "denoise" if config.decoder is not None else "masked"


def check_shape(config: Config, objective: str, where: object) -> None:
    """ModelError where a model's shape is not one that the objective trains; it names those that do."""
    kind = kind_of(config)
    if kind is None:
        raise ModelError(
            f"{where} has no head that says words, so there is nothing to pretrain: take the model before its task"
        )
    wanted = "causal" if objective in ("infill", "blanks") else objective
    if kind != wanted:
        fitting = "causal, infill or blanks" if kind == "causal" else kind
        raise ModelError(
            f"train.objective={objective} trains {KINDS[wanted]}, and {where} is {KINDS[kind]}: take "
            f"train.objective={fitting}"
        )


def start_of(tokenizer: Tokenizer) -> int:
    """The id that a fresh decoder behind an encoder begins with: padding."""
    return tokenizer.fill_id


def tokenizer_for(objective: str, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer as the model's folder keeps it: where sources end with eos it puts eos behind every text."""
    return closed(tokenizer) if objective == "denoise" else tokenizer


def fingerprint_at(shards: Path, tokenizer: Tokenizer) -> str:
    """What shards must say of the tokenizer that made them: this one's fingerprint, or that of the one beside them
    where the two only differ in the eos that is put behind a text: the ids in shards have none."""
    if (shards / "tokenizer.json").is_file():
        beside = Tokenizer.load(shards)
        same = beside.fingerprint == tokenizer.fingerprint
        if same or closed(beside).fingerprint == closed(tokenizer).fingerprint:
            return beside.fingerprint
    return tokenizer.fingerprint


def task_for(train: TrainSettings, corpus: Corpus, config: Config) -> Task | None:
    """The task of an objective; None where it is to predict the next token, for which `Corpus.batches` are there.

    train: with rows and length resolved. ModelError where the tokenizer lacks a token for it.
    """
    makers = {"masked": _masked, "infill": _infilled, "blanks": _infilled, "denoise": _denoised}
    make = makers.get(train.objective)
    return None if make is None else make(train, corpus, config)


def _masked(train: TrainSettings, corpus: Corpus, config: Config) -> Task:
    t, length = corpus.tokenizer, train.max_length or config.length
    mask = _named(t.mask_id, "mask token", train)
    words = Words.of([t.token(id) for id in range(t.vocab_size)]) if train.whole_words else None
    how = Masking(mask, flags(t.special_ids, t.vocab_size), words, train.mask_rate or 0.15)
    front, back = t.frame.single.ids
    source = Masked(corpus.shards, how, length, front, back, t.fill_id)
    return Task(source, objectives.masked, length, train.micro_batch_size or 1)


def _infilled(train: TrainSettings, corpus: Corpus, config: Config) -> Task:
    t, length = corpus.tokenizer, train.max_length or config.length
    how: FillInMiddle | BlankInfilling
    if train.objective == "infill":
        how = FillInMiddle(*(_named(t.vocab.get(name), name, train) for name in FIM))
    else:
        how = BlankInfilling(
            _sentinels(t, train), t.boundary_id, _special(t), train.mask_rate or 0.15, plain=0.5
        )
    source = Infilled(corpus.shards, how, length, (t.start_id,), (t.boundary_id,), t.fill_id)
    return Task(source, causal, length, train.micro_batch_size or 1, writes=True)


def _denoised(train: TrainSettings, corpus: Corpus, config: Config) -> Task:
    assert not isinstance(config, LSTMConfig) and config.decoder is not None
    t, length, special = corpus.tokenizer, train.max_length or config.length, _special(corpus.tokenizer)
    front, back = t.frame.single.ids
    back = (*back, *source_room(t, 0)[0])
    start = _named(config.input.start, "token for the decoder to begin with", train)
    how: SpanCorruption | Denoising
    if isinstance(config.decoder.position, Relative):
        how = SpanCorruption(_sentinels(t, train), special, train.mask_rate or 0.15)
        ratio = SPAN_RATIO
    else:
        stops = flags(
            (id for id in range(t.vocab_size) if t.decode([id]).rstrip(" ").endswith(STOPS)), len(special)
        )
        how = Denoising(_named(t.mask_id, "mask token", train), special, stops, train.mask_rate or 0.3)
        ratio = (1, 1)
    length = length * ratio[1] // ratio[0]
    source = Denoised(corpus.shards, how, length, front, back, t.fill_id, start, ratio)
    return Task(source, objectives.seq2seq, length, train.micro_batch_size or 1)


def _special(tokenizer: Tokenizer) -> Any:
    return flags(tokenizer.special_ids, tokenizer.vocab_size)


def _sentinels(tokenizer: Tokenizer, train: TrainSettings) -> tuple[int, ...]:
    if not tokenizer.sentinel_ids:
        _named(None, SENTINEL.format(0), train)
    return tokenizer.sentinel_ids


def _named(id: int | None, what: str, train: TrainSettings) -> int:
    if id is None:
        raise ModelError(
            f"train.objective={train.objective} needs a tokenizer with a {what}, and this one has none: leave "
            "tokenizer.path out and give text, and one is trained that has it"
        )
    return id


@torch.no_grad()
def guess(model: Any, task: Task, chosen: Ints) -> Guessed:
    """Let the model guess what was damaged in some documents."""
    model.eval()
    device, most = model.tokens.weight.device, int(chosen.max(initial=-1)) + 1
    sums = np.zeros((3, most))  # nats, tokens, right ones
    counts = np.zeros(model.config.vocab, np.int64)
    for batch in task.batches(chosen, HELD_SEED).once():
        given = tensors(batch, device)
        more = {
            name: given.get(name) for name in ("encoder_tokens", "encoder_documents", "encoder_positions")
        }
        h_BTD = model.hidden(
            given["tokens"], positions_BT=given["positions"], documents_BT=given["documents"], **more
        )
        scored_BT = given["targets"] != IGNORED
        h_KD, targets_K = h_BTD[scored_BT], given["targets"][scored_BT]
        counts += np.bincount(targets_K.cpu().numpy(), minlength=len(counts))
        rows_K, _ = np.nonzero(batch.targets_BT != IGNORED)
        owners_K = batch.numbers_BP[rows_K, batch.documents_BT[batch.targets_BT != IGNORED] - 1]
        nll, right = list[Tensor](), list[Tensor]()
        for h_CD, targets_C in zip(h_KD.split(CHUNK), targets_K.split(CHUNK), strict=True):
            logits_CV = model.logits(h_CD).float()
            nll.append(F.cross_entropy(logits_CV, targets_C, reduction="none"))
            right.append(logits_CV.argmax(dim=-1) == targets_C)
        for at, values in enumerate((nll, [torch.ones(len(owners_K))], right)):
            weights_K = torch.cat(values).double().cpu().numpy()
            sums[at] += np.bincount(owners_K, weights_K, minlength=most)
    nll_N, tokens_N, right_N = sums[:, chosen]
    return Guessed(nll_N, tokens_N.astype(np.int64), right_N.astype(np.int64), counts)


def guessing(task: Task, chosen: Ints) -> Callable[[Any], dict[str, float]]:
    """What `fit` calls during a run: loss and accuracy on a few held-out documents."""

    def validate(model: Any) -> dict[str, float]:
        found = guess(model, task, chosen).summary(resamples=0)
        return {"loss": found.loss, "accuracy": found.accuracy}

    return validate
