"""Small tokenizers in the shapes of BERT's, RoBERTa's and T5's files, built with the tokenizers library."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from langmill.text.specials import Specials
from langmill.text.tokenizer import Tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog, says Marie Curie of Paris. Who was born in Warsaw? She was.",
    "玛丽·居里出生在华沙。她在巴黎工作，发现了镭。今天天气很好，我们去公园玩。",
    "ولدت ماري كوري في وارسو، وعملت في باريس. من اكتشف الراديوم؟ هي.",
] * 3


def bert() -> Backend:
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=260, special_tokens=names, show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return backend


def roberta() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"initial_alphabet": alphabet, "special_tokens": names, "show_progress": False}
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, **options))
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True)
    return backend


def t5() -> Backend:
    letters = sorted({letter for text in TEXTS for letter in text.replace(" ", "▁")})
    words = sorted({f"▁{word}" for text in TEXTS for word in text.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -3.0)]
    pieces += [(piece, -4.0) for piece in words] + [(letter, -6.0) for letter in letters if letter != "▁"]
    backend = Backend(models.Unigram(pieces, unk_id=2))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    names = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{n}>" for n in reversed(range(3)))]
    backend.add_special_tokens([AddedToken(name, special=True) for name in names])
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return backend


KINDS: dict[str, tuple[Callable[[], Backend], Specials]] = {
    "bert": (bert, Specials(bos=2, eos=3, pad=0, mask=4, add_bos=True)),
    "roberta": (roberta, Specials(bos=0, eos=2, pad=1, mask=4, add_bos=True)),
    "t5": (t5, Specials(eos=1, pad=0)),
}


@pytest.fixture(scope="session")
def shaped() -> dict[str, Tokenizer]:
    """A tokenizer of each shape, and "ours", trained here on the same texts."""
    found = {name: Tokenizer(make(), specials) for name, (make, specials) in KINDS.items()}
    return found | {
        "ours": Tokenizer.train(TEXTS, 400, specials=("<|mask|>", "<extra_id_0>", "<extra_id_1>"))
    }
