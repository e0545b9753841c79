"""Adapters beside the weights of a model that runs: many share one engine, and each costs what its own numbers do.

N tokens of a pass, W of them whose scores are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from langmill.families import peft
from langmill.families.folder import Model, check_match
from langmill.infer.runner import Ids, Runner
from langmill.text.tokenizer import Tokenizer


@runtime_checkable
class AdaptedRunner(Runner, Protocol):
    """A `Runner` of which each token may have another adapter. adapters: how many there are."""

    adapters: int

    def adapt(self, changes: Mapping[str, peft.LowRank]) -> int:
        """Keep an adapter; its number, from 1 on. changes: by the names of the model's layers."""

    def run(
        self, tokens_N: Ids, slots_N: Ids, places_N: Ids, wanted_W: Ids, adapters_N: Ids | None = None
    ) -> Tensor:
        """As `Runner.run`, with the number of each token's adapter, 0 for none; the tokens of a slot have the same."""


@dataclass(frozen=True)
class Adapter:
    """What an adapter changes, and the tokenizer of its texts."""

    changes: Mapping[str, peft.LowRank]
    tokenizer: Tokenizer

    @property
    def bytes(self) -> int:
        """Of its numbers."""
        return sum(one.a_RI.nbytes + one.b_OR.nbytes for one in self.changes.values())


def read(folder: Path, model: Model, tokenizer: Tokenizer) -> Adapter:
    """The adapter of a folder, for a model whose weights are still its own; it stays as it is.

    tokenizer: the model's, for an adapter without one or with an equal one. ModelError as `peft.load_adapter`.
    """
    changes = peft.low_ranks(model, folder)
    if (folder / "tokenizer.json").is_file():
        own = Tokenizer.load(folder)
        check_match(model.config, own, folder)
        tokenizer = _shared(own, tokenizer)
    return Adapter(changes, tokenizer)


def _shared(own: Tokenizer, usual: Tokenizer) -> Tokenizer:
    """A tokenizer that does as `own`: over `usual`'s vocabulary where that is the same, since a large one takes tens of
    megabytes."""
    if own.fingerprint != usual.fingerprint:
        return own
    if own.chat_template is not None and own.chat_template != usual.chat_template:
        usual = usual.with_template(own.chat_template)
    return usual if _ways(usual) == _ways(own) else own


def _ways(tokenizer: Tokenizer) -> tuple[Any, ...]:
    """What tokenizers of one vocabulary may differ in."""
    known = tokenizer.specials
    return known.bos, known.eos, known.pad, known.add_bos, tokenizer.stop_ids, tokenizer.chat_template
