"""Many questions in one pass are as each alone, and the harness's requests are answered by the same numbers."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from langmill.common.errors import MissingExtra, ModelError
from langmill.evaluate.choices import answered, chosen, question
from langmill.evaluate.harness import Harness, harness_model, sampling
from langmill.infer.choices import beginning, likelihoods
from langmill.infer.generate import generate
from langmill.infer.past import Past
from langmill.model.config import Head, ModelConfig, StackConfig, Tokens
from langmill.model.init import init_
from langmill.model.transformer import Transformer
from langmill.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["the cat sat on the mat and the dog ran off 猫坐在垫子上"] * 3, vocab_size=290)
LENGTH = 24


def make() -> Transformer:
    vocabulary = TOKENIZER.vocab_size
    made = Transformer(
        ModelConfig(StackConfig(32, 2, 4, 2, 8, 48), Tokens(vocabulary, LENGTH), head=Head(vocabulary))
    )
    init_(made, 0)
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(6 if weight.dim() > 1 else 1)
    return made.eval()


MODEL = make()
IDS = st.lists(st.integers(0, TOKENIZER.vocab_size - 1), min_size=1, max_size=8)
QUESTIONS = st.lists(st.tuples(IDS, st.lists(IDS, min_size=1, max_size=4)), min_size=1, max_size=6)


@settings(max_examples=25)
@given(QUESTIONS, st.integers(1, 8))
def test_company_changes_no_likelihood(asked: list[Any], rows: int) -> None:
    for (context, going), own in zip(asked, answered(MODEL, asked, rows), strict=True):
        for found, alone in zip(own, likelihoods(MODEL, context, going), strict=True):
            assert found.log == pytest.approx(alone.log, abs=1e-4)
            assert (found.tokens, found.greedy) == (alone.tokens, alone.greedy)


def test_a_pass_is_bounded_by_the_cache_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = [([1, 2, 3, n], [[n], [n, 5], [6, n]]) for n in range(9)]
    sizes: list[int] = []
    free = answered(MODEL, asked, 8, sizes.append)
    monkeypatch.setattr("langmill.evaluate.choices.PLACES", 40)
    tight = answered(MODEL, asked, 8, sizes.append)
    assert sizes[:2] == [8, 1] and sum(sizes[2:]) == 9 and max(sizes[2:]) == 2
    for own, other in zip(free, tight, strict=True):
        assert [one.log for one in own] == pytest.approx([one.log for one in other], abs=1e-4)


@settings(max_examples=25)
@given(IDS, QUESTIONS, st.integers(1, 8))
def test_a_common_beginning_changes_no_likelihood(before: list[int], asked: list[Any], rows: int) -> None:
    asked = [(before + context, going) for context, going in asked]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("langmill.infer.choices.LEAST", 1)
        past = Past()
        twice = [answered(MODEL, asked, rows, past=past) for _ in range(2)]
        shared = beginning([context for context, _ in asked])
        assert len(past.ids) == shared and past.ids == asked[0][0][:shared]
    for (context, going), *found in zip(asked, *twice, strict=True):
        alone = [one.log for one in likelihoods(MODEL, context, going)]
        for own in found:
            assert [one.log for one in own] == pytest.approx(alone, abs=1e-4)


def test_the_two_ways_to_choose_by_hand() -> None:
    assert chosen([-6.0, -8.0], ["abc", "abcdefgh"]) == (0, 1)  # -6/3 = -2, -8/8 = -1
    assert chosen([-1.0, -1.0], ["a", "b"]) == (0, 0)


def test_a_long_context_loses_its_beginning_and_a_long_choice_is_refused() -> None:
    context, going = question(TOKENIZER, "the cat sat " * 20, [" on", " off the mat"], LENGTH)
    whole, _ = question(TOKENIZER, "the cat sat " * 20, [" on"], None)
    assert len(context) + max(map(len, going)) - 1 == LENGTH and list(whole[-len(context) :]) == list(context)
    assert answered(MODEL, [(context, going)])
    with pytest.raises(ModelError, match="exceeds the model's 24"):
        question(TOKENIZER, "the", [" cat sat xyz 123" * 20], LENGTH)


def request(*args: Any) -> SimpleNamespace:
    return SimpleNamespace(args=args)


def harness() -> Harness:
    made = Harness()
    made.set_up(MODEL, TOKENIZER, 2)
    return made


def plain(ids: list[int], scored: int) -> float:
    """The log-probability of the last `scored` of the ids, by one forward pass."""
    with torch.inference_mode():
        logs = torch.log_softmax(MODEL(torch.tensor([ids]))[0, :-1], dim=-1)
    return float(logs[-scored:].gather(1, torch.tensor(ids[-scored:])[:, None]).sum())


def test_loglikelihood_is_that_of_the_plain_forward_pass_in_the_order_of_the_requests() -> None:
    asked = [("the cat", " sat"), ("the dog", " ran off"), ("the cat", " 坐"), ("", "the mat")]
    for (context, more), (log, greedy) in zip(
        asked, harness().loglikelihood([request(*one) for one in asked]), strict=True
    ):
        before = TOKENIZER.prompt_ids(context)
        ids = TOKENIZER.encode(context + more)[len(TOKENIZER.encode(context)) :]
        assert log == pytest.approx(plain(before + ids, len(ids)), abs=1e-4)
        logits = MODEL(torch.tensor([before + ids]))[0, len(before) - 1 : -1]
        assert greedy == (logits.argmax(-1).tolist() == ids)


def test_rolling_asks_every_token_once_and_the_last_window_looks_back_as_far_as_it_can() -> None:
    texts = ["the cat", "the cat sat on the mat and the dog ran off 猫 " * 3, ""]
    found = harness().loglikelihood_rolling([request(text) for text in texts])
    ids = [TOKENIZER.start_id, *TOKENIZER.encode(texts[1])]
    assert len(ids) > LENGTH + 1
    expected, at = plain(ids[: LENGTH + 1], LENGTH), LENGTH + 1
    while at < len(ids):
        end = min(at + LENGTH, len(ids))
        expected += plain(ids[max(0, end - LENGTH - 1) : end], end - at)
        at = end
    assert found[1] == pytest.approx(expected, abs=1e-3)
    short = TOKENIZER.encode(texts[0])
    assert found[0] == pytest.approx(plain([TOKENIZER.start_id, *short], len(short)), abs=1e-4)
    assert found[2] == 0.0


def test_generation_goes_on_greedily_and_ends_before_a_stop_text() -> None:
    ask = {"until": ["at"], "max_gen_toks": 6, "do_sample": False, "temperature": 0.7}
    found = harness().generate_until([request(text, ask) for text in ("the cat", "猫坐", "the dog ran")])
    for text, said in zip(("the cat", "猫坐", "the dog ran"), found, strict=True):
        assert said == "".join(generate(MODEL, TOKENIZER, text, max_new_tokens=6, stop=("at",)))
    assert len(harness().generate_until([request("the cat " * 30, {"max_gen_toks": 4, "until": "x"})])) == 1
    assert sampling({"do_sample": True, "temperature": 0.5, "until": "\n"}).temperature == 0.5


def test_the_adapter_is_one_of_the_harness_s_models_and_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(MissingExtra, match=r"langmill\[harness\]"):
        harness_model(MODEL, TOKENIZER)

    class LM:
        def __init__(self) -> None:
            self.rank = 0

    module = ModuleType("lm_eval.api.model")
    module.LM = LM  # type: ignore[attr-defined]
    for name, one in (("lm_eval", ModuleType("lm_eval")), ("lm_eval.api", ModuleType("lm_eval.api"))):
        monkeypatch.setitem(sys.modules, name, one)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", module)
    made = harness_model(MODEL, TOKENIZER, 3)
    assert isinstance(made, LM) and made.rank == 0 and made.tokenizer_name == TOKENIZER.fingerprint
    assert np.isfinite(made.loglikelihood([request("the", " cat")])[0][0])


def test_a_local_task_of_the_real_harness(tmp_path: Any) -> None:
    pytest.importorskip("lm_eval")
    datasets = pytest.importorskip("datasets")
    from lm_eval import simple_evaluate

    rows = [
        {"question": q, "choices": ["cat", "dog ran", "mat"], "answer": i % 3}
        for i, q in enumerate("abcdefgh")
    ]
    task = {
        "task": "local",
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    found = simple_evaluate(model=harness_model(MODEL, TOKENIZER), tasks=[task], bootstrap_iters=0)[
        "results"
    ]["local"]
    hits = []
    for row in rows:
        texts = [f" {choice}" for choice in row["choices"]]
        [own] = answered(MODEL, [question(TOKENIZER, f"Question: {row['question']}\nAnswer:", texts, LENGTH)])
        hits.append([n == row["answer"] for n in chosen([one.log for one in own], row["choices"])])
    assert [found["acc,none"], found["acc_norm,none"]] == pytest.approx(np.mean(hits, axis=0).tolist())
