"""`langmill finetune`: a model and conversations in, an adapter or a model of one's own out, and a report.

    rows → examples with a loss mask → model (adapters, or whole) → fit → held-out loss and answers → OUT → report

Each stage's result is whole or absent, so a run that was killed goes on from there with --resume. What is private
(checkpoints, answers, report, rows that were set aside) lies in OUT.run; OUT holds the adapter and no text.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from langmill.adapt.lora import adapt
from langmill.common.configure import save_settings
from langmill.common.errors import DataError, ModelError, SettingsError, UsageError
from langmill.common.files import atomic_folder, claimed, read_json, write_json
from langmill.common.metrics import Report
from langmill.common.progress import track
from langmill.common.settings import FinetuneSettings, FinetuneTrainSettings, ModelSettings, TrainSettings
from langmill.data.batches import Ints, Packed
from langmill.data.chats import Chat, Row, read_chats
from langmill.data.examples import Examples, fitted, once, shown
from langmill.data.pipeline import Ledger
from langmill.families import hub, vocabulary
from langmill.families.folder import Model, load, outline, save
from langmill.families.peft import check_plain, write_adapter
from langmill.infer.ready import find_device
from langmill.jobs import memory
from langmill.jobs.answers import Answer, ask
from langmill.jobs.foretell import foretold
from langmill.jobs.resume import BEGAN, finished, settled
from langmill.jobs.size import resolve
from langmill.jobs.work import mean_loss
from langmill.model.config import LSTMConfig, ModelConfig
from langmill.text.chat import render
from langmill.text.tokenizer import Tokenizer
from langmill.text.turns import Example, chat_example, completion_example
from langmill.train.loop import Outcome, fit
from langmill.train.objectives import causal

LONGEST = 1024  # tokens in a row, unless train.max_length says otherwise
STEPS_AN_EPOCH = 40  # at least, where the micro-batch is chosen here: small sets get small ones
PASS_TOKENS = 2048  # a CPU gains nothing from more in one pass, which takes memory: the rest is accumulated
LORA_RATE = 3  # an adapter learns at this multiple of the rate that suits all weights
HELD_TOKENS, HELD_SHARE = 4_000, 1 / 20  # scored before and after: at least, as a share of what is trained on
ASKED = 16  # held-out prompts that are answered before and after, to see whether the model stops


@dataclass(frozen=True)
class Prepared:
    """What a run learns from. `rows` are the conversations behind the examples, by their numbers."""

    examples: Examples
    rows: list[Row]
    train: Ints
    held: Ints
    ledger: Ledger
    counted: dict[str, int]

    @property
    def trained_tokens(self) -> int:
        return self.examples.trained_tokens(self.train)


@dataclass(frozen=True)
class Measured:
    """A model on held-out examples: nats a trained token, and its answers."""

    loss: float | None
    answers: list[Answer]


def run(settings: FinetuneSettings, *, quiet: bool = False) -> Report:
    """Adapt a model to conversations and write OUT: an adapter in PEFT's format, or with method=full a model.

    Figures: loss (held-out, nats a trained token), before_loss, stopped and before_stopped (shares of answers that
    ended by themselves), trained_share, tokens_per_second, peak_bytes. Raises UsageError where OUT exists, DataError
    where no row is usable, TrainingError where memory or disk do not suffice, Interrupted on Ctrl-C.
    """
    from langmill.jobs import finetune_task, prefer, reinforce
    from langmill.jobs.finetune_report import adapter_card, origin, write_report

    started = time.monotonic()
    if settings.preview:
        return preview(settings, quiet)
    if not settings.resume:
        _check(settings)
    inputs = [settings.model, *settings.data, settings.template]
    with claimed(settings.out, settings.resume, settings.force, True, inputs, BEGAN) as folder:
        settings = settled(settings, folder)
        if settings.method is None and settings.task in ("chat", "prefer", "reinforce"):
            settings = settings.model_copy(update={"method": "lora"})
        if settings.resume and (done := finished(settings.out, settings.out, folder)):
            return done
        save_settings(settings, folder / "settings.yaml")
        model, tokenizer = opened(settings)
        if settings.task == "prefer":
            return prefer.run(settings, model, tokenizer, folder, quiet, started)
        if settings.task == "reinforce":
            return reinforce.run(settings, model, tokenizer, folder, quiet, started)
        if settings.task in finetune_task.TASKS:
            return finetune_task.run(settings, model, tokenizer, folder, quiet, started)
        ready = prepare(settings, tokenizer, model.config.length, folder / "errors.jsonl", quiet)
        settings = settings.model_copy(update={"train": chosen(settings, ready.examples, ready.train, model)})
        save_settings(settings, folder / "settings.yaml")
        device = find_device(settings.train.device)
        memory.check(model.config, settings.train, device, settings.method == "full", smaller(settings))
        if not quiet:
            tokens = int(ready.examples.predictions(ready.train).sum())
            print(
                foretold(model.config, settings.train, tokens, device, settings.method == "full"),
                file=sys.stderr,
            )
        model.to(device)
        before = _once(folder / "before.json", settings, model, tokenizer, ready, quiet, "before")
        if settings.method != "full":
            adapt(model, settings.lora, settings.seed, four_bit=settings.method == "qlora")
        outcome = train(settings, model, ready, folder, quiet)
        after = _once(folder / "after.json", settings, model, tokenizer, ready, quiet, "after")
        if not settings.out.exists():
            results = {"steps": outcome.steps, "tokens": outcome.tokens, "held_out_loss": after.loss}
            lineage = origin(settings, ready, tokenizer, results)
            export(settings, model, tokenizer, lineage, adapter_card(settings, ready, results))
        seconds = time.monotonic() - started
        return write_report(settings, model, ready, outcome, before, after, folder, seconds)


def smaller(settings: FinetuneSettings) -> str:
    """What to do where no smaller batch makes the run fit into memory."""
    first = "--method lora, " if settings.method == "full" else ""
    return f"choose {first}a smaller train.max_length, or a smaller model"


def check_used(settings: FinetuneSettings) -> None:
    """Raise SettingsError for a setting that this run would not read."""
    unread = {
        "prefer": settings.task != "prefer" and "task=prefer",
        "reinforce": settings.task != "reinforce" and "task=reinforce",
        "lora": settings.method == "full" and "adapters",
    }
    for group, what in unread.items():
        given = getattr(settings, group)
        for name, field in type(given).model_fields.items():
            if what and getattr(given, name) != field.get_default(call_default_factory=True):
                raise SettingsError(f"{group}.{name} is for {what}, and this run is task={settings.task}, "
                                    f"method={settings.method}")  # fmt: skip


def _check(settings: FinetuneSettings) -> None:
    """Raise for what cannot work, before --force removes anything."""
    from langmill.jobs import finetune_task, prefer, reinforce

    check_used(settings)
    if settings.task == "prefer":
        prefer.check(settings)
    if settings.task == "reinforce":
        reinforce.check(settings)
    if settings.task in finetune_task.TASKS:
        finetune_task.check(settings)
    hub.resolve(settings.model)
    for path in settings.data:
        if not Path(path).exists():
            raise UsageError(f"{path} does not exist: --data takes a file of rows, or a folder of such files")
    if settings.template is not None and not settings.template.is_file():
        raise UsageError(f"{settings.template} is no file: --template takes a Jinja chat template")


def opened(settings: FinetuneSettings) -> tuple[Model, Tokenizer]:
    """The model and its tokenizer, with the template that the settings name."""
    model, tokenizer = load(settings.model)
    check_plain(model, settings.model)
    return model, _tokenizer(settings, tokenizer)


def _tokenizer(settings: FinetuneSettings, tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise ModelError(vocabulary.missing(settings.model))
    if settings.template is not None:
        try:
            template = settings.template.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as reason:
            raise DataError(
                f"{settings.template} is not UTF-8 (byte {reason.start}): convert it first"
            ) from None
        render(
            template, [{"role": "user", "content": "Hello"}], add_generation_prompt=True
        )  # broken ones raise here
        tokenizer = tokenizer.with_template(template)
    return tokenizer


def prepare(
    settings: FinetuneSettings, tokenizer: Tokenizer, most: int, errors: Path | None, quiet: bool
) -> Prepared:
    """Read the rows, render them and hold some out. `most`: tokens that the model can see."""
    ledger, counted = Ledger(errors), {"truncated": 0, "split": 0}
    length = min(settings.train.max_length or LONGEST, most)
    rows: dict[str, Row] = {}
    ends: set[bool] = set()
    with track("rendering", unit="conversations", quiet=quiet) as progress:

        def make(row: Row) -> tuple[str, Example]:
            progress.advance(1)
            whole = example_of(tokenizer, row)
            if True not in ends:
                ends.add(has_end(tokenizer, whole))
            example = fitted(whole, length, settings.too_long, counted)
            rows[row.id] = row
            return row.id, example

        pad = tokenizer.fill_id
        try:
            examples = Examples.of(read_chats(settings.data, ledger, make), pad)
        except DataError:
            raise DataError(nothing_left(settings, ledger)) from None
    if True not in ends:
        stops = " or ".join(filter(None, map(tokenizer.token, sorted(tokenizer.stop_ids))))
        raise DataError(f"the model would not learn to stop: the chat template ends no answer by {stops}, "
                        "which would stop it; give --template one that does")  # fmt: skip
    training, held = examples.split(settings.holdout)
    return Prepared(examples, [rows[name] for name in examples.names], training, held, ledger, counted)


def nothing_left(settings: FinetuneSettings, ledger: Ledger, what: str = "conversation") -> str:
    """Why there is nothing to train on."""
    empty = f"there is nothing in {', '.join(settings.data)}"
    return f"no {what} is left to train on: {left_out(ledger) or empty}"


def left_out(ledger: Ledger) -> str:
    """How many rows were set aside, why, and one of them; nothing where there is none."""
    reasons = [f"{count.documents} {reason}" for reason, count in ledger.dropped().items()]
    example = next((f" (such as {found[0]})" for found in ledger.examples.values() if found), "")
    return f"{', '.join(reasons)}{example}"


def has_end(tokenizer: Tokenizer, example: Example) -> bool:
    """Whether a token that stops generation is trained."""
    stops = tokenizer.stop_ids
    return any(on and id in stops for id, on in zip(example.ids, example.trained, strict=True))


def example_of(tokenizer: Tokenizer, row: Row) -> Example:
    """A row as ids and mask."""
    if isinstance(row, Chat):
        return chat_example(tokenizer, row.messages, row.tools, row.first)
    return completion_example(tokenizer, row.prompt, row.completion)


def chosen(
    settings: FinetuneSettings, examples: Examples, training: Ints, model: Model
) -> FinetuneTrainSettings:
    """The training settings with nothing left open: rows as long as the longest example, few where there is little."""
    config, t = model.config, settings.train
    if isinstance(config, LSTMConfig):
        raise ModelError("an LSTM cannot be adapted to conversations: take a Transformer")
    sizes = examples.predictions(training)
    longest = 1 << (int(sizes.max()) - 1).bit_length()
    length = t.max_length or min(config.length, LONGEST, max(64, longest))
    asked = TrainSettings(
        max_length=length, micro_batch_size=t.micro_batch_size, learning_rate=t.learning_rate
    )
    full = resolve(ModelSettings(), asked, config.vocab, config)[1]
    wanted = int(sizes.sum()) // (length * STEPS_AN_EPOCH * t.gradient_accumulation_steps)
    rows = t.micro_batch_size or max(1, min(full.micro_batch_size or 1, 1 << max(0, wanted.bit_length() - 1)))
    passes = t.gradient_accumulation_steps
    if t.micro_batch_size is None and passes == 1 and find_device(t.device).type == "cpu":
        few = max(1, PASS_TOKENS // length)
        rows, passes = min(rows, few), max(1, rows // few)
    rate = t.learning_rate or (full.learning_rate or 1e-4) * (1 if settings.method == "full" else LORA_RATE)
    resolved = {"max_length": length, "micro_batch_size": rows, "gradient_accumulation_steps": passes}
    return t.model_copy(update=resolved | {"learning_rate": rate})


def train(settings: FinetuneSettings, model: Model, ready: Prepared, folder: Path, quiet: bool) -> Outcome:
    """Fit the model in place, or finish what an earlier start began."""
    t = settings.train
    assert t.max_length and t.micro_batch_size
    few = _some(ready, ready.held, HELD_TOKENS // 2)
    return fit(
        model,
        Packed(ready.examples, ready.train, t.max_length, t.micro_batch_size, settings.seed),
        causal,
        t,
        folder,
        seed=settings.seed,
        resume=settings.resume,
        validate=None
        if not len(few)
        else lambda m: {"loss": held_loss(m, ready.examples, few, t.max_length or 1)},
        name_of=lambda number: ready.examples.names[number],
        tensorboard=settings.track,
        quiet=quiet,
    )


def _some(ready: Prepared, numbers: Ints, least: int) -> Ints:
    """The first of `numbers` whose tokens reach `least`, or a share of what is trained on."""
    sizes = ready.examples.predictions(numbers)
    most = max(least, HELD_SHARE * int(ready.examples.predictions(ready.train).sum()))
    return numbers[: int((sizes.cumsum() <= most).sum()) or min(1, len(numbers))]


def held_loss(model: Any, examples: Examples, numbers: Ints, length: int) -> float:
    """Nats a trained token over whole examples."""
    return mean_loss(model, causal, once(examples, numbers, length))


def _once(
    path: Path, settings: FinetuneSettings, model: Model, tokenizer: Tokenizer, ready: Prepared, quiet: bool, when: str
) -> Measured:  # fmt: skip
    """What the model does with held-out examples, from `path` or measured and kept there."""
    if path.is_file():
        saved = read_json(path, "answers", 1)
        return Measured(saved["loss"], [Answer(**answer) for answer in saved["answers"]])
    model.eval()
    numbers, loss = _some(ready, ready.held, HELD_TOKENS), None
    if len(numbers):
        loss = held_loss(model, ready.examples, numbers, settings.train.max_length or 1)
    asked = ready.held if len(ready.held) else ready.train
    rows = [ready.rows[number] for number in asked[: max(ASKED, settings.samples)].tolist()]
    found = Measured(loss, ask(model, tokenizer, rows, quiet, when))
    answers = [dataclasses.asdict(answer) for answer in found.answers]
    write_json(path, {"loss": loss, "answers": answers}, "answers", 1)
    return found


def export(
    settings: FinetuneSettings, model: Model, tokenizer: Tokenizer, lineage: dict[str, Any], card: str
) -> None:
    """Write OUT: the adapter or the model, the tokenizer with its template, the card and lineage.json."""
    if settings.method == "full":
        save(model, tokenizer, settings.out, lineage=lineage, card=card)
        return
    with atomic_folder(settings.out) as fresh:
        write_adapter(model, fresh, settings.model, settings.lora.lora_dropout)
        tokenizer.save(fresh)
        write_json(fresh / "lineage.json", lineage, "lineage", 1)
        (fresh / "README.md").write_text(card, encoding="utf-8")


def preview(settings: FinetuneSettings, quiet: bool = False) -> Report:
    """The first examples as the model will see them, with what is trained in colour."""
    from langmill.jobs import prefer, prompts, task_preview

    if settings.task == "reinforce":
        return prompts.preview(settings, *opened(settings), quiet)
    if settings.task not in ("chat", "prefer"):
        return task_preview.preview(settings, *opened(settings), quiet)
    shape, brought = outline(settings.model)
    tokenizer = _tokenizer(settings, brought)
    wanted = settings.preview or 3
    length = min(
        settings.train.max_length or LONGEST, shape.length if isinstance(shape, ModelConfig) else LONGEST
    )
    ledger = Ledger()
    if settings.task == "prefer":
        made = prefer.previewed(settings, tokenizer, ledger)
    else:
        made = read_chats(settings.data, ledger, lambda row: [(row, example_of(tokenizer, row))])
    found = list(itertools.chain.from_iterable(itertools.islice(made, wanted)))
    if not found:
        raise DataError(nothing_left(settings, ledger))
    text = "\n\n".join(_previewed(tokenizer, row, example, length) for row, example in found)
    text += f"\n\nleft out until here: {aside}" if (aside := left_out(ledger)) else ""
    rows = [{"id": row.id, "tokens": len(e.ids), "trained": sum(e.trained)} for row, e in found]
    trained, total = sum(r["trained"] for r in rows), sum(r["tokens"] for r in rows)  # type: ignore[misc]
    return Report(counts={"examples": len(rows), "tokens": total, "trained_tokens": trained},
                  figures={"trained_share": trained / total}, text=text, extra={"examples": rows})  # fmt: skip


def _previewed(tokenizer: Tokenizer, row: Row, example: Example, length: int) -> str:
    long = f", longer than {length}" if len(example.ids) > length + 1 else ""
    endless = "" if has_end(tokenizer, example) else ", without a token that stops the model"
    head = f"{row.id}: {len(example.ids)} tokens, {example.share:.0%} trained{long}{endless}"
    pieces = _pieces(tokenizer, example.ids)
    return f"{head}\n{shown(pieces, example.trained, sys.stdout.isatty())}"


def _pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Each id's own text; a character of several ids stands at its last."""
    stream, pieces = tokenizer.stream(), []
    for id in ids:
        if id in tokenizer.special_ids:
            pieces.append(stream.flush() + (tokenizer.token(id) or ""))
            stream = tokenizer.stream()
        else:
            pieces.append(stream.push(id))
    return pieces
