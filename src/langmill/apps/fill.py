"""`langmill generate` with a masked model, such as BERT: the likeliest tokens for each mask of a text.

As transformers' fill-mask: a softmax over the vocabulary at each mask, the other masks left in the text.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from langmill.common.errors import DataError, ModelError, UsageError
from langmill.common.metrics import Report
from langmill.common.progress import track
from langmill.common.settings import GenerateSettings
from langmill.families.folder import Model
from langmill.infer.read import packed
from langmill.model.config import ModelConfig
from langmill.model.transformer import Transformer
from langmill.text.frames import Encoded
from langmill.text.mask import Masks
from langmill.text.tokenizer import Tokenizer

TOP = 5  # alternatives of each mask, where the settings name no number
USED = {"model", "prompt", "file", "top", "adapter", "seed", "dtype", "device", "threads"}
Likely = list[tuple[int, float]]


def fills(model: Model) -> bool:
    """Whether a model was trained to guess hidden tokens: an encoder alone whose head says words."""
    c = model.config
    return isinstance(c, ModelConfig) and c.decoder is None and c.head is not None and c.head.task == "text"


def run(
    settings: GenerateSettings, model: Model, tokenizer: Tokenizer, prompts: Sequence[Any], quiet: bool
) -> Report:
    """Fill the masks of every text.

    Results: {"prompt", "text", "tokens", "masks"}, where text has the likeliest token in each mask's place, tokens are
    their ids, and masks lists for each mask in order the --top likeliest as {"token_str", "token", "score"}, score the
    probability. DataError names a text without a mask or longer than the model reads, before any work.
    """
    assert isinstance(model, Transformer)
    if idle := sorted(settings.model_fields_set - USED):
        raise UsageError(
            f"{settings.model} guesses what a mask hides, and does not write on: --{idle[0].replace('_', '-')} is for "
            "models that do"
        )
    masks = _masks(tokenizer, settings.model)
    texts = [_text(prompt) for prompt in prompts]
    length = model.config.length
    documents = [masks.encode(text, length, f"prompt {n}") for n, text in enumerate(texts, 1)]
    top = min(settings.top or TOP, model.config.vocab)
    results: list[dict[str, Any]] = []
    began = time.perf_counter()
    with track("filling", total=len(texts), unit="texts", quiet=quiet or len(texts) == 1) as progress:
        for text, found in zip(texts, _likeliest(model, documents, masks.id, top), strict=True):
            results.append(_result(tokenizer, masks, text, found))
            progress.advance(1)
    seconds = time.perf_counter() - began
    told = [_told(result) for result in results]
    if len(told) > 1:
        told = [f"> {text}\n{own}" for text, own in zip(texts, told, strict=True)]
    if not quiet:
        print(f"{len(texts):,} texts in {seconds:.1f} s", file=sys.stderr)
    return Report(
        counts={
            "prompts": len(texts),
            "prompt_tokens": sum(len(document.ids) for document in documents),
            "masks": sum(len(result["masks"]) for result in results),
        },
        figures={"texts_per_second": len(texts) / seconds, "seconds_generating": seconds},
        text="\n\n".join(told),
        extra={"results": results},
    )


def _masks(tokenizer: Tokenizer, where: str) -> Masks:
    try:
        return Masks(tokenizer)
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from None


def _text(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    raise DataError(f"{prompt.where} is a chat, and this model guesses what the masks of a text hide")


def _likeliest(
    model: Transformer, documents: Sequence[Encoded], mask: int, top: int
) -> Iterator[list[Likely]]:
    """For each document, for each of its masks in order, the `top` likeliest tokens with their probabilities."""
    for group, given in packed(model, documents):
        with torch.inference_mode():  # only the masks' states are scored
            masked_KD = model.hidden(**given)[given["tokens_BT"] == mask]
            best = model.logits(masked_KD).float().softmax(-1).topk(top)
        found = [
            list(zip(*one, strict=True))
            for one in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        masks = iter(found)
        for document in group:
            yield [next(masks) for _ in range(document.ids.count(mask))]


def _result(tokenizer: Tokenizer, masks: Masks, text: str, found: Sequence[Likely]) -> dict[str, Any]:
    best = [own[0][0] for own in found]
    named = [
        [
            {"token_str": tokenizer.decode([id], skip_specials=False), "token": id, "score": score}
            for id, score in own
        ]
        for own in found
    ]
    return {"prompt": text, "text": masks.filled(text, best), "tokens": best, "masks": named}


def _told(result: dict[str, Any]) -> str:
    """The filled text, and below it a line for each mask."""
    lines = [
        "  "
        + ", ".join(f"{one['token_str'].strip() or repr(one['token_str'])} {one['score']:.3f}" for one in own)
        for own in result["masks"]
    ]
    return "\n".join([result["text"], *lines])
