"""What a model is given while it is rounded: passes over text, or over what it writes itself.

B rows, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from langmill.common.errors import ModelError
from langmill.infer.generate import generate_ids
from langmill.infer.sampling import Sampling
from langmill.model.config import ModelConfig
from langmill.model.transformer import Transformer
from langmill.text.frames import Encoded
from langmill.text.tokenizer import Tokenizer

ROWS = 8  # windows in one pass
WRITTEN = 256  # tokens of a text that a model writes itself, at most
Pair = tuple[str, str]  # what an encoder reads and a decoder writes; often the same


def passes(
    model: Transformer, tokenizer: Tokenizer, pairs: Iterable[Pair], samples: int, length: int
) -> list[dict[str, Any]]:
    """Arguments of `Transformer.hidden` for texts, as the model reads them, until there are samples · length tokens.

    A decoder alone reads them end to end in windows of `length`, each text behind the start token. Others read whole
    texts, those that are longer cut off, several in one row that do not see each other.
    """
    config, device = model.config, model.main.like.device
    if config.encoder is None:
        return _windows(config, tokenizer, (text for text, _ in pairs), samples, length, device)
    made, group, tokens = list[dict[str, Any]](), list[tuple[Encoded, Encoded]](), 0
    for read, written in pairs:
        both = (_framed(tokenizer, read, length), _framed(tokenizer, written, length))
        if group and sum(len(one.ids) for one, _ in group) + len(both[0].ids) > length:
            made.append(_packed(model, group))
            group = []
        group.append(both)
        tokens += len(both[0].ids)
        if tokens >= samples * length:
            break
    return [*made, _packed(model, group)] if group else made


def _windows(
    config: ModelConfig, tokenizer: Tokenizer, texts: Iterable[str], samples: int, length: int, device: torch.device
) -> list[dict[str, Any]]:  # fmt: skip
    ids = list[int]()
    for text in texts:
        ids += [tokenizer.start_id, *tokenizer.encode(text)]
        if len(ids) >= samples * length:
            break
    whole = len(ids) // length * length or len(ids)  # a rest counts only where there is nothing else
    rows = torch.tensor(ids[:whole], device=device).view(-1, min(length, max(1, whole)))
    return [{"tokens_BT": some} for some in rows[:samples].split(ROWS)] if whole else []


def _framed(tokenizer: Tokenizer, text: str, length: int) -> Encoded:
    frame = tokenizer.frame
    return frame.one(tokenizer.encode(text)[: max(1, length - frame.room())])


def _packed(model: Transformer, group: Sequence[tuple[Encoded, Encoded]]) -> dict[str, Any]:
    """One row of several documents."""
    config, device = model.config, model.main.like.device

    def row(values: Iterable[Iterable[int]]) -> torch.Tensor:
        return torch.tensor([[value for some in values for value in some]], device=device)

    read, written = zip(*group, strict=True)
    tokens, documents = row(d.ids for d in read), row([n] * len(d.ids) for n, d in enumerate(read, 1))
    given: dict[str, Any] = {"tokens_BT": tokens, "documents_BT": documents}
    if config.decoder is None or config.rereads:
        return given | ({"types_BT": row(d.types for d in read)} if model.main.types is not None else {})
    start = config.input.start
    if start is None:
        raise ModelError("this model's decoder has no token to start with")
    return {
        "tokens_BT": row([start, *d.ids[:-1]] for d in written),
        "documents_BT": row([n] * len(d.ids) for n, d in enumerate(written, 1)),
        "encoder_tokens": tokens,
        "encoder_documents": documents,
    }


def written(
    model: Transformer, tokenizer: Tokenizer, samples: int, length: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Passes over texts that a decoder writes from its start token as its probabilities say, without an end."""
    size = min(length, WRITTEN)
    sampling = Sampling(max_new_tokens=max(1, size - 1), temperature=1.0, seed=seed)
    rows = [[tokenizer.start_id] for _ in range(samples)]
    for step in generate_ids(model, rows, sampling):
        for token in step:
            rows[token.row].append(token.id)
    device = model.main.like.device
    yield from ({"tokens_BT": some} for some in torch.tensor(rows, device=device)[:, :size].split(ROWS))
