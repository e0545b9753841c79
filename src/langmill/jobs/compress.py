"""`langmill compress`: a model in 8 or 4 bits, what it lost, and what it gained.

    model → text to calibrate by → rounded layers → the same text read by both → OUT → report

OUT is a folder that transformers and vLLM load (see families/quantised.py). The report lies in OUT.run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from langmill.apps import sentence
from langmill.common.configure import save_settings
from langmill.common.errors import DataError, ModelError, UsageError
from langmill.common.files import claimed
from langmill.common.metrics import Report
from langmill.common.progress import track
from langmill.common.settings import CompressSettings, DataSettings, EvaluateSettings
from langmill.compress import calibrate
from langmill.compress.quantize import EMBEDDING, HEAD, Changed, Inputs, Plan, plan, quantise
from langmill.data.pipeline import Ledger
from langmill.data.readers import check_paths, read
from langmill.data.tasks import read_translations
from langmill.evaluate.loss import Encoded, Scores, score
from langmill.families.folder import Model, load, read_config, save
from langmill.families.hub import resolve
from langmill.families.peft import check_plain
from langmill.infer.generate import generate_ids
from langmill.infer.ready import find_device
from langmill.infer.sampling import Sampling
from langmill.jobs.evaluate_rows import kind_of
from langmill.model.transformer import Transformer
from langmill.text.document import text_hash
from langmill.text.tokenizer import Tokenizer

LONGEST = 512  # tokens of a window, unless max_length says otherwise
MOST_BYTES = 64 << 20  # of text that is read to calibrate by
SCORED_BYTES = 256 << 10  # of the held-out text that both models are compared on
SPEED_TOKENS = 32


@dataclass(frozen=True)
class Text:
    """What there is to read. held: what both models are compared on, and `passes` of it; `same`: that is what the
    calibration uses too. source: where the calibration comes from, in words, or why there is none."""

    batches: Sequence[Inputs]
    source: str
    held: Sequence[Encoded] = ()
    passes: Sequence[Inputs] = ()
    same: bool = False
    ledger: Ledger = field(default_factory=Ledger)


@dataclass(frozen=True)
class Measured:
    """A model on the held-out text: scores where it writes, its last states, and the tokens a second it writes."""

    scores: Scores | None
    states: Sequence[Tensor]
    tokens_per_second: float | None


def run(settings: CompressSettings, *, quiet: bool = False) -> Report:
    """Write a model folder with its weights in 8 or 4 bits, and a report of what that changed.

    Figures: bytes and bytes_before (of the weights' files), bits_per_weight, bits_per_byte, perplexity and
    tokens_per_second, each with its NAME_before, states_error (of the last states, as a share of their length).
    Raises UsageError where OUT exists, ModelError where the model cannot be rounded, DataError where no text is usable.
    """
    from langmill.jobs.compress_report import card, origin, write_report

    started = time.monotonic()
    check_paths([*settings.data, *settings.on])
    inputs = [settings.model, *settings.data, *settings.on]
    with claimed(settings.out, force=settings.force, inputs=inputs) as folder:
        model, tokenizer, wanted = opened(settings)
        save_settings(settings, folder / "settings.yaml")
        text = prepare(settings, model, tokenizer, folder / "errors.jsonl", quiet)
        before = measured(model, tokenizer, text, quiet, "the model as it was")
        with track("rounding", total=len(wanted.roundings), unit="layers", quiet=quiet) as progress:
            layers = quantise(model, wanted, text.batches, settings.damping, lambda _: progress.advance(1))
        after = measured(model, tokenizer, text, quiet, "the rounded model")
        results = compared(before, after)
        _narrow(model, settings.model)
        save(model, tokenizer, settings.out, lineage=origin(settings, text, tokenizer, results),
             card=card(settings, model, wanted, results))  # fmt: skip
        sentence.copy(sentence.folder_of(settings.model), settings.out)
        seconds = time.monotonic() - started
        return write_report(settings, model, wanted, text, layers, before, after, results, folder, seconds)


def preview(settings: CompressSettings, *, quiet: bool = False) -> Report:
    """--dry-run: which layers would be rounded, by what, and to what size."""
    from langmill.jobs.compress_report import write_preview

    check_paths([*settings.data, *settings.on])
    model, tokenizer, wanted = opened(settings)
    return write_preview(settings, model, wanted, intention(settings, model, tokenizer))


def opened(settings: CompressSettings) -> tuple[Transformer, Tokenizer | None, Plan]:
    """The model, its tokenizer, and what is to become of its layers."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if "quantization_config" in _configuration(settings.model):
        raise ModelError(f"{settings.model} is rounded already: take the model that it was made of")
    model, tokenizer = load(settings.model, device=find_device(settings.device))
    check_plain(model, settings.model)
    wanted = plan(model, settings.bits, settings.head_bits, settings.symmetric, settings.portable)
    if not any(name not in (EMBEDDING, HEAD) for name in wanted.roundings):
        why = next(iter(wanted.left.values()), "it has none")
        raise ModelError(f"{settings.model}: no linear layer of its blocks can be rounded ({why})")
    assert isinstance(model, Transformer)
    return model, tokenizer, wanted


def _configuration(where: str) -> dict[str, Any]:
    path = resolve(where)
    return read_config(path / "config.json") if (path / "config.json").is_file() else {}


def intention(settings: CompressSettings, model: Transformer, tokenizer: Tokenizer | None) -> str:
    """What the layers are calibrated by, in words; where nothing, why."""
    if settings.method == "nearest":
        return "to the nearest, without calibration"
    if tokenizer is None:
        return _instead(settings, "the model has no tokenizer to read text with")
    if settings.data:
        return f"by GPTQ on {', '.join(settings.data)}"
    if not model.config.writes:
        return _instead(settings, "this model does not write text itself: give some by --data")
    return f"by GPTQ on {settings.samples} texts that the model writes itself"


def _instead(settings: CompressSettings, reason: str) -> str:
    if settings.method == "gptq":
        raise UsageError(f"--method gptq needs text, and {reason}")
    return f"to the nearest, since {reason}"


def prepare(
    settings: CompressSettings, model: Transformer, tokenizer: Tokenizer | None, errors: Path, quiet: bool
) -> Text:
    """Read the text to calibrate by and to compare on, or let the model write it."""
    source = intention(settings, model, tokenizer)
    if tokenizer is None:
        return Text((), source)
    length = min(settings.max_length or LONGEST, model.config.length)
    calibrated, ledger = source.startswith("by GPTQ"), Ledger(errors)
    pairs = _pairs(settings, settings.data, ledger, MOST_BYTES) if settings.data else []
    if settings.on:
        held = _pairs(settings, settings.on, ledger, None)
    else:
        pairs, held = _split(pairs, settings.holdout)
    batches: list[dict[str, Any]] = []
    if calibrated and settings.data:
        batches = calibrate.passes(model, tokenizer, pairs, settings.samples, length)
    elif calibrated:
        with track("writing text to calibrate by", unit="texts", quiet=quiet) as progress:
            batches = list(calibrate.written(model, tokenizer, settings.samples, length, settings.seed))
            progress.advance(settings.samples)
    scored = [
        Encoded(str(number), tokenizer.encode(text), len(text.encode()))
        for number, (_, text) in enumerate(held)
    ]
    passes = calibrate.passes(model, tokenizer, held, 8, length)
    return Text(batches, source, scored, passes or batches[:4], not passes, ledger)


def _pairs(
    settings: CompressSettings, paths: Sequence[str], ledger: Ledger, most: int | None
) -> list[calibrate.Pair]:
    """Texts, or sources with their translations, in the order of a hash; the first `most` bytes of what is there."""
    asked = EvaluateSettings(model=settings.model, on=list(paths))
    found, size = list[calibrate.Pair](), 0
    if kind_of(asked) == "translate":
        rows = read_translations(paths, ledger, lambda row: (row.source, row.target))
    else:
        documents = read(paths, DataSettings(text_field=settings.text_field), ledger)
        rows = ((document.text, document.text) for document in documents if document.text.strip())
    for pair in rows:
        found.append(pair)
        size += len(pair[1].encode())
        if most is not None and size >= most:
            break
    if not found:
        raise DataError(f"{', '.join(paths)}: there is no text in any row")
    return sorted(found, key=lambda pair: text_hash(pair[1]))


def _split(pairs: list[calibrate.Pair], holdout: float) -> tuple[list[calibrate.Pair], list[calibrate.Pair]]:
    """(to calibrate by, to compare on): the largest hashes, so that equal texts stand on one side."""
    border = int((1 - holdout) * 2**64)
    held = [pair for pair in pairs if text_hash(pair[1]) >= border]
    if holdout > 0 and not held:
        last = text_hash(pairs[-1][1]) if pairs else 0
        held = [pair for pair in pairs if text_hash(pair[1]) == last]
    if len(held) == len(pairs):
        return pairs, []
    kept, size = list[calibrate.Pair](), 0
    for pair in held:
        kept.append(pair)
        size += len(pair[1].encode())
        if size >= SCORED_BYTES:
            break
    return pairs[: len(pairs) - len(held)], kept


@torch.inference_mode()
def measured(model: Transformer, tokenizer: Tokenizer | None, text: Text, quiet: bool, what: str) -> Measured:
    """Read the held-out text, and write a little."""
    if tokenizer is None:
        return Measured(None, (), None)
    scores = None
    if model.config.writes and text.held:
        total = sum(len(document.ids) for document in text.held)
        with track(f"scoring {what}", total=total, unit="tokens", quiet=quiet) as progress:
            length = min(2 * LONGEST, model.config.length)
            scores = score(
                model, text.held, start_id=tokenizer.start_id, length=length, on_tokens=progress.advance
            )
    states = [model.hidden(**batch).float().cpu() for batch in text.passes]
    return Measured(scores, states, _speed(model, tokenizer) if model.config.writes else None)


def _speed(model: Transformer, tokenizer: Tokenizer) -> float:
    """Tokens a second that one row goes on by, the best of two."""
    count = min(SPEED_TOKENS, model.config.length - 1)
    best = math.inf
    for _ in range(2):
        steps = generate_ids(model, [[tokenizer.start_id]], Sampling(max_new_tokens=count + 1))
        next(steps)  # reading the prompt
        started = time.perf_counter()
        written = sum(1 for _ in steps)
        best = min(best, (time.perf_counter() - started) / max(1, written))
    return 1 / best


def compared(before: Measured, after: Measured) -> dict[str, float | None]:
    """The figures of both models."""
    found: dict[str, float | None] = {}
    for name in ("bits_per_byte", "perplexity", "loss"):
        for end, one in (("_before", before), ("", after)):
            found[name + end] = None if one.scores is None else getattr(one.scores, name)
    error = sum(float((a - b).square().sum()) for a, b in zip(after.states, before.states, strict=True))
    whole = sum(float(b.square().sum()) for b in before.states)
    found["states_error"] = math.sqrt(error / whole) if whole else None
    return found | {
        "tokens_per_second_before": before.tokens_per_second,
        "tokens_per_second": after.tokens_per_second,
    }


def _narrow(model: Model, where: str) -> None:
    """Bring what was not rounded back to the number type that the model's files have."""
    theirs = _configuration(where)
    name = str(theirs.get("dtype") or theirs.get("torch_dtype"))
    if name in ("bfloat16", "float16"):
        for weight in model.parameters():
            weight.data = weight.data.to(getattr(torch, name))


def summary(layers: Sequence[Changed]) -> dict[str, float | None]:
    """Means over the rounded layers, each counted by its weights."""
    total = sum(math.prod(layer.shape) for layer in layers)

    def mean(pairs: Sequence[tuple[float, int]]) -> float | None:
        count = sum(size for _, size in pairs)
        return sum(value * size for value, size in pairs) / count if count else None

    sizes = [(layer, math.prod(layer.shape)) for layer in layers]
    return {
        "weight_error": mean([(layer.weight_error, size) for layer, size in sizes]),
        "output_error": mean([(e, size) for layer, size in sizes if (e := layer.output_error) is not None]),
        "bits_per_weight": 8 * sum(layer.bytes for layer in layers) / max(1, total),
    }
