"""What a model answers to held-out prompts, before and after: the answers, and whether it stopped by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from langmill.common.progress import track
from langmill.data.chats import Chat, Row
from langmill.families.folder import Model
from langmill.infer.generate import generate_pieces
from langmill.infer.sampling import Sampling
from langmill.text.chat import chat_ids
from langmill.text.tokenizer import Tokenizer
from langmill.text.turns import ASSISTANT

LONGEST_ANSWER = 128  # tokens


@dataclass(frozen=True)
class Answer:
    """`prompt`: what the model was asked, its last turn; `wanted`: what the conversation answers."""

    prompt: str
    wanted: str
    text: str
    stopped: bool


def ask(
    model: Model,
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    quiet: bool,
    when: str,
    tokens: int = LONGEST_ANSWER,
) -> list[Answer]:
    """Greedy answers to the first trained turn of each row that leaves room for one."""
    model.eval()
    asked = [(row, *_question(tokenizer, row)) for row in rows]
    asked = [found for found in asked if len(found[1]) + 8 < model.config.length]
    if not asked:
        return []
    texts, stopped = [""] * len(asked), [False] * len(asked)
    sampling = Sampling(max_new_tokens=tokens, temperature=0.0)
    with track(f"answering, {when}", len(asked), "prompts", quiet) as progress:
        for step in generate_pieces(model, tokenizer, [ids for _, ids, _, _ in asked], sampling):
            for piece in step:
                texts[piece.row] += piece.text
                if piece.finish:
                    stopped[piece.row] = piece.finish == "stop"
                    progress.advance(1)
    return [
        Answer(prompt, wanted, text, end)
        for (_, _, prompt, wanted), text, end in zip(asked, texts, stopped, strict=True)
    ]


def _question(tokenizer: Tokenizer, row: Row) -> tuple[list[int], str, str]:
    """The ids to answer, the last words asked, and the answer of the data."""
    if not isinstance(row, Chat):
        return tokenizer.prompt_ids(row.prompt), row.prompt, row.completion
    turn = next(i for i, m in enumerate(row.messages) if m["role"] in ASSISTANT and i >= row.first)
    before = row.messages[:turn]
    return chat_ids(tokenizer, before, True, row.tools), _words(before[-1]), _words(row.messages[turn])


def _words(message: dict[str, object]) -> str:
    content = message.get("content", "")
    return content if isinstance(content, str) else str(content)
