"""Conversations to learn from: the ids of a chat and which of them are trained, by the renderer that serves chats too.

Trained is what the model shall write: the inside of every assistant turn, and the token that ends it. Where a template
marks this with {% generation %}, its marks are followed; elsewhere a turn begins where the template's own generation
prompt ends, and goes on to the next token that stops generation.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from langmill.common.errors import DataError, ModelError
from langmill.text.chat import Messages, Rendering, Span, any_of, rendered
from langmill.text.tokenizer import Tokenizer

_UNCLEAR = (
    "the chat template writes what comes before message {} differently once the chat goes on, so its turns cannot be "
    "told apart: mark them with {{% generation %}} … {{% endgeneration %}}"
)
_NO_TOOLS = "give --template one that writes tools"
ASSISTANT = frozenset({"assistant", "model"})
_RESULTS = frozenset({"tool", "function", "ipython"})


@dataclass(frozen=True)
class Example:
    """A sequence to learn from: `trained[i]` says whether the loss counts the prediction of `ids[i]`."""

    ids: list[int]
    trained: list[bool]

    @property
    def share(self) -> float:
        """The part of the ids that is trained."""
        return sum(self.trained) / max(1, len(self.ids))


def chat_example(
    tokenizer: Tokenizer,
    messages: Messages,
    tools: Sequence[Mapping[str, Any]] | None = None,
    first: int = 0,
    **variables: Any,
) -> Example:
    """The ids of a chat, as `chat_ids` gives them, and the mask of its assistant turns from message `first` on.

    Raises as `chat_ids`; DataError where nothing would be trained; ModelError where the template hides its turns.
    """
    chat = rendered(tokenizer, messages, False, tools, variables)
    _check_shown(chat, messages, tools)
    turns = [number for number, message in enumerate(messages) if message["role"] in ASSISTANT]
    begin = _Beginnings(tokenizer, chat, messages, tools, variables)
    if wanted := list(_marked(chat)):
        if first and any(turn < first for turn in turns):
            after = begin.of(next((turn for turn in turns if turn >= first), len(messages)))
            wanted = [span for span in wanted if span[0] >= after]
    else:
        spans = zip(turns, _between(tokenizer, chat, begin, turns), strict=True)
        wanted = [span for turn, span in spans if turn >= first]
    ids, places, edges = chat.encode(tokenizer, [edge for span in wanted for edge in span])
    trained = _inside(places, edges)
    if not any(trained):
        raise DataError(
            "no assistant turn of this chat shows in what the template makes of it: nothing to train"
        )
    if all(trained):
        raise DataError(
            "everything in this chat would be trained, its prompt too: the template marks no turns"
        )
    return Example(ids, trained)


def completion_example(tokenizer: Tokenizer, prompt: str, completion: str) -> Example:
    """Plain text to go on from and its completion, which is trained with the token that ends a document.

    Both are encoded as one text, as use will see it; a token across the border belongs to the prompt.
    """
    bos = [tokenizer.bos_id] if tokenizer.specials.add_bos and tokenizer.bos_id is not None else []
    ids, offsets = tokenizer.encode_with_offsets(prompt + completion)
    trained = [start >= len(prompt) for start, _ in offsets]
    end = tokenizer.eos_id if tokenizer.eos_id is not None else tokenizer.boundary_id
    return Example([*bos, *ids, end], [*(False for _ in bos), *trained, True])


def _marked(chat: Rendering) -> Iterator[Span]:
    """The stretches between the marks of {% generation %}, the marks left out."""
    for found in re.finditer(f"{chat.starts}(.*?){chat.ends}", chat.text, re.DOTALL):
        yield found.start(1), found.end(1)


def _check_shown(chat: Rendering, messages: Messages, tools: Sequence[Mapping[str, Any]] | None) -> None:
    """Raise where the template leaves out what was said: one that wants lists of parts drops plain text in silence, one
    that knows no tools drops the calls, and the model would learn to answer nothing."""
    text = chat.plain(chat.text)
    said = messages[-1].get("content")
    if isinstance(said, str) and said.strip() and said.strip().splitlines()[-1] not in text:
        raise DataError(
            "the chat template leaves out what the last message says: does it want content as a list of parts?"
        )
    for number, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, list | tuple) and str(list(content)) in text:
            raise DataError(
                f"the chat template writes the list of parts of message {number} as Python code: give it as one text"
            )
        if message["role"] in _RESULTS and not _count(text, _telling(content)):
            raise DataError(
                f"the chat template leaves out the tool's result in message {number}: {_NO_TOOLS}"
            )
    named = Counter(chain(_names(tools), *(_names(message.get("tool_calls")) for message in messages)))
    if missing := [name for name, times in named.items() if _count(text, name) < times]:
        raise DataError(f"the chat template leaves out tools or calls of them ({missing[0]}): {_NO_TOOLS}")


def _names(calls: Any) -> list[str]:
    """What functions calls or tools name, in the form {"function": {"name"}} or {"name"}."""
    inside = [call.get("function", call) for call in calls or [] if isinstance(call, Mapping)]
    found = [function.get("name") for function in inside if isinstance(function, Mapping)]
    return [name for name in found if isinstance(name, str)]


def _telling(content: Any) -> str:
    """The longest word of a text, by which it is known again however a template quotes it."""
    words = re.findall(r"\w+", content) if isinstance(content, str) else []
    return max(words, key=len, default="")


def _count(text: str, word: str) -> int:
    """How often a word stands in a text, raw or as JSON spells it; an empty one does always."""
    return text.count(word) or text.count(json.dumps(word)[1:-1])


def _between(tokenizer: Tokenizer, chat: Rendering, begin: _Beginnings, turns: Sequence[int]) -> list[Span]:
    """From each turn's beginning to the next token that stops generation, that token included, or to the turn's end."""
    starts = begin.all(turns)
    stops = [token for id in tokenizer.stop_ids if (token := tokenizer.token(id)) and token in chat.specials]
    stop = re.compile("|".join(re.escape(token) for token in sorted(stops, key=len, reverse=True)) or "(?!)")
    spans = []
    for turn, start, after in zip(turns, starts, [*starts[1:], len(chat.text)], strict=True):
        found = stop.search(chat.text, start, after)
        end = found.end() if found else begin.end(turn)
        if begin.reads_on(turn, start, end):
            end = begin.end(turn)
            if begin.reads_on(turn, start, end):
                raise ModelError(_UNCLEAR.format(turn))
        spans.append((start, end))
    return spans


@dataclass(frozen=True)
class _Beginnings:
    """Where assistant turns begin in a rendered chat: behind what the template writes before the model is to go on."""

    tokenizer: Tokenizer
    chat: Rendering
    messages: Messages
    tools: Sequence[Mapping[str, Any]] | None
    variables: Mapping[str, Any]

    def all(self, turns: Sequence[int]) -> list[int]:
        """The generation prompt (as "<|im_start|>assistant\\n") holds control tokens, which only the template can
        write: if it occurs as often as there are turns, it is where they begin. Elsewhere each is looked for."""
        prompt = self._text(len(self.messages), True)
        opening = prompt[len(self.chat.text) :] if prompt.startswith(self.chat.text) else ""
        if any(token in opening for token in self.chat.specials):
            found = [match.end() for match in re.finditer(re.escape(opening), self.chat.text)]
            if len(found) == len(turns):
                return found
        return [self.of(turn) for turn in turns]

    def of(self, turn: int) -> int:
        """Rendered alone, what comes before a turn is the beginning of the chat, up to where the template wants the
        model to begin otherwise than the chat went on (with "<think>"): there the turn begins at the last line or
        control token that both share."""
        before, base = self._text(turn, True), len(self._text(turn, False))
        pairs = enumerate(zip(before, self.chat.text, strict=False))
        shared = next((place for place, (a, b) in pairs if a != b), min(len(before), len(self.chat.text)))
        if shared < base:
            raise ModelError(_UNCLEAR.format(turn))
        if shared == len(before):
            return shared
        ends = [match.end() for match in re.finditer(any_of((*self.chat.specials, "\n")), before[:shared])]
        return max(base, ends[-1] if ends else 0)

    def end(self, turn: int) -> int:
        """Where a turn ends that no control token ends: where the chat up to it does."""
        upto = self._text(turn + 1, False)
        if not self.chat.text.startswith(upto):
            raise ModelError(_UNCLEAR.format(turn))
        return len(upto)

    def reads_on(self, turn: int, start: int, end: int) -> bool:
        """Whether a stretch goes on to what a tool gave back: where the token that ends a call stops nothing, the next
        one that does stands behind the result."""
        messages, after = self.messages, turn + 1
        if after >= len(messages) or messages[after]["role"] not in _RESULTS:
            return False
        word = _telling(messages[after].get("content"))
        own = json.dumps(messages[turn], ensure_ascii=False, default=str)
        return bool(word) and _count(self.chat.plain(self.chat.text[start:end]), word) > _count(own, word)

    def _text(self, count: int, generation_prompt: bool) -> str:
        given = (self.tokenizer, self.messages[:count], generation_prompt, self.tools, self.variables)
        return rendered(*given, self.chat.marks).text


def _inside(places: Sequence[Span], edges: Sequence[int]) -> list[bool]:
    """Which places lie in the stretches from every first to every second edge; both go upwards."""
    trained, spans = [], iter([*zip(edges[::2], edges[1::2], strict=True), (1 << 62, 1 << 62)])
    start, end = next(spans)
    for first, last in places:
        while first >= end:
            start, end = next(spans)
        trained.append(start <= first < last <= end)
    return trained
