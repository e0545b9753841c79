"""How a model that writes about what it reads is to be searched: `generation_config.json`, or an old `config.json`.

Names and meanings are transformers' GenerationConfig's. Where there is a generation_config.json it alone counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from langmill.common.errors import ModelError
from langmill.model.config import ModelConfig
from langmill.model.recurrent import LSTM
from langmill.model.transformer import Transformer

FILE = "generation_config.json"
_FOLLOWED = (
    "bad_words_ids", "suppress_tokens", "no_repeat_ngram_size", "min_length", "min_new_tokens", "max_length",
    "max_new_tokens", "forced_bos_token_id", "forced_eos_token_id", "renormalize_logits", "num_beams", "length_penalty",
    "early_stopping",
)  # fmt: skip
# what would change the answers and is not followed, with the values at which it does nothing
_IDLE: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1,), "encoder_repetition_penalty": (1,), "encoder_no_repeat_ngram_size": (0,),
    "sequence_bias": ([], {}), "begin_suppress_tokens": ([],), "exponential_decay_length_penalty": (),
    "guidance_scale": (1,), "num_beam_groups": (1,), "diversity_penalty": (0,), "penalty_alpha": (0,),
    "force_words_ids": ([],), "constraints": ([],), "do_sample": (False,), "watermarking_config": (),
    "stop_strings": ([],),
}  # fmt: skip


@dataclass(frozen=True)
class Writing:
    """The rules by which answers are written; the plain one has none.

    banned: sequences of ids that are never completed. once: an n-gram of so many ids is written once, 0: any number
    of times. least: the place, the start counted, before which no answer ends. first: the id that an answer begins
    with. last: the ids that it ends with at the limit. again: what bans leave is made to add up to 1. beams, penalty,
    early ("never": only where no better answer can come at all), most (new tokens): what holds where the caller does
    not choose, None: nothing said. kept: the file's own words, for the next folder. unfollowed: what is
    said and not done.
    """

    banned: tuple[tuple[int, ...], ...] = ()
    once: int = 0
    least: int = 0
    first: int | None = None
    last: tuple[int, ...] = ()
    again: bool = False
    beams: int | None = None
    penalty: float | None = None
    early: bool | str = False
    most: int | None = None
    kept: Mapping[str, Any] = field(default_factory=dict)
    unfollowed: tuple[str, ...] = ()

    @property
    def bans(self) -> bool:
        """Whether it changes what is likely."""
        return (
            bool(self.banned or self.once or self.least > 1 or self.last or self.again)
            or self.first is not None
        )


def settings_of(folder: Path, theirs: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the folder says of writing; ModelError where its file is broken."""
    path = folder / FILE
    if not path.is_file():
        return theirs
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as reason:
        raise ModelError(f"{path} cannot be read as JSON: {reason}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds no JSON object")
    return found


def started(theirs: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration whose decoder starts as the file says, which counts where the two differ."""
    start = said.get("decoder_start_token_id")
    return {**theirs, **({"decoder_start_token_id": start} if isinstance(start, int) else {})}


def attach(model: Transformer | LSTM, said: Mapping[str, Any], where: Path) -> None:
    """Let an encoder-decoder that writes know its rules, which go with it into the folders that are made of it."""
    c = model.config
    if isinstance(c, ModelConfig) and c.encoder and c.decoder and c.head and c.head.task == "text":
        try:
            vars(model)["writing"] = writing(said, c.vocab)
        except ModelError as error:
            raise ModelError(f"{where}, generation_config.json or config.json: {error}") from None


def rules_of(model: Transformer | LSTM) -> Writing:
    """The rules that a model came with."""
    found = vars(model).get("writing")
    return found if isinstance(found, Writing) else Writing()


def writing(said: Mapping[str, Any], vocab: int) -> Writing:
    """The rules in a file's words; ModelError names the word whose value is none."""
    kept = {name: said[name] for name in (*_FOLLOWED, *_IDLE) if said.get(name) is not None}
    banned = [tuple(_ids(kept, "bad_words_ids", vocab, one)) for one in _list(kept, "bad_words_ids")]
    banned += [(id,) for id in _ids(kept, "suppress_tokens", vocab)]
    new, most = _number(kept, "min_new_tokens"), _number(kept, "max_new_tokens")
    longest, beams = _number(kept, "max_length"), _number(kept, "num_beams")
    early = kept.get("early_stopping", False)
    if early not in (True, False, "never"):
        raise ModelError(f"early_stopping is {early!r}: it is true, false or never")
    first = _ids(kept, "forced_bos_token_id", vocab)
    return Writing(
        banned=tuple(dict.fromkeys(one for one in banned if one)),
        once=_number(kept, "no_repeat_ngram_size") or 0,
        least=new + 1 if new else _number(kept, "min_length") or 0,
        first=first[0] if first else None,
        last=tuple(_ids(kept, "forced_eos_token_id", vocab)),
        again=kept.get("renormalize_logits") is True,
        beams=beams or None,
        penalty=_real(kept, "length_penalty"),
        early=early,
        most=most or (longest - 1 if longest and longest > 1 else None),
        kept=kept,
        unfollowed=tuple(
            f"{name}={kept[name]}"[:80]
            for name, idle in _IDLE.items()
            if name in kept and kept[name] not in idle
        ),
    )


def _list(said: Mapping[str, Any], name: str) -> list[Any]:
    value = said.get(name, [])
    if not isinstance(value, list):
        raise ModelError(f"{name} is {value!r}, not a list"[:300])
    return value


def _ids(said: Mapping[str, Any], name: str, vocab: int, value: Any = None) -> list[int]:
    """An id or a list of them."""
    value = said.get(name, []) if value is None else value
    found = value if isinstance(value, list) else [value]
    for id in found:
        if type(id) is not int or not 0 <= id < vocab:
            raise ModelError(f"{name} holds {id!r}: ids are 0 to {vocab - 1}"[:300])
    return found


def _number(said: Mapping[str, Any], name: str) -> int | None:
    value = said.get(name)
    if value is not None and (type(value) is not int or value < 0):
        raise ModelError(f"{name} is {value!r}, not a number of 0 or more"[:300])
    return value


def _real(said: Mapping[str, Any], name: str) -> float | None:
    value = said.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ModelError(f"{name} is {value!r}, not a number"[:300])
    return value
