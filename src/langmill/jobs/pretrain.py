"""`langmill pretrain`: text or shards in, a model folder and a report out.

    tokenizer → shards → model (fresh, or --from) → fit → held-out score → model folder → report

Each stage's result is whole or absent, so a run that was killed anywhere goes on from there with --resume. What is
private (shards, checkpoints, samples, report) lies in OUT.run; OUT holds the model and no text.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from langmill.common.configure import save_settings
from langmill.common.errors import ModelError, UsageError
from langmill.common.files import claimed, read_json, write_json
from langmill.common.metrics import Report
from langmill.common.settings import PretrainSettings, QuickstartSettings
from langmill.data.batches import Packed
from langmill.data.readers import check_paths
from langmill.data.shards import Shards
from langmill.evaluate.loss import Scores
from langmill.families import hub
from langmill.families.folder import Model, check_match, load, outline, save
from langmill.families.peft import check_plain
from langmill.infer.ready import find_device
from langmill.jobs import corpus as text
from langmill.jobs import memory
from langmill.jobs.card import Text, card, lineage
from langmill.jobs.corpus import Corpus, Source
from langmill.jobs.heldout import measure, restore, stored, validation
from langmill.jobs.pretrain_report import write_report
from langmill.jobs.pretrain_task import (
    Guesses,
    Task,
    check_shape,
    fingerprint_at,
    guess,
    guessing,
    specials_for,
    start_of,
    task_for,
    tokenizer_for,
)
from langmill.jobs.pretrain_task_report import card as guesser_card
from langmill.jobs.pretrain_task_report import write_guesses
from langmill.jobs.results import Entrant
from langmill.jobs.resume import BEGAN, finished, settled
from langmill.jobs.size import family_of, largest_vocabulary, resolve, target
from langmill.model.config import Config, Gaps, LSTMConfig, ModelConfig
from langmill.model.init import init_
from langmill.model.recurrent import LSTM
from langmill.model.transformer import Transformer
from langmill.text.tokenizer import Tokenizer
from langmill.train.loop import Outcome, fit
from langmill.train.objectives import causal

# Held-out tokens to score, as a share of those to train on, so that scoring stays small beside training: for each of
# the ten validations, and at the end, where an interval is wanted.
VALIDATION_SHARE, VALIDATION_LEAST = 1 / 200, 2_000
GUESSED = 4  # times as many where only some of them are guessed
SCORED_SHARE, SCORED_LEAST, SCORED_MOST = 1 / 10, 50_000, 5_000_000
ASKED: dict[str, Gaps] = {
    "infill": "spm",
    "blanks": "blank",
}  # how a model is asked to fill gaps, by objective

Scored = Scores | Guesses | None  # None: nothing was held out


@dataclass(frozen=True)
class Prepared:
    """All that a run trains with; `settings` have nothing left open. task: None where it is the next token."""

    settings: PretrainSettings
    corpus: Corpus
    model: Model
    device: torch.device
    task: Task | None = None

    @property
    def guesses(self) -> Task | None:
        """The task, where a model is scored by its guesses and not as one that writes."""
        return None if self.task is None or self.task.writes else self.task

    @property
    def planned_tokens(self) -> int:
        """About the tokens that the run will train on."""
        t = self.settings.train
        if t.max_steps is None:
            return round((t.num_train_epochs or 1) * self.corpus.train_tokens)
        return t.max_steps * t.gradient_accumulation_steps * (t.micro_batch_size or 1) * (t.max_length or 1)


def run(settings: PretrainSettings, *, quiet: bool = False) -> Report:
    """Train a language model, score it on held-out documents, and write the model folder and the report.

    Figures: loss, perplexity, bits_per_byte (with bits_per_byte_interval; `before_` the same with --from),
    tokens_per_second, gzip_bits_per_byte, xz_bits_per_byte; where train.objective is masked or denoise, loss, accuracy
    and unigram_entropy of what is guessed. Raises UsageError where OUT exists, SettingsError where a
    resumed run's settings changed, TrainingError where memory or disk do not suffice, Interrupted on Ctrl-C.
    """
    started = time.monotonic()
    if not settings.resume:  # then the text has perhaps been read already
        _check(settings)
    inputs = [*settings.path, settings.from_model, settings.tokenizer.path]
    with claimed(settings.out, settings.resume, settings.force, True, inputs, BEGAN) as folder:
        settings = settled(settings, folder)
        if settings.resume and (done := finished(settings.out, settings.out / "config.json", folder)):
            return done
        save_settings(settings, folder / "settings.yaml")
        ready = prepare(settings, folder, quiet)
        save_settings(ready.settings, folder / "settings.yaml")
        before = _once(folder / "before.json", lambda: _score(ready, quiet)) if settings.from_model else None
        outcome = train(ready, folder, quiet)
        scores = _once(folder / "scores.json", lambda: _score(ready, quiet))
        if not settings.out.exists():
            export(settings.out, ready.settings, ready.corpus, ready.model, scores, outcome, before)
        return _report(ready, outcome, scores, before, folder, time.monotonic() - started)


def _report(
    ready: Prepared, outcome: Outcome, scores: Scored, before: Scored, folder: Path, seconds: float
) -> Report:
    found = None if isinstance(scores, Guesses) else scores
    entrant = Entrant("this model", ready.model, outcome, found, folder)
    if ready.guesses is None:
        assert not isinstance(before, Guesses)
        return write_report(ready.settings, ready.corpus, entrant, before, seconds)
    assert not isinstance(scores, Scores) and not isinstance(before, Scores)
    return write_guesses(ready.settings, ready.corpus, entrant, scores, before, seconds)


def _check(settings: PretrainSettings) -> None:
    """Raise for what cannot work, before --force removes anything."""
    check_paths(settings.path)
    objective = settings.train.objective
    if settings.from_model:
        hub.resolve(settings.from_model)
        if objective != "causal":
            check_shape(outline(settings.from_model)[0], objective, settings.from_model)
    else:
        family_of(settings.model.family, objective)
        target(settings.model.size)


def prepare(settings: PretrainSettings, folder: Path, quiet: bool, most_bytes: int | None = None) -> Prepared:
    """Tokenizer, shards, shape and weights, in this order; what an earlier start of this run made is reused.

    most_bytes: look at this much of the text only.
    """
    model: Model | None = None
    source = text.files(settings.path, settings.data)
    source = text.first(source, most_bytes) if most_bytes else source
    if settings.from_model:
        if given := settings.model.model_fields_set:
            raise UsageError(f"--from brings its own shape: leave model.{min(given)} out")
        model, tokenizer = load(settings.from_model)
        check_plain(model, settings.from_model)
        check_shape(model.config, settings.train.objective, settings.from_model)
    else:
        tokenizer = None
        family = family_of(settings.model.family, settings.train.objective)
        settings = settings.model_copy(update={"model": settings.model.model_copy(update={"family": family})})
    tokenizer = _tokenizer(settings, tokenizer, source, folder, quiet)
    tokenizer = tokenizer_for(settings.train.objective, tokenizer)
    if model is not None:
        check_match(model.config, tokenizer, settings.from_model)
    made = text.shards_among(settings.path)
    if made:
        shards = Shards.open(made, expected=fingerprint_at(made, tokenizer))
    else:
        shards = text.make_shards(
            source, tokenizer, folder / "shards", settings.data, folder / "errors.jsonl", quiet, settings.path
        )
    corpus = text.corpus(tokenizer, shards, settings.data.holdout)
    config, training = resolve(
        settings.model,
        settings.train,
        tokenizer.vocab_size,
        model.config if model is not None else None,
        start_of(tokenizer),
    )
    task = task_for(training, corpus, config)
    device = find_device(training.device)
    memory.check(config, training, device)
    if model is None:
        model = fresh(config, settings.seed)
    return Prepared(settings.model_copy(update={"train": training}), corpus, model.to(device), device, task)


def fresh(config: Config, seed: int) -> Model:
    """A model with first weights."""
    model: Model = LSTM(config) if isinstance(config, LSTMConfig) else Transformer(config)
    init_(model, seed)
    return model


def _tokenizer(
    settings: PretrainSettings, brought: Tokenizer | None, source: Source, folder: Path, quiet: bool
) -> Tokenizer:
    """The model's own, the one named, the one beside the shards, or one trained here."""
    path = settings.tokenizer.path
    if brought is not None and path:
        raise UsageError("--from brings its own tokenizer: leave tokenizer.path out")
    if brought is not None:
        return brought
    if path:
        return Tokenizer.load(path)
    if settings.from_model:
        raise ModelError(
            f"{settings.from_model} has no tokenizer.json: say which one it was trained with by tokenizer.path"
        )
    if made := text.shards_among(settings.path):
        return text.tokenizer_of(made)
    most = largest_vocabulary(target(settings.model.size))
    specials = specials_for(settings.train.objective, settings.model.family)
    return text.train_tokenizer(source, settings.tokenizer, folder / "tokenizer", quiet, most, specials)


def train(ready: Prepared, folder: Path, quiet: bool) -> Outcome:
    """Fit the model in place, or finish what an earlier start began."""
    settings, corpus, t, task = ready.settings, ready.corpus, ready.settings.train, ready.task
    assert t.max_length and t.micro_batch_size
    if task is None:
        batches: Packed = corpus.batches(t.max_length, t.micro_batch_size, settings.seed)
    else:
        batches = task.batches(corpus.train, settings.seed)
    return fit(
        ready.model,
        batches,
        causal if task is None else task.objective,
        t,
        folder,
        seed=settings.seed,
        resume=settings.resume,
        validate=_validation(ready) if len(corpus.held) else None,
        name_of=corpus.shards.id_of,
        tokens_of=None if task is None else task.tokens_of,
        tensorboard=settings.track,
        quiet=quiet,
    )


def _validation(ready: Prepared) -> Callable[[Any], dict[str, float]]:
    length, most = ready.settings.train.max_length, int(VALIDATION_SHARE * ready.planned_tokens)
    most = max(VALIDATION_LEAST, most)
    if ready.guesses is not None:
        return guessing(ready.guesses, ready.corpus.held_out(GUESSED * most))
    return validation(ready.corpus, ready.corpus.held_out(most), length or 1)


def _score(ready: Prepared, quiet: bool) -> Scored:
    corpus, length = ready.corpus, ready.settings.train.max_length
    if not len(corpus.held) or length is None:
        return None
    chosen = corpus.held_out(min(SCORED_MOST, max(SCORED_LEAST, int(SCORED_SHARE * ready.planned_tokens))))
    if ready.guesses is not None:
        return guess(ready.model, ready.guesses, chosen).summary(seed=ready.settings.seed)
    return measure(ready.model, corpus, chosen, length, ready.settings.seed, quiet)


def _once(path: Path, score: Callable[[], Scored]) -> Scored:
    """Scores from `path`, or measured and kept there: weights before a run cannot be scored after it."""
    with contextlib.suppress(OSError):
        if path.is_file():
            saved = dict(read_json(path, "scores", 1))
            return Guesses.restore(saved["guesses"]) if "guesses" in saved else restore(saved)
    found = score()
    if found is not None:
        saved = {"guesses": found.figures} if isinstance(found, Guesses) else stored(found)
        write_json(path, saved, "scores", 1)
    return found


def export(
    out: Path,
    settings: PretrainSettings | QuickstartSettings,
    corpus: Corpus,
    model: Model,
    scores: Scored,
    outcome: Outcome,
    before: Scored = None,
) -> None:
    """Write `out`: the model, its tokenizer, lineage.json and the card. `before`: the score of the model before."""
    shards = corpus.shards
    about = Text(
        shards.documents,
        len(corpus.held),
        shards.tokens,
        shards.bytes,
        hashlib.sha256(np.ascontiguousarray(shards.hashes).tobytes()).hexdigest(),
        shards.fingerprint,
        shards.manifest.get("prepared", []),
    )
    parent = settings.from_model if isinstance(settings, PretrainSettings) else None
    results: dict[str, Any] = {"steps": outcome.steps, "tokens": outcome.tokens, "loss": outcome.loss}
    if scores is not None:
        results |= _figures(scores) | {"scored_documents": scores.documents}
    if before is not None:
        results |= {
            f"before_{name}": value for name, value in _figures(before).items() if "interval" not in name
        }
    if isinstance(settings, PretrainSettings) and settings.train.objective in ASKED:
        model = asked_by_gaps(model, ASKED[settings.train.objective])
    if isinstance(settings, PretrainSettings) and settings.train.objective in ("masked", "denoise"):
        found = scores if isinstance(scores, Guesses) else None
        origin = None if parent is None else Path(parent).name
        words = guesser_card(out.name, settings.train.objective, model.config, about, origin, found)
    else:
        words = card(out.name, model.config, about, parent, results)
    save(model, corpus.tokenizer, out, lineage=lineage(settings, about, parent, results), card=words)


def asked_by_gaps(model: Model, order: Gaps) -> Model:
    """The model, which says in its settings how it learned to fill gaps."""
    if isinstance(model.config, ModelConfig):
        model.config = dataclasses.replace(model.config, gaps=order)
    return model


def _figures(scores: Scores | Guesses) -> dict[str, Any]:
    """What is kept of a score beside the model."""
    if isinstance(scores, Guesses):
        return {name: value for name, value in scores.figures.items() if name != "documents"}
    return {"bits_per_byte": scores.bits_per_byte, "bits_per_byte_interval": scores.bits_per_byte_interval}
