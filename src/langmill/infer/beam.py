"""Beam search: the likeliest whole answers instead of the likeliest next token (Sutskever et al. 2014, section 3.2).

Scores, finished answers and the end follow transformers' `generate(num_beams=…)`, so that the same weights give the
same answers: a finished answer counts its summed log-probability divided by its length, the end included, to the power
of `length_penalty` (Wu et al. 2016, arXiv:1609.08144, eq. 14, in its simple form). So do the rules of a model's
generation_config.json: what it never writes, and what it begins and ends with.

B sentences, K beams of each, C candidates, V vocabulary, T tokens written.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from langmill.common.errors import ModelError, UsageError
from langmill.families.generation import Writing, rules_of
from langmill.model.cache import BeamCache
from langmill.model.transformer import Memory, Transformer


@dataclass(frozen=True)
class Hypothesis:
    """An answer: its ids without start and end, its score, and whether it ended by itself."""

    ids: list[int]
    score: float
    ended: bool


@dataclass
class _Sentence:
    """What is finished of one sentence: the best `keep` answers, and whether nothing better can come."""

    keep: int
    found: list[Hypothesis] = field(default_factory=list)
    done: bool = False

    def add(self, one: Hypothesis) -> None:
        self.found = sorted([*self.found, one], key=lambda h: -h.score)[: self.keep]

    @property
    def worst(self) -> float:
        return self.found[-1].score if len(self.found) == self.keep else -float("inf")


@torch.no_grad()
def beam_search(
    model: Transformer,
    sources: Sequence[Sequence[int]],
    *,
    stops: Collection[int],
    beams: int = 5,
    n_best: int = 1,
    length_penalty: float = 1.0,
    max_new_tokens: int = 256,
    early_stopping: bool | str = False,
    rules: Writing | None = None,
) -> list[list[Hypothesis]]:
    """The n_best answers of an encoder-decoder to each source, best first.

    sources: ids with all that stands around them. stops: ids that end an answer. early_stopping: a sentence is done
    when `beams` answers are; otherwise when no running one can beat the worst of them, "never": were it the longest.
    rules: what may be written, None for those that the model came with; their beams, penalty, early and most are the
    caller's to take. ModelError for a model that does not read before it writes, a source longer than it can read, or
    rules that leave nothing to write; UsageError where n_best exceeds beams.
    """
    config = model.config
    if config.encoder_input is None or config.decoder_input is None or config.decoder_input.start is None:
        raise ModelError(
            "this model cannot translate: it has no encoder, or does not say how an answer starts"
        )
    if not 1 <= n_best <= beams:
        raise UsageError(f"n_best is {n_best}: it must be from 1 to beams, {beams}")
    longest = max(map(len, sources), default=0)
    if longest > config.encoder_input.length or not all(sources):
        raise ModelError(
            f"a source has {longest or 'no'} tokens; this model reads 1 to {config.encoder_input.length}"
        )
    if not sources:
        return []
    device = model.main.like.device
    tokens_BS = torch.zeros(len(sources), longest, dtype=torch.long, device=device)
    documents_BS = torch.zeros_like(tokens_BS, dtype=torch.int32)
    for row, ids in enumerate(sources):
        tokens_BS[row, : len(ids)], documents_BS[row, : len(ids)] = torch.tensor(ids, device=device), 1
    memory = model.encode(tokens_BS, documents_BS)
    if bool((documents_BS > 0).all()):
        memory = Memory(memory.states_BSD, None)
    limit = min(max_new_tokens, config.decoder_input.length - 1)
    rules, start = rules_of(model) if rules is None else rules, config.decoder_input.start
    bans = _Bans(rules, frozenset(stops), start, limit, device) if rules.bans else None
    search = _Search(model, memory, beams, length_penalty, early_stopping, frozenset(stops), limit, bans)
    return [found[:n_best] for found in search.run(start)]


class _Bans:
    """What a model's rules make of log-probabilities, in transformers' order. An n-gram counts the start too.

    N n-grams or sequences that have a last id L; the ids before it are P.
    """

    def __init__(
        self, rules: Writing, stops: frozenset[int], start: int, limit: int, device: torch.device
    ) -> None:
        self.rules, self.start, self.limit = rules, start, limit
        self.stops = torch.tensor(sorted(stops), dtype=torch.long, device=device)
        banned = [one for one in rules.banned if len(one) > 1 or one[0] not in stops]
        self.never = torch.tensor(
            [one[0] for one in banned if len(one) == 1], dtype=torch.long, device=device
        )
        sizes = sorted({len(one) for one in banned} - {1})
        self.after = [torch.tensor([o for o in banned if len(o) == size], device=device) for size in sizes]

    def apply(self, logs_BKV: Tensor, written_BKT: Tensor, step: int) -> Tensor:
        """Ban in place what may not come as token number `step`."""
        rules = self.rules
        logs_BKV[:, :, self.never] = -torch.inf
        if rules.once or self.after:
            first_BK1 = written_BKT.new_full((*written_BKT.shape[:2], 1), self.start)
            self._sequences(logs_BKV, torch.cat((first_BK1, written_BKT), dim=2))
        if step < rules.least:
            logs_BKV[:, :, self.stops] = -torch.inf
        if rules.first is not None and step == 1:
            logs_BKV.fill_(-torch.inf)[:, :, rules.first] = 0.0
        if rules.last and step == self.limit:
            logs_BKV.fill_(-torch.inf)[:, :, list(rules.last)] = 0.0
        return (
            logs_BKV.log_softmax(2).nan_to_num_(nan=-torch.inf, neginf=-torch.inf)
            if rules.again
            else logs_BKV
        )

    def _sequences(self, logs_BKV: Tensor, ids_BKT: Tensor) -> None:
        size, length = self.rules.once, ids_BKT.shape[2]
        if 0 < size <= length:
            before_BKP, all_BKNL = ids_BKT[:, :, length + 1 - size :], ids_BKT.unfold(2, size, 1)
            again_BKN = (all_BKNL[..., :-1] == before_BKP[:, :, None]).all(3)
            _ban(logs_BKV, all_BKNL[..., -1], again_BKN)
        for after_NL in self.after:
            size = after_NL.shape[1]
            if size <= length + 1:
                match_BKN = (ids_BKT[:, :, None, length + 1 - size :] == after_NL[:, :-1]).all(3)
                _ban(logs_BKV, after_NL[:, -1].expand(match_BKN.shape), match_BKN)


def _ban(logs_BKV: Tensor, ids_BKN: Tensor, where_BKN: Tensor) -> None:
    least_BKN = torch.full(where_BKN.shape, torch.inf, device=logs_BKV.device).masked_fill_(
        where_BKN, -torch.inf
    )
    logs_BKV.scatter_reduce_(2, ids_BKN, least_BKN, "amin")


class _Search:
    """One batch of sentences. Those that are done leave it, so that the rest does not wait for them."""

    def __init__(
        self,
        model: Transformer,
        memory: Memory,
        beams: int,
        penalty: float,
        early: bool | str,
        stops: frozenset[int],
        limit: int,
        bans: _Bans | None,
    ):
        self.model, self.memory, self.beams, self.penalty, self.early = model, memory, beams, penalty, early
        self.limit, self.bans, count = limit, bans, len(memory.states_BSD)
        device = memory.states_BSD.device
        self.stops = torch.tensor(sorted(stops), dtype=torch.long, device=device)
        self.all = [_Sentence(beams) for _ in range(count)]
        self.running = list(range(count))  # which sentences the rows still hold
        self.written_BKT = torch.zeros(count, beams, 0, dtype=torch.long, device=device)
        # only the first beam counts at the start: the others are the same
        self.scores_BK = torch.full((count, beams), -torch.inf, device=device)
        self.scores_BK[:, 0] = 0.0
        dtype = memory.states_BSD.dtype
        self.cache = BeamCache(model.config.main, count, beams, limit + 1, dtype, device)

    def run(self, start: int) -> list[list[Hypothesis]]:
        last_BK = torch.full(self.scores_BK.shape, start, device=self.scores_BK.device)
        for step in range(1, self.limit + 1):
            hidden_BKD = self.model.hidden(last_BK, memory=self.memory, cache=self.cache)
            logs_BKV = torch.log_softmax(self.model.logits(hidden_BKD).float(), dim=2)
            if self.bans is not None:
                logs_BKV = self.bans.apply(logs_BKV, self.written_BKT, step)
            last_BK = self._step(logs_BKV, step)
            if not self.running:
                break
        for place, sentence in enumerate(self.running):
            self._cut_off(self.all[sentence], place)
        if not all(sentence.found for sentence in self.all):
            raise ModelError("what the model's generation_config.json bans leaves no token to write")
        return [sentence.found for sentence in self.all]

    def _step(self, logs_BKV: Tensor, step: int) -> Tensor:
        """Take the best ways to go on; the ids that they end with."""
        # even if all the best end, enough go on; none but a beam's own best can be among the best of all
        wanted = min(self.beams * max(2, 1 + len(self.stops)), logs_BKV.shape[2])
        best_BKC, ids_BKC = logs_BKV.topk(wanted, dim=2)
        scores_BC, places_BC = (best_BKC + self.scores_BK[:, :, None]).flatten(1).topk(wanted, dim=1)
        from_BC, id_BC = places_BC // wanted, ids_BKC.flatten(1).gather(1, places_BC)
        stop_BC = torch.isin(id_BC, self.stops)
        for place, rank in stop_BC[:, : self.beams].nonzero().tolist():
            self._finish(place, int(from_BC[place, rank]), float(scores_BC[place, rank]), step)
        # the best that go on: sort by (ends, rank), keeping rank's order
        order_BK = stop_BC.int().argsort(dim=1, stable=True)[:, : self.beams]
        self.scores_BK = scores_BC.gather(1, order_BK).masked_fill(stop_BC.gather(1, order_BK), -torch.inf)
        self._check_done(step)
        return self._go_on(from_BC.gather(1, order_BK), id_BC.gather(1, order_BK))

    def _finish(self, place: int, beam: int, score: float, step: int) -> None:
        sentence = self.all[self.running[place]]
        if not sentence.done and score > -float("inf"):
            ids = self.written_BKT[place, beam].tolist()
            forced = self.bans is not None and bool(self.bans.rules.last) and step == self.limit
            sentence.add(Hypothesis(ids, score / step**self.penalty, not forced))

    def _check_done(self, step: int) -> None:
        length = self.limit if self.early == "never" and self.penalty > 0 else step
        best = (self.scores_BK[:, 0] / length**self.penalty).tolist()
        for place, number in enumerate(self.running):
            sentence = self.all[number]
            full = len(sentence.found) == self.beams
            sentence.done = full and (self.early is True or sentence.worst >= best[place])

    def _go_on(self, from_BK: Tensor, ids_BK: Tensor) -> Tensor:
        """Let beams go on from others, and the sentences that are done go."""
        self.cache.descend(from_BK)
        written_BKT = self.written_BKT.gather(1, from_BK[:, :, None].expand(self.written_BKT.shape))
        self.written_BKT = torch.cat((written_BKT, ids_BK[:, :, None]), dim=2)
        left = [place for place, number in enumerate(self.running) if not self.all[number].done]
        if len(left) == len(self.running):
            return ids_BK
        kept_B = torch.tensor(left, dtype=torch.long, device=ids_BK.device)
        self.running = [self.running[place] for place in left]
        self.scores_BK, self.written_BKT = self.scores_BK[kept_B], self.written_BKT[kept_B]
        states_BSD, documents_BS = self.memory.states_BSD, self.memory.documents_BS
        self.memory = Memory(states_BSD[kept_B], None if documents_BS is None else documents_BS[kept_B])
        if left:
            self.cache.select(kept_B)
        return ids_BK[kept_B]

    def _cut_off(self, sentence: _Sentence, place: int) -> None:
        """At the limit the running answers count as they are."""
        length = self.written_BKT.shape[2]
        for beam, score in enumerate(self.scores_BK[place].tolist()):
            if score > -float("inf"):
                ids = self.written_BKT[place, beam].tolist()
                sentence.add(Hypothesis(ids, score / length**self.penalty, False))
