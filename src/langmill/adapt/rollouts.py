"""Answers of the model that is being trained, written anew for each step, judged, and cut into batches for fit().

    prompts of the step → engine with the weights at hand → rewards → advantages → old and first log-probabilities

What a step writes follows from the weights, the seed and the number of the step, so that a resumed run writes the same.
B answers of a batch, T predictions in a row.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from langmill.adapt.reinforce import Tally, advantages
from langmill.common.errors import CheckpointError, TrainingError
from langmill.common.settings import ReinforceSettings
from langmill.data.batches import IGNORED, Ints, shuffled
from langmill.families.folder import Model
from langmill.infer.running import writer
from langmill.infer.sampling import Sampling
from langmill.text.tokenizer import Tokenizer

Floats = NDArray[np.float32]
SLOTS = 64  # answers that are written side by side


@dataclass(frozen=True)
class Prompt:
    """A row: where it stands, the prompt as it was given (text or messages) and as ids, and its further fields."""

    name: str
    given: str | list[dict[str, Any]]
    ids: list[int]
    fields: Mapping[str, Any]


class Written(NamedTuple):
    """An answer: its ids, with the one that stopped it, its text, and whether it ended by itself."""

    ids: list[int]
    text: str
    stopped: bool


@dataclass(frozen=True)
class Answer:
    """An answer to prompt number `prompt`, judged. told: what each reward function said; reward: their weighted sum.
    old, reference: log-probabilities of its tokens under the weights that wrote it and those that training began with,
    where they are needed."""

    prompt: int
    ids: list[int]
    text: str
    stopped: bool
    told: list[float | None]
    reward: float
    advantage: float = 0.0
    old: list[float] | None = None
    reference: list[float] | None = None


@dataclass(frozen=True, slots=True)
class AnswerBatch:
    """Rows of a prompt and its answer, padded on the right; targets are the answer's tokens, -100 elsewhere."""

    tokens_BT: Ints
    targets_BT: Ints
    advantages_B: Floats
    old_BT: Floats | None
    reference_BT: Floats | None
    sources: tuple[int, ...]


@torch.no_grad()
def write(
    model: Model,
    tokenizer: Tokenizer,
    asked: Sequence[list[int]],
    sampling: Sampling,
    each: Callable[[], None],
) -> list[Written]:
    """An answer to each of `asked`, those to equal prompts drawn apart; `each` is called as one is done.

    The engine reads the weights as they are now. On a CPU they are packed anew for native.cpp, which costs about ten
    of its passes, each of which takes half as long as one of torch. ModelError where the model's scores are no numbers.
    """
    training = model.training
    model.eval()
    room = max(map(len, asked)) + sampling.max_new_tokens
    found = [Written([], "", False) for _ in asked]
    for events in writer(model, tokenizer, min(SLOTS, len(asked)), room)(asked, sampling):
        for event in events:
            before = found[event.request]
            found[event.request] = Written(
                before.ids + event.ids, before.text + event.text, event.finish == "stop"
            )
            if event.finish:
                each()
    model.train(training)
    gc.collect()  # an engine and its scheduler know each other, and hold a copy of the weights
    return found


Write = Callable[[Sequence[list[int]], int], list[Written]]  # the answers to prompts, drawn by this number
Judge = Callable[
    [Sequence[Prompt], Sequence[Written]], list[tuple[list[float | None], float]]
]  # told, and the reward
LogProbs = Callable[[AnswerBatch], Floats]  # (B, T)


@dataclass(frozen=True)
class Parts:
    """What makes answers. old, reference: log-probabilities of a batch under the weights at hand and those that
    training began with, None where the loss needs none."""

    write: Write
    judge: Judge
    old: LogProbs | None = None
    reference: LogProbs | None = None


class Rollouts:
    """Endless batches of `rows` answers: a step's answers come in `passes` batches, `num_iterations` times over.

    prompts: all there are, of which `indices` are trained on. `tally` is cleared as a batch is handed out; `answers`
    are those of the step at hand. TrainingError where none of a step's answers may be learnt from.
    """

    def __init__(
        self, prompts: Sequence[Prompt], indices: Ints, settings: ReinforceSettings, rows: int, seed: int, pad_id: int,
        parts: Parts, tally: Tally,
    ) -> None:  # fmt: skip
        self._prompts, self._indices, self._settings = prompts, indices, settings
        self._rows, self._seed, self._pad_id, self._parts, self._tally = rows, seed, pad_id, parts, tally
        self.passes = -(-settings.prompts_per_step * settings.num_generations // rows)
        self.answers: list[Answer] = []
        self._made = -1  # the number of the answers at hand
        self._at = 0  # batches handed out

    def __next__(self) -> AnswerBatch:
        number, inside = divmod(self._at, self.passes * self._settings.num_iterations)
        if number != self._made:
            self.answers, self._made = self._make(number), number
        self._tally.clear()
        self._at += 1
        return self._batches(self.answers)[inside % self.passes]

    def state(self) -> dict[str, Any]:
        """The place, as JSON; where it lies between two steps on the same answers, these too: the weights that wrote
        them are gone."""
        inside = self._at % (self.passes * self._settings.num_iterations)
        answers = [asdict(answer) for answer in self.answers] if inside else None
        return {"batches": self._at, "answers": answers, "of": self._identity()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to a place that `state` gave. CheckpointError where it came from other prompts or settings."""
        mine = self._identity()
        for name, value in state["of"].items():
            if mine.get(name) != value:
                raise CheckpointError(
                    f"the checkpoint's prompts had {name} {value} and this run has {mine.get(name)}: resume with the "
                    "same data and settings, or start anew"
                )
        self._at = state["batches"]
        if state["answers"]:
            self.answers = [Answer(**answer) for answer in state["answers"]]
            self._made = self._at // (self.passes * self._settings.num_iterations)
        elif self._at:  # at 0 those at hand are still of the weights that training begins with
            self.answers, self._made = [], -1

    def _identity(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for number in self._indices.tolist():
            prompt = self._prompts[number]
            known = [prompt.ids, prompt.given, dict(prompt.fields)]
            digest.update(json.dumps(known, sort_keys=True, default=str).encode("utf-8"))
        return {"content": digest.hexdigest(), "number": len(self._indices), "seed": self._seed}

    def _make(self, number: int) -> list[Answer]:
        """The answers of a step, judged, the longest rows first, so that a batch holds little padding."""
        settings, size = self._settings, len(self._indices)
        count, group = settings.prompts_per_step, settings.num_generations
        wanted = np.arange(number * count, (number + 1) * count)
        places = [
            int(shuffled(np.array([at % size]), size, self._seed << 40 ^ at // size)[0])
            for at in wanted.tolist()
        ]
        chosen = [int(self._indices[place]) for place in places for _ in range(group)]
        prompts = [self._prompts[number] for number in chosen]
        written = self._parts.write([prompt.ids for prompt in prompts], number)
        if settings.mask_truncated_completions and not any(one.stopped for one in written):
            raise TrainingError(
                f"none of a step's {len(written)} answers ended within reinforce.max_completion_length="
                f"{settings.max_completion_length} tokens, so there is nothing to learn from: allow more tokens, or "
                "leave mask_truncated_completions out"
            )
        judged = self._parts.judge(prompts, written)
        rewards_PG = torch.tensor([reward for _, reward in judged], dtype=torch.float64).view(count, group)
        gains = advantages(rewards_PG, settings.scale_rewards).flatten().tolist()
        answers = [
            Answer(prompt, one.ids, one.text, one.stopped, told, reward, gain)
            for prompt, one, (told, reward), gain in zip(chosen, written, judged, gains, strict=True)
        ]
        answers.sort(key=lambda a: len(self._prompts[a.prompt].ids) + len(a.ids), reverse=True)
        old, reference = (self._rows_of(answers, each) for each in (self._parts.old, self._parts.reference))
        return [replace(a, old=o, reference=r) for a, o, r in zip(answers, old, reference, strict=True)]

    def _rows_of(self, answers: Sequence[Answer], scored: LogProbs | None) -> Sequence[list[float] | None]:
        """The log-probabilities of each answer's tokens; None where they are not needed."""
        if scored is None:
            return [None] * len(answers)
        found: list[list[float]] = []
        for batch in self._batches(answers):
            for row, source in zip(scored(batch), batch.sources, strict=True):
                first, size = len(self._prompts[source].ids) - 1, len(answers[len(found)].ids)
                found.append(row[first : first + size].tolist())
        return found

    def _batches(self, answers: Sequence[Answer]) -> list[AnswerBatch]:
        return [self._batch(answers[at : at + self._rows]) for at in range(0, len(answers), self._rows)]

    def _batch(self, answers: Sequence[Answer]) -> AnswerBatch:
        prompts = [self._prompts[answer.prompt].ids for answer in answers]
        length = max(len(p) + len(a.ids) for p, a in zip(prompts, answers, strict=True)) - 1
        tokens_BT = np.full((len(answers), length), self._pad_id, np.int64)
        targets_BT = np.full(tokens_BT.shape, IGNORED, np.int64)
        # an answer's log-probabilities are 0 where it has none, as `reinforce.logps` gives them
        old_BT, reference_BT = np.zeros(tokens_BT.shape, np.float32), np.zeros(tokens_BT.shape, np.float32)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            ids = prompt + answer.ids
            cells = slice(len(prompt) - 1, len(ids) - 1)
            tokens_BT[row, : len(ids) - 1] = ids[:-1]
            if answer.stopped or not self._settings.mask_truncated_completions:
                targets_BT[row, cells] = answer.ids
            old_BT[row, cells] = 0 if answer.old is None else answer.old
            reference_BT[row, cells] = 0 if answer.reference is None else answer.reference
        gains_B = np.array([answer.advantage for answer in answers], np.float32)
        first = answers[0]
        return AnswerBatch(
            tokens_BT, targets_BT, gains_B, None if first.old is None else old_BT,
            None if first.reference is None else reference_BT, tuple(answer.prompt for answer in answers),
        )  # fmt: skip
