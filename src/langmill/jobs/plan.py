"""`langmill plan`: what a run would cost here, before it runs, and the size that makes best use of a given time.

Parameters, operations and memory by part come in closed form; seconds a step and peak memory from a calibration run
of the real shape where it is small enough, else of the same shape with one and with two layers, extended in a
straight line (a stack's time and memory are linear in its layers).
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from langmill.common.errors import SettingsError, UsageError
from langmill.common.metrics import Report
from langmill.common.progress import track
from langmill.common.settings import DataSettings, PlanSettings, TokenizerSettings, TrainSettings
from langmill.data.pipeline import Ledger
from langmill.data.shards import Shards, write_shards
from langmill.families.folder import outline
from langmill.infer.ready import find_device
from langmill.jobs import corpus, memory
from langmill.jobs.probe import Cost, apart
from langmill.jobs.report import bytes_shown, count_shown, seconds_shown, shown
from langmill.jobs.size import NAMED, family_of, largest_vocabulary, resolve, target
from langmill.model.config import Config, LSTMConfig, ModelConfig
from langmill.model.count import parameters, training_flops
from langmill.text.document import Document
from langmill.text.tokenizer import Tokenizer
from langmill.text.training import sample, vocab_for
from langmill.train.measure import matmul_flops

OPTIMAL = 20  # tokens a parameter: Hoffmann et al. 2022, arXiv:2203.15556, table 3
SECONDS = 6.0  # of timed steps in a calibration
LARGEST_STEP = 10.0  # seconds: a shape whose step would take longer is calibrated by one and two layers
ASSUMED = 0.5  # share of the matrix-product rate that training reaches, before anything is measured
BYTES_A_TOKEN = 4  # of English, before there is a tokenizer


@dataclass(frozen=True)
class Corpus:
    """The text to train on, as far as there is one: its tokens and bytes, the vocabulary (None: as the size asks),
    shards of it, or of a sample, for the calibration; and the shape of the model to go on from, if one is."""

    tokens: int | None = None
    bytes: int | None = None
    vocab: int | None = None
    shards: Path | None = None
    shape: Config | None = None

    def vocab_for(self, size: int, tokens: int | None) -> int:
        """The vocabulary of a model of `size` parameters for about `tokens` tokens."""
        usual = vocab_for((tokens or OPTIMAL * size) * BYTES_A_TOKEN)
        return self.vocab or min(usual, largest_vocabulary(size))


@dataclass(frozen=True)
class Plan:
    """A run and its cost; `cost` is None where nothing was measured."""

    config: Config
    train: TrainSettings
    tokens: int
    step_tokens: float
    cost: Cost | None

    @property
    def steps(self) -> int:
        return max(1, round(self.tokens / self.step_tokens))

    @property
    def seconds(self) -> float | None:
        return None if self.cost is None else self.cost.step_seconds * self.steps


def run(settings: PlanSettings, *, quiet: bool = False) -> Report:
    """Print the plan of a run. Figures: step_seconds, seconds, peak_bytes, flops_per_token and memory by part."""
    device = find_device(settings.train.device)
    with tempfile.TemporaryDirectory(prefix="langmill-", ignore_cleanup_errors=True) as scratch:
        found = text(settings, Path(scratch) / "shards", quiet)
        with track("calibrating", unit="runs", quiet=quiet or not settings.probe) as progress:
            if settings.budget:
                settings = optimal(settings, found, duration(settings.budget), device)
                progress.advance()
            made = plan(settings, found, device)
            progress.advance()
    return _report(settings, made, found, device)


def duration(words: str) -> float:
    """Seconds of "90s", "30m", "2h" or "1.5d"; SettingsError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhd])\s*", words)
    if not match or float(match[1]) <= 0:
        raise SettingsError(f'budget "{words}" is no time: write 90s, 30m, 8h or 2d')
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


def text(settings: PlanSettings, folder: Path, quiet: bool) -> Corpus:
    """Measure the text: all of it is counted, a bounded sample of it is tokenised and kept in `folder`."""
    if not settings.from_model:
        return _text(settings, None, folder, quiet)
    if given := settings.model.model_fields_set:
        raise UsageError(f"--from brings its own shape: leave model.{min(given)} out")
    shape, tokenizer = outline(settings.from_model)
    return replace(_text(settings, tokenizer, folder, quiet), vocab=shape.vocab, shape=shape)


def _text(settings: PlanSettings, brought: Tokenizer | None, folder: Path, quiet: bool) -> Corpus:
    t = settings.tokenizer
    tokenizer = Tokenizer.load(t.path) if t.path else brought
    if not settings.path:
        return Corpus(vocab=tokenizer.vocab_size if tokenizer else t.vocab_size)
    if made := corpus.shards_among(settings.path):
        shards = Shards.open(made, verify=False)
        train = corpus.corpus(tokenizer or corpus.tokenizer_of(made), shards, settings.data.holdout)
        beside = (made / "tokenizer.json").is_file()
        return Corpus(train.train_tokens, shards.bytes, train.tokenizer.vocab_size, made if beside else None)
    return _measured(settings.path, settings.data, t, tokenizer, target(settings.model.size), folder, quiet)


def _measured(
    paths: Iterable[str], data: DataSettings, t: TokenizerSettings, tokenizer: Tokenizer | None, size: int,
    folder: Path, quiet: bool,
) -> Corpus:  # fmt: skip
    ledger = Ledger()
    with track("reading", unit="B", quiet=quiet) as progress:
        documents = corpus.files(list(paths), data)(ledger)
        kept, _ = sample((_told(d, progress.advance) for d in documents), t.sample_bytes)
    total = ledger.total("read").bytes - sum(count.bytes for count in ledger.dropped().values())
    vocab = t.vocab_size or min(vocab_for(total), largest_vocabulary(size))
    tokenizer = tokenizer or Tokenizer.train(kept, vocab, t.kind, t.sample_bytes)
    shards = write_shards((Document(str(i), words, "") for i, words in enumerate(kept)), tokenizer, folder)
    tokenizer.save(folder)
    share = total / max(1, sum(len(words.encode("utf-8")) for words in kept)) * (1 - data.holdout)
    return Corpus(round((shards.tokens + shards.documents) * share), total, tokenizer.vocab_size, folder)


def _told(document: Document, advance: Any) -> str:
    advance(len(document.text))
    return document.text


def plan(settings: PlanSettings, found: Corpus, device: torch.device) -> Plan:
    """The run that the settings describe: how long it is, and what a step of it costs here."""
    vocab = found.vocab_for(target(settings.model.size), settings.tokens)
    config, train = resolve(settings.model, settings.train, vocab, found.shape)
    rows, length = train.micro_batch_size or 1, train.max_length or config.length
    full = float(rows * length * train.gradient_accumulation_steps)
    tokens = _tokens(settings, found, config, full)
    rough = Plan(config, train, tokens, full, None)
    if not settings.probe:
        return rough
    cost = calibrate(config, train, found.shards, rough.steps, settings.seed, device)
    return Plan(config, train, tokens, cost.step_tokens, cost)


def _tokens(settings: PlanSettings, found: Corpus, config: Config, step: float) -> int:
    if settings.tokens:
        return settings.tokens
    if settings.train.max_steps:
        return round(settings.train.max_steps * step)
    if found.tokens:
        return round(found.tokens * (settings.train.num_train_epochs or 1))
    return OPTIMAL * parameters(config)


def calibrate(
    config: Config, train: TrainSettings, shards: Path | None, steps: int, seed: int, device: torch.device
) -> Cost:
    """What a step costs: of the real shape, or extended from one and two layers where that is too large to try."""
    if isinstance(config, ModelConfig) and not config.writes:
        raise UsageError(
            "a step is measured of models that write only, not of encoders and encoder-decoders: give probe=false for "
            "the closed forms"
        )
    train = train.model_copy(update={"objective": "causal"})  # infill and blanks cost the same
    rows, length = train.micro_batch_size or 1, train.max_length or config.length
    rate = ASSUMED * matmul_flops("float32" if device.type == "cpu" else "bfloat16", device)
    seconds = training_flops(config, length) * rows * length * train.gradient_accumulation_steps / rate
    fits = memory.estimate(config, train, device).total < 0.7 * memory.free(device)
    if isinstance(config, LSTMConfig) or (fits and seconds < LARGEST_STEP) or config.main.layers <= 2:
        memory.check(config, train, device)
        return apart(config, train, shards, steps, seed, SECONDS)
    few = train.model_copy(update={"gradient_accumulation_steps": 1})
    shapes = [
        replace(config, decoder=replace(config.main, layers=n, window=config.main.window[:n])) for n in (1, 2)
    ]
    memory.check(shapes[1], few, device)
    one, two = (apart(shape, few, shards, steps, seed, SECONDS / 2) for shape in shapes)
    more, times = config.main.layers - 1, train.gradient_accumulation_steps
    return replace(
        one,
        step_seconds=times * (one.step_seconds + more * max(0.0, two.step_seconds - one.step_seconds)),
        step_tokens=times * one.step_tokens,
        peak_bytes=one.peak_bytes + more * max(0, two.peak_bytes - one.peak_bytes),
        spread=max(one.spread, two.spread),
        why=(*one.why, f"extended from 1 and 2 layers to {config.main.layers}"),
    )


def optimal(settings: PlanSettings, found: Corpus, seconds: float, device: torch.device) -> PlanSettings:
    """The settings with the size that is best for `seconds` here: C = 6 N D with D = 20 N (Hoffmann et al. 2022).

    The rate that training reaches depends on the size, so it is measured at the size that a first guess gives, and
    once more where that was far off.
    """
    if settings.from_model or settings.model.model_fields_set & {"size", "layers", "dim", "hidden"}:
        raise UsageError("--budget chooses the size: leave --from, model.size and the shape out")
    rate = ASSUMED * matmul_flops("float32" if device.type == "cpu" else "bfloat16", device)
    sized = _sized(settings, found, rate * seconds)
    for _ in range(2 if settings.probe else 0):
        made, before = plan(sized, found, device), rate
        assert made.cost
        rate = (
            training_flops(made.config, made.train.max_length or 1)
            * made.cost.step_tokens
            / made.cost.step_seconds
        )
        sized = _sized(settings, found, rate * seconds)
        if 0.8 < rate / before < 1.25:
            break
    return sized


def _sized(settings: PlanSettings, found: Corpus, operations: float) -> PlanSettings:
    count = _affordable(settings, found, operations)
    model = settings.model.model_copy(update={"size": str(count)})
    return settings.model_copy(update={"model": model, "tokens": OPTIMAL * count})


def _affordable(settings: PlanSettings, found: Corpus, operations: float) -> int:
    """The largest size whose 20 tokens a parameter cost at most `operations`, to two digits."""
    low, high = max(100_000, (found.vocab or 0) * 96), 10**12
    while high / low > 1.01:
        middle = int((low * high) ** 0.5)
        sized = settings.model.model_copy(update={"size": str(middle)})
        config, train = resolve(sized, settings.train, found.vocab_for(middle, None))
        if training_flops(config, train.max_length or 1) * OPTIMAL * parameters(config) > operations:
            high = middle
        else:
            low = middle
    return int(float(f"{low:.2g}"))


def _report(settings: PlanSettings, made: Plan, found: Corpus, device: torch.device) -> Report:
    config, train, cost = made.config, made.train, made.cost
    parts = memory.estimate(config, train, device)
    flops = training_flops(config, train.max_length or 1)
    by_part = {
        "weights": parts.weights,
        "gradients": parts.gradients,
        "optimiser": parts.optimiser,
        "activations": parts.activations,
        "logits": parts.logits,
    }
    count = parameters(config)
    figures: dict[str, Any] = {"flops_per_token": flops, "total_flops": flops * made.tokens}
    figures |= {f"{name}_bytes": value for name, value in by_part.items()}
    if cost:
        by_part["Python and torch"] = cost.base_bytes
        by_part["measured peak"] = cost.peak_bytes
        figures |= {
            "step_seconds": cost.step_seconds,
            "seconds": made.seconds,
            "peak_bytes": cost.peak_bytes,
            "tokens_per_second": cost.step_tokens / cost.step_seconds,
            "utilisation": flops * cost.step_tokens / cost.step_seconds / cost.matmul_flops,
            "spread": cost.spread,
        }
    counts = {"parameters": count, "tokens": made.tokens, "steps": made.steps, "vocabulary": config.vocab}
    extra: dict[str, Any] = {"size": settings.model.size, "shape": _shape(config), "device": str(device)}
    extra |= {"train": train.model_dump(mode="json"), "why": list(cost.why) if cost else []}
    return Report(
        counts=counts,
        figures=figures,
        text="\n".join(_lines(settings, made, found, by_part, figures)),
        extra=extra,
    )


def _shape(config: Config) -> dict[str, int]:
    if isinstance(config, LSTMConfig):
        return {"layers": config.layers, "dim": config.dim, "hidden": config.hidden, "vocab": config.vocab}
    d = config.main
    return {
        "layers": d.layers,
        "dim": d.dim,
        "heads": d.heads,
        "kv_heads": d.kv_heads,
        "hidden": d.hidden,
        "vocab": config.vocab,
    }


def _lines(
    settings: PlanSettings, made: Plan, found: Corpus, by_part: dict[str, int], figures: dict[str, Any]
) -> list[str]:
    train, cost, count = made.train, made.cost, parameters(made.config)
    shape = ", ".join(f"{name} {value:,}" for name, value in _shape(made.config).items())
    batch = f"{train.gradient_accumulation_steps} × {train.micro_batch_size} × {train.max_length} tokens"
    amount = f"{shown(made.tokens)} tokens, {made.tokens / count:.2g} for each parameter"
    parts = ", ".join(f"{name} {bytes_shown(value)}" for name, value in by_part.items())
    told = found.tokens and found.bytes
    origin = settings.from_model or family_of(settings.model.family, train.objective)
    rows = [
        (
            "model",
            f"{origin}, {count_shown(count)} parameters: {shape}",
        ),
        ("text", f"{shown(found.tokens)} tokens in {bytes_shown(found.bytes or 0)}" if told else "not given"),
        ("training", f"{amount}, {made.steps:,} steps of {batch}, learning rate {train.learning_rate:.2g}"),
        ("operations", f"{figures['flops_per_token']:.3g} a token, {figures['total_flops']:.3g} in all"),
        ("memory", parts),
    ]
    if cost and made.seconds:
        how = f"{cost.dtype}, {'compiled' if cost.compile else 'eager'}, {cost.threads} threads"
        rate = f"{figures['tokens_per_second']:,.0f} tokens/s, {seconds_shown(cost.step_seconds)} a step"
        busy = " (this machine is busy: steps vary by more than half)" if cost.spread > 1.5 else ""
        rows.append(
            ("speed", f"{rate}, {figures['utilisation']:.0%} of this machine's matrix products, {how}")
        )
        rows.append(("time", seconds_shown(made.seconds) + busy))
    lines = [f"{name:11}{value}" for name, value in rows]
    return [*_advice(settings, made, found), *lines, f"sizes: {_sizes()}, or any count"]


def _advice(settings: PlanSettings, made: Plan, found: Corpus) -> list[str]:
    count = parameters(made.config)
    enough = count_shown(OPTIMAL * count)
    if settings.budget:
        lines = [
            f"{settings.budget} here make best use of {count_shown(count)} parameters on {enough} tokens"
        ]
        if found.tokens and found.tokens < made.tokens:
            times = f"{made.tokens / found.tokens:.1f} times fewer tokens"
            lines.append(
                f"your text holds {times}: repeat it (4 times costs little), find more, or take --from MODEL"
            )
        return lines
    if made.tokens < OPTIMAL / 4 * count and not settings.from_model:
        return [
            f"little text for this size, {enough} tokens would be enough: think of --from MODEL or a smaller --size"
        ]
    return []


def _sizes() -> str:
    return ", ".join(f"{name} {count_shown(count)}" for name, count in NAMED.items())
