"""`langmill finetune --task prefer`: a model and preferences in, an adapter or a model that goes along with them out.

    rows → pairs of sequences → reference log-probabilities, once → fit → margin and accuracy on held-out pairs → OUT

The reference is the model that training begins with. Its log-probabilities are kept in the run folder, so that there
is never a second model in memory and a resumed run does not compute them again.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as as_bytes

from langmill.adapt.lora import adapt
from langmill.adapt.prefer import Judged, finite, judged, scores
from langmill.common.configure import save_settings
from langmill.common.errors import DataError, SettingsError
from langmill.common.files import atomic_write, read_json, write_json
from langmill.common.metrics import Report
from langmill.common.progress import track
from langmill.common.settings import FinetuneSettings, PreferSettings
from langmill.data.batches import Ints
from langmill.data.chats import Row, read_rows
from langmill.data.examples import Examples, fitted
from langmill.data.pairs import Item, Pair, PairRows, Pairs, Rated, crossed, parse_preference
from langmill.data.pipeline import Ledger
from langmill.families.folder import Model
from langmill.infer.ready import find_device
from langmill.jobs import finetune, memory
from langmill.jobs.answers import Answer, ask
from langmill.jobs.foretell import foretold
from langmill.text.tokenizer import Tokenizer
from langmill.text.turns import Example
from langmill.train.loop import Outcome, fit
from langmill.train.measure import choose
from langmill.train.preferences import WITHOUT_REFERENCE, Scores, beta_of, objective
from langmill.train.step import tensors

GENTLER = 10  # a preference is learnt at this fraction of the rate that suits conversations
VALIDATED = 32, 1 / 40  # pairs scored during training: at least, and as a share of those that are trained on
USED = {
    "label_smoothing": ("dpo", "simpo"), "simpo_gamma": ("simpo",), "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
}  # fmt: skip
_UNUSABLE = "not a usable preference"


@dataclass(frozen=True)
class Prepared:
    """What a run learns from. `rows` are the chosen (for KTO: all) answers behind the pairs, by their numbers."""

    pairs: Pairs
    rows: list[Row]
    train: Ints
    held: Ints
    ledger: Ledger
    counted: dict[str, int]

    @property
    def examples(self) -> Examples:
        return self.pairs.examples

    @property
    def trained_tokens(self) -> int:
        return self.examples.trained_tokens(self.pairs.sequences(self.train))


@dataclass(frozen=True)
class Part:
    """An answer as ids."""

    row: Row
    example: Example
    good: bool


@dataclass(frozen=True)
class Found:
    """A model on what was held out."""

    judged: Judged
    answers: list[Answer]


def check(settings: FinetuneSettings) -> None:
    """Raise SettingsError for settings that contradict each other."""
    prefer = settings.prefer
    for name, kinds in USED.items():
        given = getattr(prefer, name) != PreferSettings.model_fields[name].default
        if given and prefer.loss not in kinds:
            raise SettingsError(
                f"prefer.{name} is for {' and '.join(kinds)}, and prefer.loss is {prefer.loss}"
            )
    if settings.too_long == "split":
        raise SettingsError("too_long=split: a pair cannot be compared in pieces; choose drop or truncate")


def run(
    settings: FinetuneSettings, model: Model, tokenizer: Tokenizer, folder: Path, quiet: bool, started: float
) -> Report:
    """Learn preferences with a loaded model, as finetune.run has claimed OUT for it.

    Figures: loss, margin and accuracy on held-out pairs, each with its before_…, and those of a conversation run.
    """
    from langmill.jobs.prefer_report import card, origin, write_report

    ready = prepare(settings, tokenizer, model.config.length, folder / "errors.jsonl", quiet)
    settings = chosen(settings, ready, model)
    device = find_device(settings.train.device)
    wide = settings.train.model_copy(update={"max_length": width(settings)})
    whole = settings.method == "full"
    memory.check(model.config, wide, device, whole, finetune.smaller(settings))
    if not quiet:
        tokens = int(ready.pairs.predictions(ready.train).sum())
        print(foretold(model.config, wide, tokens, device, whole), file=sys.stderr)
    model.to(device)
    asked = (settings, model, tokenizer, ready, quiet)
    before = _kept(folder / "before.json", lambda: {"answers": _ask(*asked, "before")})
    if settings.method != "full":
        adapt(model, settings.lora, settings.seed, four_bit=settings.method == "qlora")
    settings = typed(settings, ready, model)
    save_settings(settings, folder / "settings.yaml")
    pairs, first = reference(
        settings, model, ready.pairs, ready.held, folder / "reference.safetensors", quiet
    )
    ready = dataclasses.replace(ready, pairs=pairs)
    outcome = learn(settings, model, ready, folder, quiet)

    def measured() -> dict[str, Any]:
        last = Judged()
        if len(ready.held):
            last = judged(_scores(settings, model, pairs, ready.held), settings.prefer)
        return {"figures": last.figures(), "answers": _ask(*asked, "after")}

    after = _kept(folder / "after.json", measured)
    found = [
        Found(figures, [Answer(**answer) for answer in saved["answers"]])
        for figures, saved in ((first, before), (Judged(**after["figures"]), after))
    ]
    if not settings.out.exists():
        results = {"steps": outcome.steps, "pairs": len(ready.train), **after["figures"]}
        lineage = origin(settings, ready, tokenizer, results)
        finetune.export(settings, model, tokenizer, lineage, card(settings, ready, found[1].judged))
    return write_report(settings, model, ready, outcome, found, folder, time.monotonic() - started)


def prepare(
    settings: FinetuneSettings, tokenizer: Tokenizer, most: int, errors: Path | None, quiet: bool
) -> Prepared:
    """Read the rows, render the answers of each and hold some out. `most`: tokens that the model can see."""
    ledger, counted = Ledger(errors), {"truncated": 0}
    length = min(settings.train.max_length or finetune.LONGEST, most)
    with track("rendering", unit="preferences", quiet=quiet) as progress:

        def make(where: str, value: Any) -> list[Part]:
            progress.advance(1)
            cut = {"truncated": 0}
            parts = [
                Part(row, fitted(finetune.example_of(tokenizer, row), length, settings.too_long, cut), good)
                for row, good in answers_of(parse_preference(where, value), settings.prefer.loss)
            ]
            if len(parts) == 2 and parts[0].example.ids == parts[1].example.ids:
                raise DataError("chosen and rejected are the same tokens, as far as a row holds them")
            counted["truncated"] += min(1, cut["truncated"])
            return parts

        read = list(read_rows(settings.data, ledger, make, _UNUSABLE))
    if not read:
        raise DataError(finetune.nothing_left(settings, ledger, "preference"))
    if settings.prefer.loss == "kto":
        single = [(part.row.id, part.example, part.good) for parts in read for part in parts]
        items = list(crossed(single, length))
    else:
        items = [Item(good.row.id, good.example, bad.example) for good, bad in read]
    rows = {(part.row.id, part.good): part.row for parts in read for part in parts}
    pad = tokenizer.fill_id
    pairs = Pairs.of(items, pad)
    training, held = pairs.split(settings.holdout)
    behind = [rows[item.name, item.label > 0] for item in items]
    return Prepared(pairs, behind, training, held, ledger, counted)


def answers_of(found: Pair | Rated, loss: str) -> list[tuple[Row, bool]]:
    """The answers of a row, each good or not: a chosen and a rejected one, or for KTO any."""
    if isinstance(found, Pair):
        return [(found.chosen, True), (found.rejected, False)]
    if loss != "kto":
        raise DataError(f"a single answer with a label is for prefer.loss=kto, and not for {loss}")
    return [(found.answer, found.good)]


def previewed(
    settings: FinetuneSettings, tokenizer: Tokenizer, ledger: Ledger
) -> Iterator[list[tuple[Row, Example]]]:
    """The answers of each row as the model will see them."""

    def make(where: str, value: Any) -> list[tuple[Row, Example]]:
        named = []
        for row, good in answers_of(parse_preference(where, value), settings.prefer.loss):
            kind = (
                ("good" if good else "bad")
                if settings.prefer.loss == "kto"
                else ("chosen" if good else "rejected")
            )
            named.append(
                (dataclasses.replace(row, id=f"{row.id}, {kind}"), finetune.example_of(tokenizer, row))
            )
        return named

    yield from read_rows(settings.data, ledger, make, _UNUSABLE)


def chosen(settings: FinetuneSettings, ready: Prepared, model: Model) -> FinetuneSettings:
    """The settings with nothing left open but the number type. A row holds two sequences of max_length."""
    every = ready.pairs.sequences(np.arange(len(ready.pairs)))
    train, given = finetune.chosen(settings, ready.examples, every, model), settings.train
    assert train.micro_batch_size and train.learning_rate
    rows = given.micro_batch_size or max(1, train.micro_batch_size // 2)
    rate = given.learning_rate or train.learning_rate / GENTLER
    train = train.model_copy(update={"micro_batch_size": rows, "learning_rate": rate})
    prefer = settings.prefer.model_copy(update={"beta": beta_of(settings.prefer)})
    return settings.model_copy(update={"train": train, "prefer": prefer})


def width(settings: FinetuneSettings) -> int:
    """Predictions in a row: any pair fits."""
    return 2 * (settings.train.max_length or 1)


def typed(settings: FinetuneSettings, ready: Prepared, model: Model) -> FinetuneSettings:
    """The settings with the number type chosen: the reference must be made in the one that training uses."""
    if settings.train.dtype != "auto":
        return settings
    batches = _batches(settings, ready.pairs, ready.train)
    sample = tensors(next(batches), next(model.parameters()).device)
    eager = settings.train.model_copy(update={"compile": False})
    dtype = choose(model, objective(settings.prefer), sample, eager, 1).dtype
    return settings.model_copy(update={"train": settings.train.model_copy(update={"dtype": dtype})})


def reference(
    settings: FinetuneSettings, model: Model, pairs: Pairs, held: Ints, path: Path, quiet: bool
) -> tuple[Pairs, Judged]:
    """The pairs with their reference log-probabilities, from `path` or computed and kept there, and the figures of the
    model that training begins with. New adapters change nothing yet, so the model is the reference as it stands; where
    the loss knows no reference only what is held out is read."""
    needed = held if settings.prefer.loss in WITHOUT_REFERENCE else np.arange(len(pairs))
    digest = pairs.examples.identity()["examples"]
    saved = _read(path, digest)
    if saved is None:
        logps, nll = np.zeros((len(pairs), 2), np.float32), np.zeros(len(pairs), np.float32)
        if len(needed):
            found = _scores(settings, model, pairs, needed, quiet)
            logps[needed], nll[needed] = found.policy.numpy(), found.chosen_nll.numpy()
        saved = {"logps": logps, "chosen_nll": nll}
        about = {"format": "reference", "version": "1", "examples": digest}
        atomic_write(path, as_bytes(saved, metadata=about))
    pairs = dataclasses.replace(pairs, reference=saved["logps"])
    tokens = [pairs.examples.trained_tokens(np.array([s])) for s in pairs.sequences(held).tolist()]
    then = torch.from_numpy(pairs.reference[held])
    first = Scores(
        then,
        then,
        torch.tensor(tokens, dtype=torch.float32).view(-1, 2),
        torch.from_numpy(saved["chosen_nll"][held]),
        torch.from_numpy(pairs.labels[held]),
    )
    return pairs, judged(first, settings.prefer)


def _read(path: Path, digest: str) -> dict[str, NDArray[np.float32]] | None:
    """What `path` holds, if it is there, whole, and of these examples."""
    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            known = (about.get("format"), about.get("version"), about.get("examples")) == (
                "reference",
                "1",
                digest,
            )
            return {name: file.get_tensor(name) for name in ("logps", "chosen_nll")} if known else None
    except (OSError, SafetensorError):
        return None


def learn(settings: FinetuneSettings, model: Model, ready: Prepared, folder: Path, quiet: bool) -> Outcome:
    """Fit the model in place, or finish what an earlier start began."""
    few = ready.held[: max(VALIDATED[0], int(len(ready.train) * VALIDATED[1]))]
    return fit(
        model,
        _batches(settings, ready.pairs, ready.train),
        objective(settings.prefer),
        settings.train,
        folder,
        seed=settings.seed,
        resume=settings.resume,
        validate=None
        if not len(few)
        else lambda m: finite(judged(_scores(settings, m, ready.pairs, few), settings.prefer)),
        name_of=ready.pairs.name,
        tokens_of=lambda batch: int(batch.scored_BT.sum()),
        tensorboard=settings.track,
        quiet=quiet,
    )


def _batches(settings: FinetuneSettings, pairs: Pairs, numbers: Ints) -> PairRows:
    return PairRows(pairs, numbers, width(settings), settings.train.micro_batch_size or 1, settings.seed)


def _scores(
    settings: FinetuneSettings, model: Any, pairs: Pairs, numbers: Ints, quiet: bool = True
) -> Scores:
    whole = settings.prefer.loss == "orpo"
    return scores(model, pairs, numbers, width(settings), settings.train.dtype, whole, quiet)


def _ask(
    settings: FinetuneSettings, model: Model, tokenizer: Tokenizer, ready: Prepared, quiet: bool, when: str
) -> list[dict[str, Any]]:
    """Answers to held-out prompts, as JSON."""
    numbers = ready.held if len(ready.held) else ready.train
    good = numbers[ready.pairs.labels[numbers] > 0][: max(finetune.ASKED, settings.samples)]
    rows = [ready.rows[number] for number in good.tolist()]
    return [dataclasses.asdict(answer) for answer in ask(model, tokenizer, rows, quiet, when)]


def _kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `path` holds, or made and kept there."""
    if not path.is_file():
        write_json(path, make(), "answers", 1)
    return read_json(path, "answers", 1)
