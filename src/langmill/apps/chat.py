"""`langmill chat`: a conversation with a model, in the terminal or from a pipe.

At a terminal, Ctrl-C stops an answer and ctrl-D leaves. From a pipe every line is a turn: answers go to standard
output, everything else to standard error, and Ctrl-C ends the program. After an error the next line is read; the exit
code is 1 then.
"""

from __future__ import annotations

import bisect
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from langmill.apps.commands import Chat, Message, obey
from langmill.apps.console import Console, open_console, read_message
from langmill.apps.generate import check_alone, propose_of, sampling_of
from langmill.common.errors import DataError, LangmillError, ModelError
from langmill.common.metrics import Report
from langmill.common.settings import ChatSettings
from langmill.families.folder import Model
from langmill.infer.engine import Engine
from langmill.infer.ready import ready
from langmill.infer.running import engine_for, places, written
from langmill.model.config import ModelConfig
from langmill.text.chat import chat_ids
from langmill.text.tokenizer import Tokenizer

HINT = "(ctrl-D or /exit leaves)"
LEAST = 16  # tokens of room without which there is no point in answering


@dataclass(frozen=True)
class Speaker:
    """What answers: an engine of one slot, which remembers what it has read, and what is done where a chat outgrows
    its window: so many tokens, None: no limit."""

    engine: Engine
    tokenizer: Tokenizer
    overflow: Literal["oldest", "stop"]
    window: int | None

    def check(self, messages: Sequence[Message]) -> list[int]:
        """The ids of messages; raises where the template refuses them."""
        return chat_ids(self.tokenizer, messages, add_generation_prompt=True)


def run(settings: ChatSettings, *, quiet: bool = False) -> Report:
    """Talk until the input ends or /exit; `quiet` leaves prompts and the greeting out, not errors and notes.

    The report holds the conversation as `messages`, a system message included.
    """
    check_alone(settings)
    sampling = sampling_of(settings)
    speaker = speaker_of(settings)
    chat = Chat((), sampling)
    if settings.system is not None:
        chat = obey(f"/system {settings.system}", chat, speaker.check).chat
    console = open_console(quiet)
    if not quiet:
        window = "" if speaker.window is None else f", {speaker.window} tokens of context"
        console.note(f"{Path(settings.model).name}{window}. /help lists the commands, ctrl-D leaves.")
    chat, counts, seconds = talk(speaker, chat, console)
    figures = {
        "seconds_generating": seconds,
        "tokens_per_second": counts["tokens"] / seconds if seconds else 0.0,
    }
    names = ("turns", "prompt_tokens", "reused_tokens", "tokens", "stopped", "left_out", "errors")
    return Report(
        counts={name: counts[name] for name in names},
        figures=figures,
        extra={"messages": list(chat.messages)},
        ok=console.stoppable or not counts["errors"],
    )


def speaker_of(settings: ChatSettings) -> Speaker:
    """The model of the settings, ready to answer; ModelError where it was not made for chats."""
    model, tokenizer = ready(
        settings.model, settings.dtype, settings.device, settings.threads, settings.adapter
    )
    if tokenizer.chat_template is None:
        raise ModelError(
            f"{settings.model} has no chat template, so it was not made for chats: use `langmill generate` to go on "
            "from a text, or take a model that was tuned on chats"
        )
    length = places(model, settings.context, kv_bits=settings.kv_bits)
    propose = propose_of(settings, model, tokenizer, 1, length)
    engine = engine_for(
        model, tokenizer, slots=1, length=length, propose=propose, kv_bits=settings.kv_bits, release=True,
        queue_tokens=length,
    )  # fmt: skip
    return Speaker(engine, tokenizer, settings.overflow, _window(model, length))


def _window(model: Model, length: int) -> int | None:
    return length if isinstance(model.config, ModelConfig) else None


def talk(speaker: Speaker, chat: Chat, console: Console) -> tuple[Chat, Counter[str], float]:
    """Read, obey and answer until the end of the input; the chat, what was counted, and seconds spent on answers.

    An error is noted and leaves the chat as it was before the line.
    """
    counts: Counter[str] = Counter()
    seconds = 0.0
    while True:
        try:
            text, is_command = read_message(console)
            if is_command:
                after, said, then = obey(text, chat, speaker.check)
                if said:
                    console.note(said)
            else:
                after, then = chat.asked(text), "answer"
            if then == "leave":
                return chat, counts, seconds
            if then == "read":
                chat = after
                continue
            began = time.perf_counter()
            try:
                chat = answer(speaker, after, console, counts) or chat
            finally:
                seconds += time.perf_counter() - began
        except EOFError:
            return chat, counts, seconds
        except KeyboardInterrupt:
            if not console.stoppable:
                raise
            console.note(f"\n{HINT}")
        except LangmillError as error:
            counts["errors"] += 1
            console.note(f"error: {error}")
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            counts["errors"] += 1
            console.note(
                "error: not enough memory for this turn: /clear the conversation, or shorten the message"
            )


def answer(speaker: Speaker, chat: Chat, console: Console, counts: Counter[str]) -> Chat | None:
    """Show the answer to a chat that ends with the user's turn; the chat with it, None where nothing was written.

    What was written before Ctrl-C is kept. Raises as `fit`, and ModelError for a broken model.
    """
    ids, left_out = fit(speaker, chat.messages, chat.sampling.max_new_tokens)
    if left_out:
        console.note(
            f"(left out here: the oldest {left_out} of {len(chat.turns) // 2 + 1} turns, which do not all fit in the "
            f"{speaker.window} tokens of this model)"
        )
    sampling = replace(chat.sampling, seed=chat.sampling.seed + chat.retries)
    said: list[str] = []
    tokens, reused, ended = 0, 0, "stopped"
    try:
        try:
            with closing(written(speaker.engine, [ids], sampling)) as steps:
                for event in (event for events in steps for event in events):
                    tokens, reused = tokens + len(event.ids), event.cached
                    said.append(event.text)
                    console.show(event.text)
                    ended = event.finish or ended
        except KeyboardInterrupt:
            if not console.stoppable:
                raise
    finally:
        console.show("\n")
    text = "".join(said)
    counts.update(
        turns=int(bool(text)), prompt_tokens=len(ids), reused_tokens=reused, tokens=tokens,
        stopped=int(ended == "stopped"), left_out=left_out,
    )  # fmt: skip
    if ended == "stopped":
        console.note("(stopped: what is written so far stays)" if text else "(stopped before the first word)")
    elif ended == "length":
        console.note(f"(cut off after {tokens} tokens)")
    if not text:
        console.note("(there is no answer: the conversation is as it was before)")
        return None
    return chat.answered(text)


def fit(speaker: Speaker, messages: Sequence[Message], wanted: int) -> tuple[list[int], int]:
    """The ids that the model is to read, and how many of the oldest turns they leave out.

    Room for an answer is kept: `wanted` tokens, at most half the window; a last message that no other leaves room
    for may take all but LEAST. DataError with the tokens needed and there where it does not fit, or the policy is to
    stop.
    """
    ids, window = speaker.check(messages), speaker.window
    room = min(wanted, (window or 0) // 2)
    if window is None or len(ids) + room <= window:
        return ids, 0
    starts = [index for index, message in enumerate(messages) if message["role"] == "user"]
    if speaker.overflow == "stop":
        raise DataError(
            f"this turn needs {len(ids) + room} tokens ({len(ids)} to read, {room} to answer) and the model has "
            f"{window}: /undo or /clear makes room, --overflow oldest leaves old turns out"
        )

    def without(count: int) -> list[int]:
        return speaker.check((*messages[: starts[0]], *messages[starts[count] :]))

    last = len(starts) - 1
    count = (
        bisect.bisect_left(range(last), True, lo=1, key=lambda n: len(without(n)) + room <= window)
        if last
        else 0
    )
    ids = without(count)
    if len(ids) + min(room, LEAST) > window:
        raise DataError(
            f"this message needs {len(ids) + min(room, LEAST)} tokens, the room for an answer included, and the model "
            f"has {window}: shorten it"
        )
    return ids, count


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
