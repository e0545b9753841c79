"""What a job measures and shows of a model: bits per byte on held-out documents, yardsticks, samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from langmill.common.progress import track
from langmill.evaluate.loss import Interval, Scores, bootstrap, score
from langmill.evaluate.yardstick import Yardstick
from langmill.families.folder import Model
from langmill.infer.generate import generate_pieces
from langmill.infer.sampling import Sampling
from langmill.jobs.corpus import Corpus, Ints
from langmill.jobs.report import Sample
from langmill.text.tokenizer import Tokenizer

PROMPT_TOKENS = 12  # of a held-out document, for samples


def measure(
    model: Model, corpus: Corpus, chosen: Ints, length: int, seed: int, quiet: bool, what: str = "scoring"
) -> Scores:
    """Score the chosen documents, each in its own context."""
    model.eval()
    with track(what, int(corpus.shards.lengths(chosen).sum()), "tokens", quiet) as progress:
        return score(
            model,
            corpus.encoded(chosen),
            start_id=corpus.tokenizer.start_id,
            length=length,
            seed=seed,
            on_tokens=progress.advance,
        )


def validation(corpus: Corpus, chosen: Ints, length: int) -> Callable[[nn.Module], dict[str, float]]:
    """What `fit` calls during a run: loss and bits per byte on a few held-out documents."""
    documents = list(corpus.encoded(chosen))

    def validate(model: Any) -> dict[str, float]:
        found = score(model, documents, start_id=corpus.tokenizer.start_id, length=length, resamples=1)
        return {"loss": found.loss, "bits_per_byte": found.bits_per_byte}

    return validate


def yardsticks(corpus: Corpus, chosen: Ints) -> dict[str, float]:
    """Bits per byte of gzip and xz on the same documents."""
    yardstick = Yardstick()
    for text in corpus.texts(chosen):
        yardstick.add(text)
    return yardstick.bits_per_byte()


def figures(scores: Scores) -> dict[str, Any]:
    """The figures of a report."""
    return {
        "loss": scores.loss,
        "perplexity": scores.perplexity,
        "bits_per_byte": scores.bits_per_byte,
        "bits_per_byte_interval": scores.bits_per_byte_interval and list(scores.bits_per_byte_interval),
    }


def difference(one: Scores, other: Scores, seed: int, resamples: int = 1000) -> tuple[float, Interval | None]:
    """Bits per byte that `other` needs beyond `one`, on the same documents, and its 95 % interval.

    Paired: each bootstrap sample holds the same documents for both, which removes what makes a document hard for
    either (Efron & Tibshirani 1993, section 13.3).
    """
    nll = (other.nll_N - one.nll_N) / math.log(2)
    total = float(nll.sum() / one.bytes_N.sum())
    if len(nll) < 2:
        return total, None
    nll_R, bytes_R = bootstrap(np.stack((nll, one.bytes_N.astype(np.float64))), resamples, seed)
    low, high = np.percentile(nll_R / bytes_R, (2.5, 97.5))
    return total, (float(low), float(high))


def prompts(corpus: Corpus, count: int) -> list[str]:
    """Beginnings of held-out documents (of training ones where none is held out), spread over all of them."""
    documents = corpus.held if len(corpus.held) else corpus.train
    lengths = corpus.shards.lengths(documents)
    long = documents[lengths > 2 * PROMPT_TOKENS]
    usable = long if len(long) >= count else documents
    places = np.unique(np.linspace(0, len(usable) - 1, min(count, len(usable))).astype(int))
    found = []
    for index in usable[places]:
        ids = corpus.shards.tokens_of(int(index))
        text = corpus.tokenizer.decode(ids[: min(PROMPT_TOKENS, max(1, len(ids) // 2))].tolist())
        found.append(text.rstrip("\ufffd"))  # a character that the cut went through
    return [text for text in found if text.strip()]


def samples(
    model: Model,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    by: str,
    style: str,
    seed: int,
    tokens: int = 120,
) -> list[Sample]:
    """What the model makes of each prompt, at temperature 0.7 with the unlikely tail cut off."""
    model.eval()
    sampling = Sampling(max_new_tokens=tokens, temperature=0.7, top_p=0.95, seed=seed)
    starts = [[tokenizer.start_id, *tokenizer.encode(text)][-model.config.length // 2 :] for text in texts]
    written = [""] * len(texts)
    for step in generate_pieces(model, tokenizer, starts, sampling):
        for piece in step:
            written[piece.row] += piece.text
    return [Sample(by, prompt, text, style) for prompt, text in zip(texts, written, strict=True)]


def restore(saved: Mapping[str, Any]) -> Scores:
    """Scores from the JSON that `stored` made."""
    arrays = {"nll_N": np.float64, "tokens_N": np.int64, "bytes_N": np.int64}
    values = {name: value for name, value in saved.items() if name in Scores.__dataclass_fields__}
    values |= {name: np.array(saved[name], kind) for name, kind in arrays.items()}
    values |= {name: tuple(v) for name, v in values.items() if name.endswith("_interval") and v is not None}
    return Scores(**(values | {"names": tuple(saved["names"])}))


def stored(scores: Scores) -> dict[str, Any]:
    """Scores as JSON, for a resumed run."""
    values = {name: getattr(scores, name) for name in Scores.__dataclass_fields__}
    return {name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in values.items()}
