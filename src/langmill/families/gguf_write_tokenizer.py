"""A tokenizer as the metadata of a GGUF file: the inverse of gguf_tokenizer.py, by the same table of pre-tokenizers.

Byte-level BPE becomes the kind "gpt2", with the name by which llama.cpp knows its cuts; SentencePiece's BPE becomes
"llama", with scores that give its merges back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from itertools import groupby
from typing import Any

import yaml

from langmill.common.errors import DataError, ModelError
from langmill.families.gguf_tokenizer import (
    BYTE,
    BYTES,
    CONTROL,
    ENDS,
    MAX_PIECE,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)
from langmill.text.chat import chat_ids
from langmill.text.specials import TURN_ENDS
from langmill.text.tokenizer import Tokenizer

OTHERWISE = "take --to hf, or train a tokenizer of kind bpe"
# What llama.cpp has no key for: a normal form other than the one that a pre-tokenizer's name stands for, and whether
# bos begins a plain text where it does not begin a chat.
NORMALIZER, ADD_BOS = "langmill.tokenizer.normalizer", "langmill.tokenizer.add_bos_token"


def entries(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """The metadata that says what a tokenizer does. rows: those of the embedding, each of which needs a token.

    ModelError where llama.cpp knows no such tokenizer.
    """
    content = json.loads(tokenizer.to_json())
    model = content["model"]
    if model.get("type") != "BPE" or any(
        model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    ):
        kind = f"a {model.get('type')} tokenizer of this form"
        raise ModelError(f"llama.cpp knows no counterpart of {kind}: {OTHERWISE}")
    cuts = list(_steps(content["pre_tokenizer"], "pretokenizers"))
    if any(cut["type"] == "ByteLevel" for cut in cuts):
        tokens, types = _tokens(content, rows, {})
        found = _byte_level(content, cuts)
    else:
        bytes_ = dict.fromkeys(BYTES, BYTE) if model.get("byte_fallback") else {}
        tokens, types = _tokens(content, rows, bytes_ | {model.get("unk_token"): UNKNOWN})
        found = _sentencepiece(content, cuts, tokens, types)
    tokenwise = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    return found | tokenwise | _specials(tokenizer)


def notes(tokenizer: Tokenizer) -> list[str]:
    """What llama.cpp will do otherwise than this tokenizer, in words for whoever exports it."""
    found = []
    if (form := _normalizer(json.loads(tokenizer.to_json()))) and form != "none":
        found.append(f"llama.cpp does not bring text to {form}: text in another form gets other ids there")
    if tokenizer.specials.add_bos and not adds_bos(tokenizer):
        found.append(
            "chats of this model begin without bos, so llama.cpp is told not to add it; put it before plain prompts"
        )
    return found


def adds_bos(tokenizer: Tokenizer) -> bool:
    """Whether llama.cpp shall put bos before a text. It would do so before a chat too, where the template may not."""
    if not tokenizer.specials.add_bos or tokenizer.chat_template is None:
        return tokenizer.specials.add_bos
    try:
        return chat_ids(tokenizer, [{"role": "user", "content": "Hello"}])[:1] == [tokenizer.bos_id]
    except (DataError, ModelError):  # a template that wants more than a question
        return tokenizer.specials.add_bos


def _tokens(content: Mapping[str, Any], rows: int, known: Mapping[str, int]) -> tuple[list[str], list[int]]:
    """The spelling and the type of every row; those without a token are called [PAD…], as by llama.cpp's converter."""
    spelt = {id: token for token, id in content["model"]["vocab"].items()}
    types = {id: known.get(token, NORMAL) for id, token in spelt.items()}
    for added in content["added_tokens"]:
        spelt[added["id"]] = added["content"]
        usual = CONTROL if added["special"] else USER_DEFINED
        types[added["id"]] = UNKNOWN if known.get(added["content"]) == UNKNOWN else usual
    taken = set(spelt.values())
    for id in range(rows):
        if id not in spelt:
            name = f"[PAD{id}]"
            while name in taken:  # every name may occur once
                name += "_"
            spelt[id] = name
            taken.add(name)
    return [spelt[id] for id in range(rows)], [types.get(id, UNUSED) for id in range(rows)]


def _byte_level(content: Mapping[str, Any], cuts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    model = content["model"]
    form = _normalizer(content)
    if form is None:
        raise ModelError(f"llama.cpp has no normalizer {content['normalizer']['type']}: {OTHERWISE}")
    name, usual = _pre_name(cuts, bool(model.get("ignore_merges")), form)
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    found = {"model": "gpt2", "pre": name, "merges": [f"{left} {right}" for left, right in pairs]}
    more = {} if form == usual else {NORMALIZER: form}
    return {f"tokenizer.ggml.{key}": value for key, value in found.items()} | more


def _pre_name(cuts: Sequence[Mapping[str, Any]], whole: bool, form: str) -> tuple[str, str]:
    """llama.cpp's name for these cuts, and the normal form that the table says of it."""
    text = resources.files("langmill.families").joinpath("pretokenizers.yaml").read_text("utf-8")
    table = yaml.safe_load(text)
    ours = [_spelt(pattern) for cut in cuts for pattern in _patterns(cut, table["patterns"]["gpt-2"])]
    fits = [
        (name, entry.get("normalizer", "none"))
        for name, entry in table["names"].items()
        if [_spelt(pattern) for pattern in table["patterns"][entry["use"]]] == ours
        and bool(entry.get("whole")) == whole
    ]
    if not fits:
        shown = ", ".join(repr(pattern) for pattern in ours) or "none at all"
        raise ModelError(f"llama.cpp knows no pre-tokenizer with these cuts ({shown:.300}): {OTHERWISE}")
    return next((fit for fit in fits if fit[1] == form), fits[0])


def _patterns(cut: Mapping[str, Any], own: Sequence[str]) -> list[str]:
    """The expressions, as in pretokenizers.yaml, that cut as one step of a pre-tokenizer does. own: ByteLevel's."""
    match cut:
        case {"type": "ByteLevel"} if not cut.get("add_prefix_space"):
            return list(own) if cut.get("use_regex", True) else []
        case {"type": "Digits"}:
            return [r"\p{N}" if cut.get("individual_digits") else r"\p{N}+"]
        case {"type": "Split", "pattern": {"Regex": str(pattern)}}:
            # "removed" and inverted keeps the matches alone, and these patterns match all of a text
            if (cut["behavior"], cut["invert"]) in (("Isolated", False), ("Removed", True)):
                return [pattern]
        case {"type": "Split", "pattern": {"String": str(text)}, "behavior": "Isolated", "invert": False}:
            return [re.escape(text)]
    shown = json.dumps(cut, ensure_ascii=False)
    raise ModelError(f"llama.cpp cuts text by expressions, and not as {shown:.200} does: {OTHERWISE}")


def _spelt(pattern: str) -> str:
    r"""A pattern with \x{4e00} and the like as the characters that they stand for."""
    return re.sub(r"\\x\{([0-9a-fA-F]+)\}", lambda found: chr(int(found[1], 16)), pattern)


def _normalizer(content: Mapping[str, Any]) -> str | None:
    """The normal form of Unicode that text is brought to, "none", or None where it is something else."""
    steps = list(_steps(content["normalizer"], "normalizers"))
    forms = [step["type"] for step in steps if step["type"] in ("NFC", "NFD", "NFKC", "NFKD")]
    if not steps:
        return "none"
    return forms[0] if len(forms) == len(steps) == 1 else None


def _steps(node: Mapping[str, Any] | None, inside: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a pipeline in order, sequences opened."""
    if node is None:
        return
    if node["type"] == "Sequence":
        for step in node[inside]:
            yield from _steps(step, inside)
    else:
        yield node


def _sentencepiece(
    content: Mapping[str, Any], cuts: Sequence[Mapping[str, Any]], tokens: Sequence[str], types: Sequence[int]
) -> dict[str, Any]:
    steps = [*_steps(content["normalizer"], "normalizers")]
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prefixed = steps == [{"type": "Prepend", "prepend": SPACE}, spaces]
    apart = [
        (cut["type"], cut.get("replacement"), cut.get("prepend_scheme"), cut.get("split")) for cut in cuts
    ]
    plain = (steps == [spaces] and not cuts) or (
        not steps and apart == [("Metaspace", SPACE, "never", False)]
    )
    if not (prefixed and not cuts) and not plain:
        shown = json.dumps([*steps, *cuts], ensure_ascii=False)
        raise ModelError(
            f"llama.cpp writes spaces as SentencePiece does, and not as {shown:.200} does: {OTHERWISE}"
        )
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in content["model"]["merges"]]
    found = {
        "model": "llama", "pre": "default", "scores": _scores(pairs, tokens, types), "add_space_prefix": prefixed,
    }  # fmt: skip
    return {f"tokenizer.ggml.{key}": value for key, value in found.items()}


def _scores(pairs: Sequence[Sequence[str]], tokens: Sequence[str], types: Sequence[int]) -> list[float]:
    """Scores by which the pieces join in the order of the merges. ModelError where no scores can say that order."""
    pieces = {token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    if max(map(len, pieces), default=0) > MAX_PIECE:
        raise ModelError(f"a token has more than {MAX_PIECE} characters: {OTHERWISE}")
    joins = [(left, right) for left, right in pairs if left + right in pieces]
    order = [piece for piece, _ in groupby(left + right for left, right in joins)]
    ways = {
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    }
    if len(set(order)) < len(order) or ways != {(left, right) for left, right in joins}:
        raise ModelError(
            f"the merges of this tokenizer are not those of SentencePiece, which scores give: {OTHERWISE}"
        )
    ranks = {piece: rank for rank, piece in enumerate(order)}
    others = (len(order) + place for place in range(len(tokens)))  # no pair joins to these
    return [
        -float(ranks[token] if token in ranks else next(others)) if kind == NORMAL else 0.0
        for token, kind in zip(tokens, types, strict=True)
    ]


def _specials(tokenizer: Tokenizer) -> dict[str, Any]:
    """The ids that begin, end and pad, what is put before a text, and the chat template."""
    stops = sorted(tokenizer.stop_ids)
    eos = tokenizer.eos_id if tokenizer.eos_id is not None else next(iter(stops), None)
    if eos is None:
        raise ModelError(
            "this tokenizer names no token that ends a text, and llama.cpp would take one of its own choice: name an "
            "eos_token in tokenizer_config.json"
        )
    others = [id for id in stops if id != eos]
    unnamed = [
        id for id in others if tokenizer.token(id) not in ENDS
    ]  # the named ones llama.cpp finds itself
    if len(unnamed) > 2:
        shown = ", ".join(repr(tokenizer.token(id)) for id in unnamed)
        raise ModelError(f"a GGUF file has room for two tokens that end a turn beside eos, not for {shown}")
    template = tokenizer.chat_template or ""
    turns = [id for id in others if tokenizer.token(id) in TURN_ENDS and str(tokenizer.token(id)) in template]
    eot, eom = (*(unnamed or turns[:1]), None, None)[:2]
    ids = {
        "bos": tokenizer.bos_id, "eos": eos, "eot": eot, "eom": eom, "padding": tokenizer.pad_id,
        "mask": tokenizer.mask_id, "unknown": _unknown(tokenizer),
    }  # fmt: skip
    found: dict[str, Any] = {f"{name}_token_id": id for name, id in ids.items() if id is not None}
    found |= {"add_bos_token": adds_bos(tokenizer), "add_eos_token": False}
    more: dict[str, Any] = {"tokenizer.chat_template": template} if template else {}
    if tokenizer.specials.add_bos and not found["add_bos_token"]:
        more[ADD_BOS] = True
    return {f"tokenizer.ggml.{key}": value for key, value in found.items()} | more


def _unknown(tokenizer: Tokenizer) -> int | None:
    model = json.loads(tokenizer.to_json())["model"]
    return tokenizer.vocab.get(model["unk_token"]) if model.get("unk_token") else None
