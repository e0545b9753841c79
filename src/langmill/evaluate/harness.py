"""EleutherAI's lm-evaluation-harness drives our models: its tasks, prompts and figures, our weights and kernels.

    from lm_eval import simple_evaluate
    simple_evaluate(model=harness_model(*langmill.load("model")), tasks=["piqa"])

`Harness` answers the three kinds of request of `lm_eval.api.model.LM`; `harness_model` joins it with that class, which
is imported there only (extra: harness).
"""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from langmill.common.errors import MissingExtra
from langmill.evaluate.choices import answered, question
from langmill.families.folder import Model
from langmill.infer.choices import Question, longest
from langmill.infer.generate import generate_pieces
from langmill.infer.sampling import Sampling
from langmill.text.tokenizer import Tokenizer

LONGEST_ANSWER = 256  # tokens, where a task names no number, as in the harness


def harness_model(model: Model, tokenizer: Tokenizer, batch_size: int = 8) -> Any:
    """An `lm_eval.api.model.LM` over one of our models; MissingExtra where lm_eval is not installed."""
    try:
        base = importlib.import_module("lm_eval.api.model").LM
    except ImportError:
        raise MissingExtra("harness", "lm_eval") from None
    made: Any = type("LangmillLM", (Harness, base), {"__init__": base.__init__})()
    made.set_up(model, tokenizer, batch_size)
    return made


class Harness:
    """The requests of the harness. `requests` have `args`; results come in their order. batch_size: contexts a pass."""

    def set_up(self, model: Model, tokenizer: Tokenizer, batch_size: int = 8) -> None:
        """Which model answers."""
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether greedy decoding gives it) of args (context, continuation).

        Requests with one context are answered together. Of a context that is too long the beginning is left out.
        """
        groups: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[request.args[0]].append(number)
        most = longest(self.model)
        asked = [
            question(self.tokenizer, context, [requests[i].args[1] for i in own], most)
            for context, own in groups.items()
        ]
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for own, answers in zip(groups.values(), answered(self.model, asked, self.batch_size), strict=True):
            for i, answer in zip(own, answers, strict=True):
                found[i] = (answer.log, answer.greedy)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of the whole of each text, args (text,), in windows whose last one looks back as far as it
        can; the start token comes before the first."""
        asked: list[Question] = []
        owners = []
        for number, request in enumerate(requests):
            for window in self._windows(self.tokenizer.encode(request.args[0])):
                asked.append(window)
                owners.append(number)
        found = [0.0] * len(requests)
        for owner, (answer,) in zip(owners, answered(self.model, asked, self.batch_size), strict=True):
            found[owner] += answer.log
        return found

    def _windows(self, ids: list[int]) -> list[Question]:
        """(context, [what it is asked of]) so that every id is asked once."""
        size = longest(self.model) or max(1, len(ids))
        before = [self.tokenizer.start_id, *ids]
        made: list[Question] = []
        for at in range(0, len(ids), size):
            end = min(at + size, len(ids))
            start = max(0, end - size)  # of the inputs, which are `before[start:end]`
            made.append((before[start : at + 1], [ids[at:end]]))
        return made

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after args (context, {"until", "max_gen_toks", "do_sample", "temperature", …})."""
        groups: dict[Sampling, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[sampling(request.args[1])].append(number)
        texts = [""] * len(requests)
        for how, own in groups.items():
            prompts = {i: self._prompt(requests[i].args[0], how.max_new_tokens) for i in own}
            own.sort(key=lambda i: -len(prompts[i]))
            for at in range(0, len(own), self.batch_size):
                group = own[at : at + self.batch_size]
                for step in generate_pieces(self.model, self.tokenizer, [prompts[i] for i in group], how):
                    for piece in step:
                        texts[group[piece.row]] += piece.text
        return texts

    def _prompt(self, context: str, new: int) -> list[int]:
        ids, most = self.tokenizer.prompt_ids(context), longest(self.model)
        return ids if most is None else ids[-max(1, most + 1 - new) :]

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's caches."""
        return self.tokenizer.fingerprint


def sampling(asked: dict[str, Any]) -> Sampling:
    """The harness's keywords as ours; greedy unless `do_sample`."""
    until = asked.get("until") or ()
    free = bool(asked.get("do_sample")) and float(asked.get("temperature", 1.0)) > 0
    return Sampling(
        max_new_tokens=int(asked.get("max_gen_toks", asked.get("max_tokens", LONGEST_ANSWER))),
        temperature=float(asked.get("temperature", 1.0)) if free else 0.0,
        top_p=float(asked.get("top_p", 1.0)) if free else 1.0,
        stop=(until,) if isinstance(until, str) else tuple(text for text in until if text),
    )
