"""What a tokenizer.json does not say: which ids begin, end, pad and mask a text, and how chats are written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer as Backend

from langmill.common.errors import ModelError
from langmill.text.training import MASK

if TYPE_CHECKING:
    from langmill.text.tokenizer import Tokenizer

# Tokens that end a document, those that end a turn, and what a bare tokenizer.json may hold.
BOUNDARIES = ("<|endoftext|>", "<|end_of_text|>")
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<turn|>", "<|end|>")
_GUESSES = {
    "bos_token": ("<s>", "<|begin_of_text|>", "<bos>", "[CLS]"),
    "eos_token": (*BOUNDARIES, "</s>", "<eos>", "<|im_end|>", "[SEP]"),
    "pad_token": ("<|pad|>", "<pad>", "[PAD]"),
    "mask_token": ("[MASK]", "<mask>", MASK),
}
_KEPT = ("cls_token", "sep_token", "unk_token")  # named beside those above in a BERT folder


@dataclass(frozen=True, slots=True)
class Specials:
    """What a tokenizer.json does not say: which ids begin, end, pad and mask, and how chats are written.

    `add_bos`: a sequence starts with `bos`. `stops`: ids that end generation, beside `eos` and the
    boundary. `config`: the rest of tokenizer_config.json, kept for `save`. `target`: what cuts the
    language that a translator writes, where that has a list of pieces of its own over the same ids.
    """

    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    add_bos: bool = False
    stops: frozenset[int] = frozenset()
    chat_template: str | None = None
    config: Mapping[str, Any] | None = None
    mask: int | None = None
    target: Tokenizer | None = None


def starts_with(backend: Backend, bos: int | None) -> bool:
    try:
        return bos is not None and backend.encode("a").ids[:1] == [bos]
    except BaseException as error:  # where the file has holes the library panics, with what is no Exception
        raise ModelError(f"it is damaged: {error}") if "Panic" in type(error).__name__ else error from None


def read_specials(backend: Backend, folder: Path | None) -> Specials:
    """The special ids and chat template of `folder`; None guesses them from the vocabulary."""
    config = _json(folder, "tokenizer_config.json")
    names = _json(folder, "special_tokens_map.json") | config

    def id_of(key: str) -> int | None:
        named = names.get(key)
        content = named.get("content") if isinstance(named, dict) else named
        if not isinstance(content, str | None):
            raise ModelError(f"its {key} is {named!r}, not a token")
        if content is not None:
            id: int | None = backend.token_to_id(content)
            if id is None and key == "eos_token":
                raise ModelError(f'its eos_token is "{content}", which the vocabulary does not hold')
            return id
        guesses = () if key in names else _GUESSES[key]
        return next((id for token in guesses if (id := backend.token_to_id(token)) is not None), None)

    bos, eos, pad, mask = (id_of(f"{name}_token") for name in ("bos", "eos", "pad", "mask"))
    ends = (_json(folder, f"{name}.json").get("eos_token_id") for name in ("generation_config", "config"))
    stops = next((stop for stop in ends if stop is not None), None)
    stops = stops if isinstance(stops, list) else [stops]
    size = max(backend.get_vocab().values(), default=-1) + 1
    dropped = ("auto_map", "chat_template", "added_tokens_decoder", "name_or_path")
    added = config.get("add_bos_token")
    kept = {key: names[key] for key in _KEPT if names.get(key) is not None}
    kept |= {key: value for key, value in config.items() if key not in dropped}
    return Specials(
        bos=bos,
        eos=eos,
        pad=pad,
        add_bos=starts_with(backend, bos) if added is None else bool(added) and bos is not None,
        stops=frozenset(id for id in stops if isinstance(id, int) and 0 <= id < size),
        chat_template=_template(folder, config.get("chat_template")),
        config=kept or None,
        mask=mask,
    )


def _json(folder: Path | None, name: str) -> dict[str, Any]:
    if folder is None or not (folder / name).is_file():
        return {}
    try:
        value = json.loads((folder / name).read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{folder / name} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{folder / name} holds no JSON object")
    return value


def _template(folder: Path | None, named: object) -> str | None:
    """The chat template: its own file first; of several named ones the default."""
    if folder is not None and (folder / "chat_template.jinja").is_file():
        try:
            return (folder / "chat_template.jinja").read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ModelError(f"{folder / 'chat_template.jinja'} is not UTF-8: {error}") from None
    if isinstance(named, list):
        entries = {entry.get("name"): entry.get("template") for entry in named if isinstance(entry, dict)}
        named = entries.get("default", next(iter(entries.values()), None))
    return named if isinstance(named, str) else None
