"""Train byte-level BPE, WordPiece and Unigram vocabularies from a bounded sample of text.

All three work on the 256 bytes (as GPT-2 spells them), so any text round-trips and nothing is unknown.
The same texts in the same order give the same vocabulary, byte for byte. Hugging Face's trainer is
deterministic for BPE only: WordPiece is made so by fixing the ids of its alphabet, and Unigram's
expectation-maximisation is done here.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import regex
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from langmill.common.errors import DataError, UsageError
from langmill.text.document import text_hash

END, PAD = "<|endoftext|>", "<|pad|>"
SPECIALS = (END, PAD, "<|im_start|>", "<|im_end|>")
# What a tokenizer may be given beside them: the mark of a hidden token, those of spans taken out (Raffel et al. 2020),
# and of the text before, after and in a gap (Bavarian et al. 2022).
MASK, SENTINEL = "<|mask|>", "<extra_id_{}>"
FIM = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
SPANS = 128  # sentinels: enough for 2,500 tokens
MARKS = {"mask": (MASK,), "fim": FIM, "sentinels": tuple(SENTINEL.format(i) for i in range(SPANS))}
CONTINUES = "‿"  # stands before a WordPiece that continues a word; not a letter of the byte alphabet

# Qwen3.5's pattern: GPT-4's, with digits one by one and combining marks kept with their letters, which
# Indic and Arabic scripts need.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The same with every run bounded: longest-match-first is quadratic in the length of a word.
BOUNDED = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]{1,32}|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]{1,32}[\r\n]{0,8}|\s{0,32}[\r\n]{1,8}|\s{1,32}(?!\S)|\s{1,32}"
)
Counts = NDArray[np.int64]
_PIECE = 1 << 16  # characters: a longer document is sampled in pieces
# The trainer takes about 120 bytes of memory for a byte of distinct words. English has 3 MB of them in some 30 MB of
# text; Chinese, whose clauses are words here, in 3.5 MB, and more of it gains little: 16 MB of distinct clauses give
# 0.2 % more bytes a token than 4 MB (vocabulary 8,192), and take 1.6 GB.
DISTINCT_BYTES = 3 << 20
_WORDS = 1_000_000  # distinct words that Unigram looks at, the most frequent first
_LARGEST_PIECE = 16  # characters of the longest Unigram piece, as in SentencePiece


def train_backend(
    texts: Iterable[str],
    vocab_size: int | None,
    kind: str,
    sample_bytes: int,
    specials: Sequence[str] = (),
) -> Backend:
    """A trained tokenizer of `kind`; `vocab_size` None is chosen from the size of the text.

    `specials` are control tokens behind those of SPECIALS; UsageError for one that is a word as it stands.

    The text may be too small for the vocabulary asked for: what it reaches is the result's size.
    """
    kept, total = sample(texts, sample_bytes)
    kept = affordable(kept)
    if not kept:
        raise DataError("there is no text to train a tokenizer on: every document is empty")
    size = vocab_for(total) if vocab_size is None else vocab_size
    named = _named(specials)
    smallest = len(named) + (512 if kind == "wordpiece" else 256)
    if size < smallest:
        raise UsageError(f"a {kind} vocabulary has at least {smallest} entries, not {size}")
    match kind:
        case "bpe":
            return _bpe(kept, size, named)
        case "wordpiece":
            return _wordpiece(kept, size, named)
        case "unigram":
            return _unigram(kept, size, named)
    raise UsageError(f'there is no tokenizer kind "{kind}": choose bpe, wordpiece or unigram')


def _named(specials: Sequence[str]) -> tuple[str, ...]:
    """SPECIALS and the others, each once; one that the text could hold as a word would be taken from it."""
    for token in specials:
        if len(_pre_tokenizer(PATTERN).pre_tokenize_str(token)) < 2:
            raise UsageError(
                f'"{token}" cannot be a control token, since texts hold it as a word: write <|…|>'
            )
    return tuple(dict.fromkeys((*SPECIALS, *specials)))


def vocab_for(text_bytes: int) -> int:
    """A vocabulary size that suits this much text: from 1,024 below half a megabyte to 32,768."""
    limits = ((500_000, 1024), (2_000_000, 2048), (8_000_000, 4096), (64_000_000, 8192), (512_000_000, 16384))
    return next((size for limit, size in limits if text_bytes < limit), 32768)


def sample(texts: Iterable[str], limit: int) -> tuple[list[str], int]:
    """Texts of at most `limit` bytes together, spread over all of `texts`, and the bytes of all of them.

    Those with the smallest hashes stay, so the choice is even over the whole input, repeated texts
    count once, and memory is bounded by `limit`.
    """
    heap: list[tuple[int, int, str]] = []
    seen: set[int] = set()
    total = held = 0
    for piece in _pieces(texts):
        data = piece.encode("utf-8")
        total += len(data)
        key = text_hash(data)
        if key in seen or (held + len(data) > limit and heap and key >= -heap[0][0]):
            continue
        heapq.heappush(heap, (-key, len(data), piece))
        seen.add(key)
        held += len(data)
        while held > limit and len(heap) > 1:
            worst, size, _ = heapq.heappop(heap)
            seen.discard(-worst)
            held -= size
    return [piece for _, _, piece in sorted(heap, reverse=True)], total


def affordable(texts: Sequence[str], limit: int = DISTINCT_BYTES) -> list[str]:
    """The first of `texts`, up to the one with which their distinct words reach `limit` bytes: memory follows them."""
    words, seen, held = regex.compile(PATTERN), set[str](), 0
    for place, text in enumerate(texts):
        fresh = set(words.findall(text)) - seen
        seen |= fresh
        held += len("".join(fresh).encode("utf-8"))
        if held >= limit:
            return list(texts[: place + 1])
    return list(texts)


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for start in range(0, len(text), _PIECE):
            yield text[start : start + _PIECE]


def _finish(backend: Backend, pattern: str, specials: Sequence[str], prefix: str = "") -> Backend:
    backend.pre_tokenizer = _pre_tokenizer(pattern)
    steps = [decoders.Replace(prefix, ""), decoders.ByteLevel()]
    backend.decoder = decoders.Sequence(steps) if prefix else steps[1]
    # A mask hides a word with the space before it, so that space is not read beside it.
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False, lstrip=token == MASK) for token in specials]
    )
    # A sequence starts as documents did in training; every tool that reads the file does the same. A second text
    # stands behind another END.
    start = (END, backend.token_to_id(END))
    backend.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A {END} $B:1", special_tokens=[start]
    )
    return backend


def _pre_tokenizer(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _merged(texts: Iterable[str], size: int, pattern: str, fixed: Sequence[str], prefix: str = "") -> Backend:
    """Byte-pair merges (Sennrich et al. 2016, arXiv:1508.07909) up to `size`, `fixed` tokens first."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = _pre_tokenizer(pattern)
    options: dict[str, Any] = {"continuing_subword_prefix": prefix} if prefix else {}
    options |= {"special_tokens": list(fixed), "initial_alphabet": _alphabet(), "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=size, **options)
    backend.train_from_iterator(texts, trainer)
    return backend


def _alphabet() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _bpe(texts: Iterable[str], size: int, specials: Sequence[str]) -> Backend:
    return _finish(_merged(texts, size, PATTERN, specials), PATTERN, specials)


def _wordpiece(texts: Iterable[str], size: int, specials: Sequence[str]) -> Backend:
    """Merges that know whether they start a word, used longest match first (Devlin et al. 2019)."""
    # As "fixed" tokens the alphabet's ids no longer come from a randomly ordered hash map.
    fixed = [*specials, *_alphabet(), *(CONTINUES + letter for letter in _alphabet())]
    vocab = _merged(texts, size, BOUNDED, fixed, CONTINUES).get_vocab()
    model = models.WordPiece(
        vocab, unk_token=END, continuing_subword_prefix=CONTINUES, max_input_chars_per_word=1024
    )
    return _finish(Backend(model), BOUNDED, specials, CONTINUES)


def _unigram(texts: Sequence[str], size: int, specials: Sequence[str]) -> Backend:
    """Unigram language model (Kudo 2018, arXiv:1804.10959), sections 3.2 and 3.3.

    The seed is a BPE vocabulary four times as large; expectation-maximisation counts the best
    segmentation only, which keeps the counts whole numbers and the result the same on every run.
    """
    split = _pre_tokenizer(PATTERN)
    counted = Counter(word for text in texts for word, _ in split.pre_tokenize_str(text))
    common = sorted(counted.items(), key=lambda item: (-item[1], item[0]))[:_WORDS]
    words = [word for word, _ in common]
    weights = np.array([count for _, count in common], dtype=np.int64)
    seed = _merged(texts, 4 * size, PATTERN, ()).get_vocab()
    pieces = sorted(piece for piece in seed if len(piece) <= _LARGEST_PIECE)
    counts = np.array([1 + 2 * (len(piece) > 1) for piece in pieces], dtype=np.int64)
    wanted = size - len(specials)
    while True:
        for _ in range(2):
            scores = _scores(counts)
            counts = _count(words, weights, pieces, scores)
        if len(pieces) <= wanted:
            break
        loss = _loss(pieces, _scores(counts), counts)
        keep = np.sort(np.argsort(-loss, kind="stable")[: max(wanted, int(len(pieces) * 0.75))])
        pieces, counts = [pieces[i] for i in keep], counts[keep]
    ranked = sorted(zip(_scores(counts), pieces, strict=True), key=lambda item: (-item[0], item[1]))
    entries = [(token, 0.0) for token in specials] + [(piece, score) for score, piece in ranked]
    return _finish(Backend(models.Unigram(entries, unk_id=None)), PATTERN, specials)


def _scores(counts: Counts) -> list[float]:
    """Log probabilities, rounded so that the last bits of `log` do not reach the file."""
    floor = np.maximum(counts, 0.5)
    return [round(float(score), 6) for score in np.log(floor / floor.sum())]


def _count(words: Sequence[str], weights: Counts, pieces: list[str], scores: list[float]) -> Counts:
    """How often each piece stands in the best segmentations of the words."""
    backend = Backend(models.Unigram(list(zip(pieces, scores, strict=True)), unk_id=None))
    counts = np.zeros(len(pieces), dtype=np.int64)
    for start in range(0, len(words), 1 << 16):
        encodings = backend.encode_batch_fast(
            list(words[start : start + (1 << 16)]), add_special_tokens=False
        )
        ids = [np.asarray(encoding.ids) for encoding in encodings]
        repeated = np.repeat(weights[start : start + len(ids)], [len(row) for row in ids])
        np.add.at(counts, np.concatenate(ids), repeated)
    return counts


def _loss(pieces: list[str], scores: list[float], counts: Counts) -> NDArray[np.float64]:
    """What the corpus loses in log likelihood without each piece; single bytes are never given up."""
    table = dict(zip(pieces, scores, strict=True))
    without = [math.inf if len(piece) == 1 else table[piece] - _best_split(piece, table) for piece in pieces]
    return np.where(np.isinf(without), np.inf, np.asarray(without) * np.maximum(counts, 1e-3))


def _best_split(piece: str, table: dict[str, float]) -> float:
    """The log probability of the piece's best segmentation into two or more pieces (Viterbi)."""
    best = [0.0] + [-math.inf] * len(piece)
    for end in range(1, len(piece) + 1):
        for start in range(end == len(piece), end):
            score = table.get(piece[start:end])
            if score is not None and best[start] + score > best[end]:
                best[end] = best[start] + score
    return best[-1]
