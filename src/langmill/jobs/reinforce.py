"""`langmill finetune --task reinforce`: a model, prompts and a function that judges answers in; what earns more out.

    rows → prompts → fit (each step: answers by the engine, rewards, GRPO) → rewards on held-out prompts → OUT → report

The reference of the KL term is the model that training begins with: the adapters left out, or a copy where all weights
are trained. Answers of the run are kept in the run folder, under samples/.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from langmill.adapt.lora import adapt
from langmill.adapt.reinforce import Tally, logps, objective, without_adapters
from langmill.adapt.rewards import Reward, check_fields, find, judge, total
from langmill.adapt.rollouts import (
    SLOTS,
    Answer,
    AnswerBatch,
    Floats,
    LogProbs,
    Parts,
    Prompt,
    Rollouts,
    Written,
    write,
)
from langmill.common.configure import save_settings
from langmill.common.errors import ModelError, SettingsError, TrainingError
from langmill.common.files import read_json, write_json
from langmill.common.metrics import Metrics, Report
from langmill.common.progress import track
from langmill.common.settings import FinetuneSettings, ModelSettings, TrainSettings
from langmill.data.batches import IGNORED, Ints
from langmill.families.folder import Model
from langmill.infer.ready import find_device
from langmill.infer.sampling import Sampling
from langmill.jobs import finetune, memory
from langmill.jobs.foretell import foretold
from langmill.jobs.prompts import Prepared, asked_of, prepare
from langmill.jobs.report import bytes_shown
from langmill.jobs.size import resolve
from langmill.model.config import ModelConfig
from langmill.model.count import parameters
from langmill.text.tokenizer import Tokenizer
from langmill.train.loop import Outcome, State, fit
from langmill.train.measure import choose
from langmill.train.step import tensors

GENTLER = 10  # rewards are learnt from at this fraction of the rate that suits conversations
HELD, VALIDATED = 256, 64  # held-out prompts answered before and after, and at each validation, at most
HELD_DRAWS = 1 << 39  # the number that held-out answers are drawn with: no step has it
GPU_TOKENS = 16_384  # of a pass where the GPU holds them


@dataclass(frozen=True)
class Found:
    """A model's answers to held-out prompts, one each, and means over them; nothing where none was held out."""

    figures: dict[str, float]
    answers: list[dict[str, Any]]


def check(settings: FinetuneSettings) -> None:
    """Raise for settings that contradict each other, and for reward functions that are not there."""
    find(settings.reinforce.reward, settings.reinforce.reward_weights)
    if settings.too_long != "drop":
        raise SettingsError(f"too_long={settings.too_long}: a prompt is answered whole or left out (drop)")
    if settings.train.compile is True:
        raise SettingsError(
            "train.compile: answers differ in length from step to step, and compiled code wants one"
        )
    if settings.train.gradient_accumulation_steps != 1:
        raise SettingsError(
            "train.gradient_accumulation_steps follows from reinforce.prompts_per_step × num_generations, which are "
            "the answers of a step, and train.micro_batch_size: leave it out"
        )


def run(
    settings: FinetuneSettings, model: Model, tokenizer: Tokenizer, folder: Path, quiet: bool, started: float
) -> Report:
    """Learn from rewards with a loaded model, as finetune.run has claimed OUT for it.

    Figures: reward, length and stopped (a share) of sampled answers to held-out prompts, each with its before_…, kl,
    and those of a conversation run. DataError for what a reward function does wrong.
    """
    from langmill.jobs.reinforce_report import card, origin, write_report

    rewards = find(settings.reinforce.reward, settings.reinforce.reward_weights)
    if not isinstance(model.config, ModelConfig) or model.config.encoder is not None:
        raise ModelError(
            "rewards are learnt from by a Transformer that goes on from its prompt: a decoder alone"
        )
    ready = prepare(settings, tokenizer, model.config.length, folder / "errors.jsonl", quiet)
    check_fields(rewards, ready.fields)
    device = find_device(settings.train.device)
    settings = chosen(settings, ready, model.config, device)
    whole = settings.method == "full"
    memory.check(model.config, settings.train, device, whole, finetune.smaller(settings))
    besides = check_writing(settings, model.config, device)
    model.to(device)
    first = copy.deepcopy(model) if whole and settings.reinforce.beta else None
    if not whole:
        adapt(model, settings.lora, settings.seed, four_bit=settings.method == "qlora")
    settings = typed(settings, model)
    save_settings(settings, folder / "settings.yaml")
    if not quiet:
        said = foretold(model.config, settings.train, 0, device, whole)
        print(f"{said}, and {bytes_shown(besides)} to write the answers", file=sys.stderr)
    asked = (settings, model, tokenizer, rewards, ready.prompts)
    before = _kept(folder / "before.json", lambda: answered(*asked, ready.held[:HELD], "before", quiet))
    outcome = learn(settings, model, first, tokenizer, rewards, ready, folder, quiet)
    after = _kept(folder / "after.json", lambda: answered(*asked, ready.held[:HELD], "after", quiet))
    if not settings.out.exists():
        results = {"steps": outcome.steps, "prompts": len(ready.train), **after.figures}
        lineage = origin(settings, ready, tokenizer, results)
        finetune.export(settings, model, tokenizer, lineage, card(settings, ready, before, after))
    seconds = time.monotonic() - started
    return write_report(settings, model, ready, outcome, before, after, folder, seconds)


def chosen(
    settings: FinetuneSettings, ready: Prepared, config: ModelConfig, device: torch.device
) -> FinetuneSettings:
    """The settings with nothing left open but the number type."""
    t, r = settings.train, settings.reinforce
    width = ready.longest() + r.max_completion_length
    answers = r.prompts_per_step * r.num_generations
    asked = TrainSettings(max_length=width, learning_rate=t.learning_rate)
    full = resolve(ModelSettings(), asked, config.vocab, config)[1].learning_rate or 1e-4
    rate = full * (1 if settings.method == "full" else finetune.LORA_RATE) / GENTLER
    tokens = finetune.PASS_TOKENS if device.type == "cpu" else GPU_TOKENS
    rows = t.micro_batch_size or max(1, min(answers, tokens // width))
    epochs = 1.0 if t.num_train_epochs is None else t.num_train_epochs
    updates = math.ceil(epochs * len(ready.train) / r.prompts_per_step) * r.num_iterations
    train = t.model_copy(
        update={
            "max_length": width,
            "micro_batch_size": min(rows, answers),
            "gradient_accumulation_steps": -(-answers // min(rows, answers)),
            "learning_rate": t.learning_rate or rate,
            "max_steps": t.max_steps or updates,
            "compile": False,
        }
    )
    return settings.model_copy(update={"train": train})


def check_writing(settings: FinetuneSettings, config: ModelConfig, device: torch.device) -> int:
    """Bytes that a run takes beside training: for the weights as they are packed to write with, what answers have been
    read to, and a copy of the first model where adapters cannot be left out. TrainingError where they are not free."""
    r, c, whole = settings.reinforce, config.main, settings.method == "full"
    width = settings.train.max_length or config.length
    answers = min(SLOTS, max(r.prompts_per_step * r.num_generations, HELD))
    cache = 8 * c.layers * c.kv_heads * c.head_dim * width * answers  # keys and values, float32
    copies = (device.type == "cpu") + bool(whole and r.beta)
    besides = cache + 4 * parameters(config) * copies
    needed = memory.estimate(config, settings.train, device, whole).total + besides
    if needed > (there := memory.free(device)):
        raise TrainingError(
            f"this run needs about {bytes_shown(needed)} of memory, {bytes_shown(besides)} of them to write the "
            f"answers, and {bytes_shown(there)} are free: {finetune.smaller(settings)}"
        )
    return besides


def typed(settings: FinetuneSettings, model: Model) -> FinetuneSettings:
    """The settings with the number type chosen: all log-probabilities must be of the one that training uses."""
    t, r = settings.train, settings.reinforce
    if t.dtype != "auto":
        return settings
    assert t.micro_batch_size and t.max_length
    tokens_BT = np.zeros((t.micro_batch_size, t.max_length), np.int64)
    targets_BT = np.where(
        np.arange(t.max_length) < t.max_length - r.max_completion_length, IGNORED, tokens_BT
    )
    nothing_BT = np.zeros(tokens_BT.shape, np.float32)
    sample = AnswerBatch(tokens_BT, targets_BT, np.ones(len(tokens_BT), np.float32), None, nothing_BT, ())
    device = next(model.parameters()).device
    dtype = choose(model, objective(r, Tally()), tensors(sample, device), t, 1).dtype
    return settings.model_copy(update={"train": t.model_copy(update={"dtype": dtype})})


def learn(
    settings: FinetuneSettings, model: Model, first: Model | None, tokenizer: Tokenizer, rewards: Sequence[Reward],
    ready: Prepared, folder: Path, quiet: bool,
) -> Outcome:  # fmt: skip
    """Fit the model in place, or finish what an earlier start began."""
    r, tally = settings.reinforce, Tally()
    parts = Parts(
        lambda asked, number: write(model, tokenizer, asked, sampling(settings, number), lambda: None),
        lambda prompts, written: judged(rewards, ready.fields, prompts, written),
        _scorer(settings, lambda: nullcontext(model)) if r.num_iterations > 1 else None,
        _scorer(settings, lambda: nullcontext(first) if first else without_adapters(model))
        if r.beta
        else None,
    )
    rows = settings.train.micro_batch_size or 1
    rollouts = Rollouts(ready.prompts, ready.train, r, rows, settings.seed, tokenizer.fill_id, parts, tally)

    def note(step: int, state: State) -> None:
        metrics.log(step, **figures_of(rollouts.answers, r.reward), **_told(tally, r.beta))
        if step == 1 or step % settings.train.log_every == 0 or step == settings.train.max_steps:
            group = [a for a in rollouts.answers if a.prompt == rollouts.answers[0].prompt]
            shown = [{"text": a.text, "reward": a.reward, "stopped": a.stopped} for a in group]
            told = {"step": step, "prompt": ready.prompts[group[0].prompt].given, "answers": shown}
            (folder / "samples").mkdir(exist_ok=True)
            write_json(folder / "samples" / f"step-{step:08}.json", told, "samples", 1)

    few = ready.held[:VALIDATED]
    asked = (settings, model, tokenizer, rewards, ready.prompts, few, "validating", True)
    with closing(Metrics(folder, settings.track)) as metrics:
        return fit(
            model,
            rollouts,
            objective(r, tally),
            settings.train,
            folder,
            seed=settings.seed,
            resume=settings.resume,
            validate=None if not len(few) else lambda m: answered(*asked).figures,
            name_of=lambda number: ready.prompts[number].name,
            tokens_of=lambda batch: int((batch.targets_BT != IGNORED).sum()),
            hooks=[note],
            tensorboard=settings.track,
            quiet=quiet,
        )


def sampling(settings: FinetuneSettings, number: int) -> Sampling:
    """How the answers of step `number` are drawn."""
    r = settings.reinforce
    return Sampling(r.max_completion_length, r.temperature, seed=settings.seed << 40 ^ number)


def judged(
    rewards: Sequence[Reward], fields: Sequence[str], prompts: Sequence[Prompt], written: Sequence[Written]
) -> list[tuple[list[float | None], float]]:
    """What the functions say of each answer, and their weighted sum."""
    completions = [
        one.text if isinstance(prompt.given, str) else [{"role": "assistant", "content": one.text}]
        for prompt, one in zip(prompts, written, strict=True)
    ]
    given = {field: [prompt.fields.get(field) for prompt in prompts] for field in fields}
    names, ids = [prompt.name for prompt in prompts], [one.ids for one in written]
    told = judge(rewards, [prompt.given for prompt in prompts], completions, ids, given, names)
    return [(row, total(rewards, row)) for row in told]


def _scorer(settings: FinetuneSettings, within: Callable[[], AbstractContextManager[Any]]) -> LogProbs:
    """Log-probabilities of a batch under the model that `within` gives, in the number type of training."""

    @torch.no_grad()
    def scored(batch: AnswerBatch) -> Floats:
        with within() as model:
            place, training = next(model.parameters()).device, model.training
            model.eval()
            with torch.autocast(place.type, torch.bfloat16, enabled=settings.train.dtype == "bfloat16"):
                found = logps(model, tensors(batch, place), settings.reinforce.temperature)
            model.train(training)
        values: Floats = found.cpu().numpy()
        return values

    return scored


def answered(
    settings: FinetuneSettings, model: Model, tokenizer: Tokenizer, rewards: Sequence[Reward],
    prompts: Sequence[Prompt], numbers: Ints, when: str, quiet: bool,
) -> Found:  # fmt: skip
    """One drawn answer to each of the numbered prompts, the same draws each time, and what they earn."""
    chosen = [prompts[number] for number in numbers.tolist()]
    if not chosen:
        return Found({}, [])
    with track(f"answering, {when}", len(chosen), "prompts", quiet) as progress:
        drawn = sampling(settings, HELD_DRAWS)
        written = write(model, tokenizer, [p.ids for p in chosen], drawn, lambda: progress.advance(1))
    fields = sorted({field for prompt in prompts for field in prompt.fields})
    told = judged(rewards, fields, chosen, written)
    answers = [
        Answer(number, one.ids, one.text, one.stopped, row, reward)
        for number, one, (row, reward) in zip(numbers.tolist(), written, told, strict=True)
    ]
    shown = [
        {"prompt": asked_of(prompts[a.prompt]), "text": a.text, "stopped": a.stopped, "reward": a.reward}
        for a in answers
    ]
    names = settings.reinforce.reward
    kept = ("reward", "length", "stopped")
    figures = {
        key: v for key, v in figures_of(answers, names).items() if key in kept or key.startswith("reward/")
    }
    return Found(figures, shown)


def figures_of(answers: Sequence[Answer], names: Sequence[str]) -> dict[str, float]:
    """Means over answers: reward, its spread, tokens, the share that ended by itself, and that of prompts whose answers
    all earn the same, from which nothing is learnt; reward/NAME where there are several functions."""
    rewards = np.array([answer.reward for answer in answers])
    groups: dict[int, set[float]] = {}
    for answer in answers:
        groups.setdefault(answer.prompt, set()).add(answer.reward)
    figures = {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "no_spread": sum(len(group) == 1 for group in groups.values()) / len(groups),
        "length": float(np.mean([len(answer.ids) for answer in answers])),
        "stopped": float(np.mean([answer.stopped for answer in answers])),
    }
    for at, name in enumerate(names) if len(names) > 1 else ():
        values = [value for answer in answers if (value := answer.told[at]) is not None]
        if values:
            figures[f"reward/{name}"] = float(np.mean(values))
    return figures


def _told(tally: Tally, beta: float) -> dict[str, float]:
    """What the objective saw in a step."""
    tokens = max(1, tally.tokens)
    return {"clipped": tally.clipped / tokens, **({"kl": tally.kl / tokens} if beta else {})}


def _kept(path: Path, make: Callable[[], Found]) -> Found:
    """What `path` holds, or made and kept there."""
    if not path.is_file():
        write_json(path, dataclasses.asdict(make()), "answers", 1)
    saved = read_json(path, "answers", 1)
    return Found(saved["figures"], saved["answers"])
