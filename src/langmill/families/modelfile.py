"""The Modelfile by which Ollama takes in a GGUF file: its chat template in Go's form, where its shape can be found out.

Most chat templates write each message between two fixed texts that its role decides, and then what an answer begins
with: ChatML, Llama 3's, Zephyr's, plain "User: …". Such a shape is found by rendering marked messages, and believed
where it gives the template's own text for several chats.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from langmill.common.errors import DataError, ModelError
from langmill.text.chat import Messages, render
from langmill.text.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
_MARKS = (
    "Aleph beth 7.",
    "Gimel\n\ndaleth (8)",
    "He waw",
    "Zayin, heth\n9",
    "Teth",
)  # not to be met in a template


@dataclass(frozen=True)
class Shape:
    """What stands before all messages, around those of each role, and before an answer; `default`: a system message
    that is put in where a chat has none."""

    start: str
    around: dict[str, tuple[str, str]]
    answer: str
    default: str | None = None

    def render(self, messages: Messages, answering: bool) -> str:
        chat = list(messages)
        if self.default is not None and chat[0]["role"] != "system":
            chat.insert(0, {"role": "system", "content": self.default})
        parts = [
            before + message["content"] + after
            for message in chat
            for before, after in [self.around[message["role"]]]
        ]
        return self.start + "".join(parts) + (self.answer if answering else "")

    def as_go(self) -> str:
        """The same in Go's template language, as Ollama runs it."""
        branches = [
            f'{"else " if number else ""}if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}{{{{ '
            for number, (role, (before, after)) in enumerate(self.around.items())
        ]
        return (
            f"{self.start}{{{{ range .Messages }}}}{{{{ {''.join(branches)}end }}}}{{{{ end }}}}{self.answer}"
        )


def modelfile(file: str, tokenizer: Tokenizer | None, length: int, bos_added: bool) -> str:
    """The text of a Modelfile beside the GGUF file of that name.

    length: the tokens of the model's context. bos_added: llama.cpp puts bos before a text itself.
    """
    lines = [f"# ollama create NAME -f THIS_FILE\nFROM ./{file}"]
    template = tokenizer.chat_template if tokenizer is not None else None
    if tokenizer is None or template is None:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    elif (shape := shape_of(tokenizer, bos_added)) is None:
        lines.append(
            "# The chat template in the GGUF file has no simple counterpart in Go: Ollama looks at the one in the file."
        )
    else:
        lines.append(f'TEMPLATE """{shape.as_go()}"""')
        if shape.default:
            lines.append(f'SYSTEM """{shape.default}"""')
    stops = sorted(tokenizer.stop_ids) if tokenizer is not None else []
    texts = [tokenizer.decode([id], skip_specials=False) for id in stops] if tokenizer is not None else []
    lines += [f'PARAMETER stop "{text}"' for text in texts if text and not re.search(r'["\n\\\ufffd]', text)]
    return "\n".join([*lines, f"PARAMETER num_ctx {length}"]) + "\n"


def shape_of(tokenizer: Tokenizer, bos_added: bool = False) -> Shape | None:
    """The shape of a tokenizer's chat template, None where it has another; without the bos that llama.cpp adds."""
    template = tokenizer.chat_template
    if template is None:
        return None
    bos, eos = (
        "" if id is None else tokenizer.token(id) or "" for id in (tokenizer.bos_id, tokenizer.eos_id)
    )

    def written(chat: Messages, answering: bool) -> str:
        return render(template, chat, add_generation_prompt=answering, bos_token=bos, eos_token=eos)

    cut = bos if bos_added else ""
    chats = [_chat(roles)[:count] for roles in (ROLES, ROLES[1:]) for count in range(1, 6)]
    try:
        shape = _found(written, cut)
        asked = [(chat, answering) for chat in chats for answering in (False, chat[-1]["role"] == "user")]
        if shape is None or any(shape.render(chat, a) != written(chat, a) for chat, a in asked):
            return None
    except (DataError, ModelError):
        return None
    around = [text for pair in shape.around.values() for text in pair]
    if any(
        '"""' in text or "{{" in text for text in [shape.start, shape.answer, shape.default or "", *around]
    ):
        return None
    return replace(shape, start=shape.start.removeprefix(cut))


def _chat(roles: Sequence[str]) -> list[dict[str, str]]:
    """Five marked messages: the roles given first, then users and assistants in turn."""
    order = [*roles, "user", "assistant", "user"]
    return [{"role": role, "content": mark} for role, mark in zip(order, _MARKS, strict=False)]


def _found(written: Callable[[Messages, bool], str], cut: str) -> Shape | None:
    """The shape that a rendering of five messages and one of a single question suggest."""
    question = [{"role": "user", "content": _MARKS[0]}]
    parts, alone, asked = (
        _between(written(_chat(ROLES), False)),
        written(question, False),
        written(question, True),
    )
    if parts is None or alone.count(_MARKS[0]) != 1 or not asked.startswith(alone):
        return None
    first, second, third, fourth, _, after_assistant = parts
    before, after_user = alone.split(_MARKS[0])
    user, assistant = fourth.removeprefix(after_assistant), third.removeprefix(after_user)
    lead, after_system = before.removesuffix(user), second.removesuffix(user)
    default, start = None, lead
    if not first.startswith(
        lead
    ):  # what stands before a first question may be a system message of the template's own
        if not lead.startswith(first) or not lead.endswith(after_system):
            return None
        default = lead[len(first) : len(lead) - len(after_system)]
        start = cut if first.startswith(cut) else ""
    system = (first.removeprefix(start), after_system)
    around = {"system": system, "user": (user, after_user), "assistant": (assistant, after_assistant)}
    return Shape(start, around, asked.removeprefix(alone), default)


def _between(text: str) -> list[str] | None:
    """What stands before, between and behind the marks; None where they do not stand there once each, in order."""
    found = re.fullmatch("(.*?)" + "(.*?)".join(map(re.escape, _MARKS)) + "(.*)", text, re.DOTALL)
    once = all(text.count(mark) == 1 for mark in _MARKS)
    return list(found.groups()) if found and once else None
