"""A gap in a text as a prompt: what stands before it, what stands after it, and the mark behind which it is filled.

Fill in the middle, Bavarian et al. 2022 (arXiv:2207.14255), section 3: PSM, prefix, suffix, middle; or SPM in the joint
form, suffix first, then the prefix and the middle behind one mark. Or GLM's blanks, Du et al. 2022 (arXiv:2103.10360):
a mark in the gap, and again behind the text, before the filling.
"""

from __future__ import annotations

from langmill.common.errors import ModelError
from langmill.text.tokenizer import Tokenizer
from langmill.text.training import FIM

# As models spell the marks: this project's and Qwen's, StarCoder's, Granite's and SantaCoder's, DeepSeek's.
SPELT = (
    FIM,
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
)


def marks(tokenizer: Tokenizer) -> tuple[int, int, int] | None:
    """The ids of the marks before the text, after the gap and before its filling; None where the tokenizer has none."""
    vocab = tokenizer.vocab
    for names in SPELT:
        if all(name in vocab for name in names):
            before, after, between = (vocab[name] for name in names)
            return before, after, between
    return None


def gap_ids(tokenizer: Tokenizer, before: str, after: str, order: str = "psm") -> list[int]:
    """The ids of a prompt whose continuation belongs between the two texts, either of which may be empty.

    order: "psm", "spm" or "blank", a model's `config.gaps`.

    ModelError where the tokenizer lacks the marks, so that the model never learned to fill gaps.
    """
    start = tokenizer.prompt_ids("")  # a text is learned from its start
    head, tail = tokenizer.encode(before), tokenizer.encode(after)
    if order == "blank" and tokenizer.sentinel_ids:
        blank = tokenizer.sentinel_ids[0]
        return [*start, *head, blank, *tail, blank]
    found = marks(tokenizer)
    if found is None:
        raise ModelError(
            "this model has no marks of a gap, so it cannot write what stands before a suffix: take one that was "
            "pretrained with objective=infill or blanks"
        )
    prefix, suffix, middle = found
    if order == "spm":
        return [*start, prefix, suffix, *tail, middle, *head]
    return [*start, prefix, *head, suffix, *tail, middle]
