"""fit(): the only training loop.

    take micro-batches → train_step → validate → log → hooks → save        until the steps are done

A killed run goes on from its last checkpoint and ends with the same bytes as one that was never killed
(same machine, threads and versions): whatever decides them is in the checkpoint or compared with it.
"""

from __future__ import annotations

import contextlib
import math
import random
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from langmill.common.errors import SettingsError, TrainingError, UsageError
from langmill.common.files import REPLACED, read_json, write_json
from langmill.common.metrics import Metrics
from langmill.common.progress import track
from langmill.common.settings import LoopSettings
from langmill.train import checkpoint
from langmill.train.guard import Signals, explained, reproducible
from langmill.train.measure import Choices, choose_and_prepare, peak_bytes, prepare, utilisation
from langmill.train.objectives import Objective
from langmill.train.optim import Optimizer
from langmill.train.schedule import learning_rate
from langmill.train.step import Gradients, Step, backward, tensors, train_step

SAVE_SECONDS = 120.0  # between checkpoints where train.save_every is not set
EVALUATIONS = 10  # in a run where train.eval_every is not set
SKIPS = 10  # steps in a row that are not finite, after which even the policy "skip" gives up


class Batches(Protocol):
    """Where micro-batches come from: Packed, or anything that knows its place and can go back to it."""

    def __next__(self) -> Any: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: Mapping[str, Any], /) -> None: ...


@dataclass
class State:
    """Where a run stands. Hooks may read it; every checkpoint carries it."""

    step: int = 0  # optimizer steps done, those skipped included
    micro_batches: int = 0
    tokens: int = 0  # scored ones
    seconds: float = 0.0  # in steps alone: no validation, no saving
    loss: float | None = None  # of the last step, nats a token; None where it was not finite
    grad_norm: float | None = None
    learning_rate: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    best: float | None = None  # the lowest validation figure, and where it was
    best_step: int | None = None
    evaluations_since_best: int = 0
    mean_loss: float | None = None  # over the steps of the last logged line
    recent_loss: float = 0.0  # since that line: sum over what is scored, its number, tokens, seconds
    recent_scored: int = 0
    recent_tokens: int = 0
    recent_seconds: float = 0.0


Hook = Callable[[int, State], bool | None]
Validate = Callable[[nn.Module], dict[str, float]]


@dataclass(frozen=True)
class Outcome:
    """What came of a run: figures over its whole life, interruptions left out."""

    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    loss: float | None  # mean over the last logged steps, nats a token
    best: float | None  # best validation figure: its criterion, bits per byte or loss
    best_step: int | None
    peak_bytes: int
    choices: Choices
    skipped: int
    stopped: bool  # a hook ended the run early


def fit(
    model: nn.Module,
    batches: Batches,
    objective: Objective,
    settings: LoopSettings,
    folder: Path,
    *,
    seed: int,
    resume: bool = False,
    validate: Validate | None = None,
    name_of: Callable[[int], str] | None = None,
    tokens_of: Callable[[Any], int] | None = None,
    hooks: Sequence[Hook] = (),
    gradients: Gradients = backward,
    tensorboard: bool = False,
    quiet: bool = False,
) -> Outcome:
    """Train `model` in place until max_steps or num_train_epochs; it ends with the last weights.

    folder: the run's own, private folder: checkpoints/, metrics.jsonl, choices.json.
    validate: figures of the model on held-out text, in the run's number type; the checkpoint with the lowest
    "criterion" (or else "bits_per_byte" or "loss") is kept. name_of: the name of a document by its number, for errors.
    tokens_of: the scored tokens of a batch, where the objective counts something else (pairs).
    hooks: called after every step as hook(step, state); one that returns True ends the run.
    gradients: replaces the plain backward pass.

    Raises SettingsError where a resumed run's settings differ from the saved ones, CheckpointError where
    checkpoints are damaged, TrainingError where the loss is not finite or memory or disk run out, and
    Interrupted after Ctrl-C or SIGTERM, once the step at hand is done and saved.
    """
    run = _Run(
        model, batches, objective, settings, folder, seed, validate, name_of, tokens_of, gradients, quiet
    )
    run.metrics = Metrics(folder, tensorboard)
    with reproducible(run.device), contextlib.closing(run.metrics):
        run.begin(resume)  # before it a signal ends the program at once: there is nothing new to save
        state, stopped = run.state, False
        with Signals(quiet) as signals, track("training", run.steps - state.step, "steps", quiet) as bar:
            while state.step < run.steps and not stopped and not signals.caught and run.step():
                run.evaluate()
                run.log()
                answers = [hook(state.step, state) for hook in hooks]
                stopped = any(answers)
                run.save()
                bar.advance(1, loss=run.recent_loss(), tokens_per_second=state.tokens / state.seconds)
            run.save(now=True)
    if signals.caught:
        raise signals.interrupted(state.step, run.steps)
    return run.outcome(stopped)


@dataclass
class _Run:
    """One call of fit: its parts, and what happens to them at each step."""

    model: nn.Module
    batches: Batches
    objective: Objective
    settings: LoopSettings
    folder: Path
    seed: int
    validate: Validate | None
    name_of: Callable[[int], str] | None
    tokens_of: Callable[[Any], int] | None
    gradients: Gradients
    quiet: bool
    state: State = field(default_factory=State)
    saved_step: int = 0
    saved_at: float = field(default_factory=time.monotonic)
    improved: bool = False
    metrics: Metrics = field(init=False)
    choices: Choices = field(init=False)
    prepared: Objective = field(init=False)  # the objective in the chosen number type, compiled or not

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device
        self.checkpoints = self.folder / "checkpoints"
        self.optimizer = Optimizer(self.model, self.settings)
        place = self.batches.state()
        self.sample = next(self.batches)
        self.batches.restore(place)
        self.steps, self.micro_batches = self._length()
        self.eval_every = self.settings.eval_every or math.ceil(self.steps / EVALUATIONS)

    def _length(self) -> tuple[int, int]:
        """Optimizer steps of the whole run, and its micro-batches: the last step may have fewer."""
        together = self.settings.gradient_accumulation_steps
        if self.settings.max_steps is not None:
            return self.settings.max_steps, self.settings.max_steps * together
        rows = getattr(self.batches, "rows_per_epoch", None)
        if rows is None:
            raise SettingsError("train.max_steps must be given: this data does not tell how long an epoch is")
        epochs = 1.0 if self.settings.num_train_epochs is None else self.settings.num_train_epochs
        micro_batches = max(1, math.ceil(epochs * rows / len(self.sample.tokens_BT)))
        return math.ceil(micro_batches / together), micro_batches

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def begin(self, resume: bool) -> None:
        """Start anew, or put everything where the last checkpoint left it."""
        network: Any = self.model.train()
        if hasattr(network, "checkpointing"):
            network.checkpointing = self.settings.gradient_checkpointing
        if hasattr(network, "dropout"):
            network.dropout = self.settings.dropout
        elif self.settings.dropout:
            raise SettingsError("train.dropout is for Transformers: leave it out for an LSTM")
        found = checkpoint.newest(self.checkpoints, self.say)
        if found and not resume:
            raise UsageError(f"{self.folder} holds an earlier run: go on with --resume, or remove it")
        if found:
            self._go_on(found)
        else:
            self._start(resume)

    def _start(self, resume: bool) -> None:
        """Choose by measurement, or as the run did that was killed before its first checkpoint."""
        path = self.folder / "choices.json"
        identity = checkpoint.identity(self.settings, self.model, self.seed)
        saved = read_json(path, "choices", 1) if resume and path.exists() else {}
        if resume:
            self.say("there is no checkpoint yet: the run starts over")
        self.metrics.truncate(0)
        if saved.get("identity") == identity:
            self._take(Choices.restore(saved["choices"]))
        else:
            if self.settings.dtype == "auto" or self.settings.compile == "auto":
                self.say("measuring which number type and compilation are fastest here")
            with explained(1):
                sample = tensors(self.sample, self.device)
                self.choices, self.prepared = choose_and_prepare(
                    self.model, self.objective, sample, self.settings, self.micro_batches
                )
            write_json(path, {"identity": identity, "choices": asdict(self.choices)}, "choices", 1)
        shutil.rmtree(self.folder / REPLACED, ignore_errors=True)  # from here on this run stands in its place
        for reason in self.choices.why:
            self.say(f"chosen: {reason}")
        random.seed(self.seed)
        np.random.seed(self.seed % 2**32)
        torch.manual_seed(self.seed)

    def _take(self, choices: Choices) -> None:
        """Put to work what was measured before."""
        self.choices = choices
        torch.set_num_threads(choices.threads)
        self.prepared = prepare(self.objective, choices.dtype, choices.compile, self.device)

    def _go_on(self, found: checkpoint.Checkpoint) -> None:
        saved = found.state
        checkpoint.check_identity(found, checkpoint.identity(self.settings, self.model, self.seed))
        if saved["versions"] != checkpoint.versions():
            self.say(f"the checkpoint comes from {saved['versions']}: the last bits may differ")
        checkpoint.load(found, self.model, self.optimizer)
        self.batches.restore(saved["data"])
        checkpoint.restore_random(saved["random"])
        self.state = State(**saved["progress"])
        self._take(Choices.restore(saved["choices"]))
        self.saved_step = self.state.step
        self.metrics.truncate(self.state.step)
        self.say(f"going on after step {self.state.step} of {self.steps}")

    def step(self) -> bool:
        """Train on the next micro-batches; False where there are none left."""
        state, settings, started = self.state, self.settings, time.perf_counter()
        wanted = min(settings.gradient_accumulation_steps, self.micro_batches - state.micro_batches)
        taken = [batch for batch in (next(self.batches, None) for _ in range(wanted)) if batch is not None]
        if not taken:
            return False
        state.learning_rate = learning_rate(state.step, self.steps, settings)
        with explained(state.step + 1):
            done = train_step(
                self.model,
                self.optimizer,
                self.prepared,
                [tensors(batch, self.device) for batch in taken],
                learning_rate=state.learning_rate,
                max_grad_norm=settings.max_grad_norm,
                gradients=self.gradients,
            )
        seconds = time.perf_counter() - started
        state.step += 1
        state.micro_batches += len(taken)
        state.seconds += seconds
        state.recent_seconds += seconds
        if not done.applied:
            self._not_finite(done, taken)
            return True
        state.skipped_in_a_row = 0
        state.loss, state.grad_norm = done.loss, done.grad_norm
        tokens = done.tokens if self.tokens_of is None else sum(map(self.tokens_of, taken))
        state.tokens += tokens
        state.recent_loss += done.loss * done.tokens
        state.recent_scored += done.tokens
        state.recent_tokens += tokens
        return True

    def _not_finite(self, done: Step, taken: Sequence[Any]) -> None:
        """Stop, or count and go on: no weight was changed."""
        state = self.state
        state.loss = state.grad_norm = None
        state.skipped += 1
        state.skipped_in_a_row += 1
        what = f"at step {state.step} the loss is {done.loss} and the gradient's norm {done.grad_norm}"
        if self.settings.non_finite == "skip" and state.skipped_in_a_row < SKIPS:
            return self.say(f"skipped: {what}")
        sources = list(dict.fromkeys(source for batch in taken for source in batch.sources))
        names = [self.name_of(source) if self.name_of else f"document {source}" for source in sources[:10]]
        more = f" and {len(sources) - 10} more" if len(sources) > 10 else ""
        often = f" ({state.skipped_in_a_row} steps in a row)" if state.skipped_in_a_row > 1 else ""
        raise TrainingError(
            f"{what}{often}; no weight was changed by it. The step's documents: {', '.join(names)}{more}. Look at "
            "them, or start again with a lower train.learning_rate; --resume with train.non_finite=skip leaves "
            "such steps out and counts them"
        )

    def _due(self, every: int) -> bool:
        return self.state.step % every == 0 or self.state.step == self.steps

    def evaluate(self) -> None:
        """Validate where it is due, and note whether this is the best model so far."""
        if self.validate is None or not self._due(self.eval_every):
            return
        self.model.eval()
        narrow = self.choices.dtype == "bfloat16"
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=narrow):
            figures = self.validate(self.model)
        self.model.train()
        self.metrics.log(self.state.step, **{f"eval_{name}": value for name, value in figures.items()})
        names = ("criterion", "bits_per_byte", "loss")
        figure = next((figures[name] for name in names if name in figures), math.inf)
        if math.isfinite(figure) and (self.state.best is None or figure < self.state.best):
            self.state.best, self.state.best_step, self.improved = figure, self.state.step, True
            self.state.evaluations_since_best = 0
        else:
            self.state.evaluations_since_best += 1

    def recent_loss(self) -> float:
        """Mean loss since the last logged line, or of that line where nothing came after it."""
        state = self.state
        if state.recent_scored:
            return state.recent_loss / state.recent_scored
        return math.nan if state.mean_loss is None else state.mean_loss

    def log(self) -> None:
        """One line of metrics.jsonl where it is due."""
        state = self.state
        if not self._due(self.settings.log_every) or not state.recent_tokens:
            return
        state.mean_loss = self.recent_loss()
        speed = state.recent_tokens / state.recent_seconds
        self.metrics.log(
            state.step,
            loss=state.mean_loss,
            grad_norm=state.grad_norm,
            learning_rate=state.learning_rate,
            tokens=state.tokens,
            tokens_per_second=speed,
            mfu=utilisation(self.model, self.sample.tokens_BT.shape[1], speed, self.choices),
            memory=peak_bytes(self.device),
            skipped=state.skipped,
        )
        state.recent_loss, state.recent_seconds = 0.0, 0.0
        state.recent_scored = state.recent_tokens = 0

    def save(self, now: bool = False) -> None:
        """Write a checkpoint where it is due, or `now` where this step has none yet."""
        step, every = self.state.step, self.settings.save_every
        due = self._due(every) if every else time.monotonic() - self.saved_at >= SAVE_SECONDS
        if step == self.saved_step or not (now or due or self.improved):
            return
        everything = {
            "identity": checkpoint.identity(self.settings, self.model, self.seed),
            "progress": asdict(self.state),
            "choices": asdict(self.choices),
            "data": self.batches.state(),
            "random": checkpoint.random_state(),
            "versions": checkpoint.versions(),
        }
        checkpoint.save(self.checkpoints, step, self.model, self.optimizer, everything)
        checkpoint.prune(self.checkpoints, self.settings.keep_last, self.state.best_step)
        self.saved_step, self.saved_at, self.improved = step, time.monotonic(), False

    def outcome(self, stopped: bool) -> Outcome:
        state = self.state
        return Outcome(
            steps=state.step,
            tokens=state.tokens,
            seconds=state.seconds,
            tokens_per_second=state.tokens / state.seconds if state.seconds else 0.0,
            loss=state.mean_loss,
            best=state.best,
            best_step=state.best_step,
            peak_bytes=peak_bytes(self.device),
            choices=self.choices,
            skipped=state.skipped,
            stopped=stopped,
        )
