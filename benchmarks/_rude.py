"""What the clients of `serve_soak` send and know of their conversations, and the tiny model that answers them."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from langmill.families import folder as folders
from langmill.model.config import Head, ModelConfig, StackConfig, Tokens
from langmill.model.init import init_
from langmill.model.transformer import Transformer
from langmill.text.tokenizer import Tokenizer

WINDOW, NAME = 1024, "soak"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = (
    "the mill stands where river turns 水 磨 在 河 湾 wheel oak flood طاحونة summer miller pond dawn".split()
)
SCHEMA = {
    "type": "object",
    "properties": {"place": {"enum": ["Lyon", "西安"]}, "days": {"type": "boolean"}},
    "required": ["place", "days"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
USUAL = {"model": NAME, "messages": [{"role": "user", "content": "Hello"}]}
MALFORMED: tuple[tuple[bytes, int], ...] = (
    (b"", 400),
    (b"{", 400),
    (b"\xff\xfe{}", 400),
    (b"[" * 100_000, 400),
    (b'{"model": "soak", "messages": [{"role": "user", "content": "\\ud800"}]}', 400),
    (b'{"model": "soak", "messages": [{"role": "user", "content": "a"}], "temperature": NaN}', 400),
    *(
        (json.dumps(USUAL | wrong).encode(), status)
        for wrong, status in (
            ({"model": "another"}, 404),
            ({"messages": []}, 400),
            ({"messages": "Hello"}, 400),
            ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400),
            ({"max_token": 5}, 400),
            ({"max_tokens": -1}, 400),
            ({"max_tokens": WINDOW + 1}, 400),
            ({"temperature": "warm"}, 400),
            ({"n": 10**6}, 400),
            ({"stop": [""]}, 400),
            ({"tool_choice": "required"}, 400),
            ({"response_format": {"type": "json_schema"}}, 400),
            ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}}, 400),
            ({"guided_regex": "("}, 400),
        )
    ),
)


def save_tiny(folder: Path) -> None:
    """A chat model of random weights, spread so wide that it writes to its limit in many ways."""
    tokenizer = Tokenizer.train(
        [" ".join(WORDS)] * 3, vocab_size=320, specials=["<|im_start|>", "<|im_end|>"]
    )
    tokenizer = tokenizer.with_template(TEMPLATE)
    stack = StackConfig(dim=64, layers=2, heads=4, kv_heads=2, head_dim=16, hidden=96)
    size = tokenizer.vocab_size
    model = Transformer(ModelConfig(stack, Tokens(size, WINDOW), head=Head(size)))
    init_(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    folders.save(model, tokenizer, folder)


def text(draw: random.Random, words: int) -> str:
    """So many words."""
    return " ".join(draw.choices(WORDS, k=words))


def asked(draw: random.Random) -> tuple[str, dict[str, Any]]:
    """A route and a body for it, at random."""
    new = draw.choice((1, 5, 20, 80))
    said = text(draw, draw.choice((1, 5, 20, 60)))
    body: dict[str, Any] = {"model": NAME, "stream": draw.random() < 0.7}
    turns = [{"role": "user", "content": said}]
    match draw.choice(("completions", "chat", "chat", "schema", "tool", "messages", "responses")):
        case "completions":
            prompt = draw.choice((said, [said, "The"], draw.choices(range(5, 250), k=40)))
            return "/v1/completions", {
                **body,
                "prompt": prompt,
                "max_tokens": new,
                "n": draw.choice((1, 2)),
            }
        case "schema":
            form = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA}}
            return "/v1/chat/completions", {**body, "messages": turns, "response_format": form}
        case "tool":
            more = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
            return "/v1/chat/completions", {**body, "messages": turns, **more}
        case "messages":
            return "/v1/messages", {**body, "messages": turns, "max_tokens": new}
        case "responses":
            return "/v1/responses", {**body, "input": said, "max_output_tokens": new}
    more = {
        "seed": draw.randrange(9),
        "temperature": draw.choice((0, 1)),
        "stop": draw.choice((None, "an")),
    }
    if draw.random() < 0.2:
        more |= {"logprobs": True, "top_logprobs": 3, "n": 2}
    system = [{"role": "system", "content": " ".join(WORDS)}]
    return "/v1/chat/completions", {**body, "messages": system + turns, "max_tokens": new, **more}


@dataclass
class Talk:
    """A conversation as its client knows it: texts that were sent, and the messages that the server acknowledged."""

    id: str
    last: int | None = None
    sent: list[str] = field(default_factory=list)
    acknowledged: dict[int, tuple[str, str]] = field(default_factory=dict)

    def differs(self, kept: list[dict[str, Any]]) -> str | None:
        """What is wrong with the messages that the server kept; None where all is well."""
        found = {one["number"]: (one["role"], one["content"]) for one in kept}
        for number, message in self.acknowledged.items():
            if number not in found:
                return "a message is lost"
            if found[number] != message:
                return "a message is another"
        others = [text for role, text in found.values() if role == "user"]
        return (
            None
            if not Counter(others) - Counter(self.sent)
            else "a message was never sent, or is there twice"
        )
