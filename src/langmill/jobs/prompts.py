"""Prompts to be answered and judged, from files.

    {"prompt": text or messages, "tools", and what the reward function asks for: "answer", "keys", …}

A row that is none of these is set aside with its reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from langmill.adapt.rewards import GIVEN, check_fields, find
from langmill.adapt.rollouts import Prompt
from langmill.common.errors import DataError, SettingsError
from langmill.common.metrics import Report
from langmill.common.progress import track
from langmill.common.settings import FinetuneSettings
from langmill.data.batches import Ints
from langmill.data.chats import Unusable, parse, read_rows
from langmill.data.examples import Examples
from langmill.data.pipeline import Ledger
from langmill.families.folder import Model
from langmill.jobs import finetune
from langmill.text.chat import chat_ids
from langmill.text.tokenizer import Tokenizer
from langmill.text.turns import Example


@dataclass(frozen=True)
class Prepared:
    """What a run learns from. `examples` are the prompts' ids, none of them trained."""

    prompts: list[Prompt]
    examples: Examples
    fields: list[str]
    train: Ints
    held: Ints
    ledger: Ledger

    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(prompt.ids) for prompt in self.prompts)


def prepare(
    settings: FinetuneSettings, tokenizer: Tokenizer, most: int, errors: Path | None, quiet: bool
) -> Prepared:
    """Read the prompts and hold some out. `most`: tokens that the model can see, the answer's included."""
    ledger, answer = Ledger(errors), settings.reinforce.max_completion_length
    room = min(settings.train.max_length or most, most) - answer
    if room < 1:
        raise SettingsError(
            f"reinforce.max_completion_length is {answer}, and there is room for {room + answer} tokens, the prompt "
            "included: give it a smaller one, such as 32"
        )
    with track("rendering", unit="prompts", quiet=quiet) as progress:

        def make(where: str, value: Any) -> Prompt:
            progress.advance(1)
            found = parse_prompt(where, value, tokenizer)
            if len(found.ids) > room:
                raise Unusable(
                    "prompt too long",
                    f"{len(found.ids)} tokens, and beside an answer of up to {answer} there is room for {room}",
                )
            return found

        prompts = list(read_rows(settings.data, ledger, make, "not a usable prompt"))
    if not prompts:
        raise DataError(finetune.nothing_left(settings, ledger, "prompt"))
    examples = Examples.of(
        ((p.name, Example(p.ids, [False] * len(p.ids))) for p in prompts), tokenizer.fill_id
    )
    training, held = examples.split(settings.holdout)
    fields = sorted({field for prompt in prompts for field in prompt.fields})
    return Prepared(prompts, examples, fields, training, held, ledger)


def parse_prompt(where: str, row: Any, tokenizer: Tokenizer) -> Prompt:
    """One row; DataError says what is wrong with it. Messages may end with the start of an answer only as a user's
    turn does: what the model writes is a turn of its own."""
    if not isinstance(row, Mapping) or "prompt" not in row:
        there = (
            f"this one has {', '.join(map(str, list(row)[:20]))}"
            if isinstance(row, Mapping)
            else "this is none"
        )
        raise DataError(f"a row is a JSON object with prompt, and what the reward function asks for; {there}")
    given = row["prompt"]
    fields = {str(key): value for key, value in row.items() if key not in ("prompt", "tools")}
    if taken := sorted(set(fields) & set(GIVEN)):
        raise DataError(
            f"{taken[0]} is what a reward function is given by this name: call the field otherwise"
        )
    if isinstance(given, str) and given:
        return Prompt(where, given, tokenizer.prompt_ids(given), fields)
    if not isinstance(given, list) or not given:
        raise DataError("prompt is neither text nor a list of messages")
    stand_in = {"role": "assistant", "content": "…"}
    chat: Any = parse(where, {"prompt": given, "completion": [stand_in], "tools": row.get("tools")})
    messages = chat.messages[:-1]
    return Prompt(where, messages, chat_ids(tokenizer, messages, True, chat.tools), fields)


def asked_of(prompt: Prompt) -> str:
    """The prompt, or its last turn, for people to read."""
    return prompt.given if isinstance(prompt.given, str) else str(prompt.given[-1].get("content", ""))


def preview(settings: FinetuneSettings, model: Model, tokenizer: Tokenizer, quiet: bool) -> Report:
    """The first prompts as the model will see them, with what the reward functions get beside."""
    check_of = find(settings.reinforce.reward, settings.reinforce.reward_weights)
    ready = prepare(settings, tokenizer, model.config.length, None, quiet)
    check_fields(check_of, ready.fields)
    found = [
        f"{p.name}: {len(p.ids)} tokens\n{tokenizer.decode(p.ids, skip_specials=False)}"
        + "".join(f"\n{key}: {value!r}" for key, value in p.fields.items())
        for p in ready.prompts[: settings.preview]
    ]
    text = "\n\n".join(found)
    text += f"\n\nleft out: {aside}" if (aside := finetune.left_out(ready.ledger)) else ""
    counts = {"prompts": len(ready.train), "held_out_prompts": len(ready.held)}
    return Report(counts=counts, text=text, extra={"ledger": ready.ledger.as_dict()})
