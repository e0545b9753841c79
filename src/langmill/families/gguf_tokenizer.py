"""The tokenizer inside a GGUF file, rebuilt as the Hugging Face tokenizer that it was converted from.

Two kinds are known: "gpt2", byte-level BPE with its merges, and "llama", SentencePiece BPE given by
scores. What `tokenizer.ggml.pre` means stands in pretokenizers.yaml.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from langmill.common.errors import ModelError
from langmill.families.gguf_file import scalar
from langmill.text.specials import Specials
from langmill.text.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"
MAX_PIECE = 1 << 10  # characters; every cut of every piece is looked at
# Tokens that end a document or a turn by their name; files often list only one of them.
ENDS = frozenset(
    "<|eot_id|> <|eom_id|> <|im_end|> <|end|> <|return|> <|call|> <|calls|> <|flush|> <end_of_turn> <|endoftext|> "
    "<|end_of_text|> </s> <eos> <EOT> _<EOT> [EOT] [EOS] <turn|> <|tool_response> <end_of_utterance> "
    "<\uff5cend\u2581of\u2581sentence\uff5c>".split()
)
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
# What only files written here say: a normal form other than the one that the pre-tokenizer's name stands for ("none":
# none), and whether bos begins a plain text where llama.cpp is told not to add it, since it does not begin a chat.
NORMALIZER, ADD_BOS = "langmill.tokenizer.normalizer", "langmill.tokenizer.add_bos_token"
FORMS = ("none", "NFC", "NFD", "NFKC", "NFKD")


def build(metadata: Mapping[str, Any], where: Path, pre: str | None = None) -> Tokenizer | None:
    """The tokenizer of a file's metadata, None where it holds none.

    pre: a name of pretokenizers.yaml to use instead of the file's own, where that is missing or unknown.
    Raises ModelError naming the field that is missing, malformed or not supported.
    """
    kind = scalar(metadata, "tokenizer.ggml.model", where, "none")
    if kind in ("none", "no_vocab"):
        return None
    if kind not in ("gpt2", "llama"):
        raise ModelError(
            f"{where}: tokenizer.ggml.model is {kind!r}; supported are gpt2 (byte-level BPE) and llama (SentencePiece)"
        )
    tokens, types = _tokens(metadata, where)
    ids = {
        name: _id(metadata, name, len(tokens), where)
        for name in ("bos", "eos", "eot", "eom", "unknown", "padding")
    }
    if kind == "llama":
        for name, default in (("unknown", 0), ("bos", 1), ("eos", 2)):
            ids[name] = default if f"tokenizer.ggml.{name}_token_id" not in metadata else ids[name]
    marked = _kinds(tokens, types, ids)
    try:
        if kind == "gpt2":
            backend, add_bos = _byte_level(metadata, tokens, marked, where, pre)
        else:
            backend, add_bos = _sentencepiece(metadata, tokens, marked, ids["unknown"], where), True
    except ModelError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise ModelError(f"{where}: the tokenizer cannot be rebuilt: {error}") from error
    return _finish(backend, metadata, tokens, marked, ids, add_bos, where)


def _tokens(metadata: Mapping[str, Any], where: Path) -> tuple[list[str], list[int]]:
    """The spelling and the type of every token."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise ModelError(f"{where}: tokenizer.ggml.tokens is missing or not a list of strings")
    types = metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    types = np.asarray(types)
    if types.ndim != 1 or types.dtype.kind not in "iu" or len(types) < len(tokens):
        raise ModelError(
            f"{where}: tokenizer.ggml.token_type does not give a type for each of {len(tokens)} tokens"
        )
    spelt = [token for token in tokens if token]
    if len(set(spelt)) < len(spelt):
        twice = next(token for token, count in Counter(spelt).items() if count > 1)
        raise ModelError(f"{where}: tokenizer.ggml.tokens holds {twice!r} twice")
    return tokens, [int(kind) for kind in types[: len(tokens)]]


def _id(metadata: Mapping[str, Any], name: str, count: int, where: Path) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    value = scalar(metadata, key, where)
    if value is None or value == 0xFFFFFFFF:  # -1: none
        return None
    if type(value) is not int or not 0 <= value < count:
        raise ModelError(f"{where}: {key} is {value!r}, outside the {count} tokens")
    return value


def _kinds(tokens: Sequence[str], types: Sequence[int], ids: Mapping[str, int | None]) -> list[int]:
    """The types, with the tokens that end a turn and the named ones marked as control tokens."""
    named = {id for name, id in ids.items() if id is not None and name != "unknown"}
    return [
        CONTROL if (index in named or token in ENDS) and kind != UNUSED else kind
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
    ]


def _byte_level(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], where: Path, pre: str | None
) -> tuple[Backend, bool]:
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise ModelError(f"{where}: tokenizer.ggml.merges is missing or not a list of strings")
    pairs = []
    for index, merge in enumerate(merges):
        cut = merge.find(" ", 1)  # the first piece may itself begin with a space
        if cut < 1 or cut + 1 == len(merge):
            raise ModelError(
                f"{where}: tokenizer.ggml.merges[{index}] is {merge!r}, not two pieces with a space"
            )
        pairs.append((merge[:cut], merge[cut + 1 :]))
    entry, patterns = _pre_tokenizer(metadata, where, pre)
    vocab = {
        token: id
        for id, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if token and kind != UNUSED
    }
    backend = Backend(models.BPE(vocab=vocab, merges=pairs, ignore_merges=bool(entry.get("whole"))))
    form = scalar(metadata, NORMALIZER, where, entry.get("normalizer", "none"))
    if form not in FORMS:
        raise ModelError(f"{where}: {NORMALIZER} is {form!r}; known are {', '.join(FORMS)}")
    if form != "none":
        backend.normalizer = getattr(normalizers, form)()
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend, bool(entry.get("bos"))


def _pre_tokenizer(
    metadata: Mapping[str, Any], where: Path, override: str | None
) -> tuple[dict[str, Any], list[str]]:
    """The table's entry for the file's pre-tokenizer, and its patterns."""
    text = resources.files("langmill.families").joinpath("pretokenizers.yaml").read_text("utf-8")
    table = yaml.safe_load(text)
    implied = {"gpt2": "gpt-2", "qwen2": "qwen2", "qwen3": "qwen2"}.get(
        scalar(metadata, "general.architecture", where)
    )
    name = override or scalar(metadata, "tokenizer.ggml.pre", where, implied)
    if name not in table["names"]:
        raise ModelError(
            f"{where}: the pre-tokenizer {name!r} (tokenizer.ggml.pre) is not known; "
            f"load_gguf(path, pre=...) takes one of {', '.join(table['names'])}"
        )
    entry = table["names"][name]
    return entry, table["patterns"][entry["use"]]


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], unknown: int | None, where: Path
) -> Backend:
    scores = np.asarray(metadata.get("tokenizer.ggml.scores"))
    if scores.ndim != 1 or scores.dtype.kind not in "iuf" or len(scores) < len(tokens):
        raise ModelError(
            f"{where}: tokenizer.ggml.scores does not give a score for each of {len(tokens)} tokens"
        )
    vocab = {
        token: id
        for id, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if token and kind != UNUSED
    }
    pieces = {token: id for token, id in vocab.items() if types[id] == NORMAL}
    if (longest := max(pieces, key=len, default="")) and len(longest) > MAX_PIECE:
        raise ModelError(
            f"{where}: token {pieces[longest]} has {len(longest)} characters; at most {MAX_PIECE} are read"
        )
    backend = Backend(
        models.BPE(
            vocab=vocab,
            merges=_merges(pieces, scores.tolist()),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=all(byte in vocab for byte in BYTES),
        )
    )
    prefix = scalar(metadata, "tokenizer.ggml.add_space_prefix", where, True)
    spaces = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _merges(pieces: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Merges that repeat SentencePiece's BPE, which joins the pair whose union scores highest.

    Every way to cut a piece into two pieces is a merge; the better the piece, the earlier. Among pieces
    of one score, and cuts of one piece, the order is transformers'.
    """
    found = []
    for piece, id in pieces.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                found.append((-scores[id], -len(left), -len(right), id, left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]


def _finish(
    backend: Backend,
    metadata: Mapping[str, Any],
    tokens: Sequence[str],
    types: Sequence[int],
    ids: Mapping[str, int | None],
    add_bos: bool,
    where: Path,
) -> Tokenizer:
    """Added tokens, what begins and ends a text, and the chat template."""
    special = [tokens[id] for id, kind in enumerate(types) if kind in (CONTROL, UNKNOWN) and tokens[id]]
    defined = [tokens[id] for id, kind in enumerate(types) if kind == USER_DEFINED and tokens[id]]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    backend.add_tokens([AddedToken(token, normalized=False) for token in defined])
    bos, eos, pad = ids["bos"], ids["eos"], ids["padding"]
    add_bos = scalar(metadata, "tokenizer.ggml.add_bos_token", where, add_bos)
    add_bos = bool(scalar(metadata, ADD_BOS, where, add_bos)) and bos is not None
    if add_bos and bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            [tokens[bos], "$A"], special_tokens=[(tokens[bos], bos)]
        )
    ends = {id for id, token in enumerate(tokens) if token in ENDS and types[id] == CONTROL}
    names = {tokens[id] for id in ends}
    if "<|end|>" in names and names & {"<|call|>", "<|calls|>"}:  # there it ends a part of a turn only
        ends -= {id for id in ends if tokens[id] == "<|end|>"}
    stops = ends | {id for id in (eos, ids["eot"], ids["eom"]) if id is not None}
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(
        backend,
        Specials(
            bos=bos,
            eos=eos,
            pad=None if pad in stops or pad == bos else pad,  # a pad that ends a turn would be masked with it
            add_bos=add_bos,
            stops=frozenset(stops),
            chat_template=template if isinstance(template, str) else None,
        ),
    )
