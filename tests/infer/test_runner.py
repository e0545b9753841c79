"""Real models behind the engine: in company each writes what `generate_ids` and the bare model write alone."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from fake_engine import drain, gather, request
from torch import Tensor

from langmill.common.errors import ModelError
from langmill.families import family, folder
from langmill.infer.engine import Engine
from langmill.infer.generate import generate_ids
from langmill.infer.read import embeddings
from langmill.infer.request import Event, Request
from langmill.infer.runner import SourceRunner, TorchEmbedder, TorchRunner
from langmill.infer.sampling import sample, streams
from langmill.model import config as shapes
from langmill.model.config import Head, Learned, ModelConfig, Relative, StackConfig, Tokens
from langmill.model.init import init_
from langmill.model.recurrent import LSTM
from langmill.model.transformer import Memory, Transformer
from langmill.text.frames import Encoded

VOCAB, LENGTH = 97, 48
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "window": {"window": (6, None)},
    "learned": {"position": Learned(), "norm": "layer", "gated": False, "bias": frozenset("qkv")},
    "relative": {"position": Relative(buckets=8, reach=20)},
}


@cache
def made(kind: str = "llama", **more: Any) -> Transformer:
    stack = StackConfig(dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=48, **KINDS[kind], **more)
    return spread(Transformer(ModelConfig(stack, Tokens(VOCAB, LENGTH), head=Head(VOCAB))))


def spread(model: Any) -> Any:
    """Wide weights, so that no two scores are nearly equal."""
    init_(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return model.eval()


def written(model: Transformer, one: Request) -> list[int]:
    steps = generate_ids(model, [one.prompt], one.sampling, one.stop_ids or frozenset())
    return [token.id for step in steps for token in step]


def ids(*tokens: int) -> np.ndarray[Any, Any]:
    return np.array(tokens, np.int64)


def run(runner: TorchRunner, *parts: tuple[int, int, list[int]]) -> Tensor:
    """The scores behind each part's last token; a part is its slot, its place and its tokens."""
    tokens = [token for _, _, own in parts for token in own]
    slots = np.repeat([slot for slot, _, _ in parts], [len(own) for _, _, own in parts])
    places = [place + n for _, place, own in parts for n in range(len(own))]
    return runner.run(
        ids(*tokens), ids(*slots), ids(*places), np.cumsum([len(own) for _, _, own in parts]) - 1
    )


@pytest.mark.parametrize("kind", KINDS)
def test_requests_in_any_company_write_what_they_write_alone(kind: str) -> None:
    """Arrivals, cancellations, shared beginnings and priorities at random; prompts in pieces."""
    model, draws = made(kind), random.Random(kind)
    engine = Engine(TorchRunner(model, 3, LENGTH), pass_tokens=9, worth=2)
    asked: dict[int, Request] = {}
    found: dict[int, Event] = {}
    for _ in range(24):
        prompt = [
            *range(5, 5 + draws.choice((0, 3, 11))),
            *draws.choices(range(VOCAB), k=draws.randint(1, 14)),
        ]
        way: dict[str, Any] = draws.choice(
            ({}, {}, {"temperature": 1.0, "top_p": 0.9}, {"repetition_penalty": 1.3})
        )
        one = request(prompt, max_new_tokens=draws.randint(1, 20), priority=draws.randrange(2), **way)
        asked[engine.submit(one)] = one
        for _ in range(draws.randrange(6)):
            gather(found, engine.step())
        if draws.random() < 0.2:
            engine.cancel(draws.choice(list(asked)))
    gather(found, drain(engine).values())
    assert set(found) == set(asked)
    counts = engine.counts
    assert counts["cancelled"] and counts["preempted"] and counts["reused"] and not counts["error"]
    for number, event in found.items():
        expected = written(model, asked[number])
        assert event.ids == expected[: len(event.ids)]
        assert event.finish == "cancelled" or len(event.ids) == len(expected)


def test_scores_are_the_models_whatever_else_is_in_the_pass() -> None:
    model = made()
    runner = TorchRunner(model, 4, LENGTH)
    assert (runner.slots, runner.length, runner.vocab) == (4, LENGTH, VOCAB)
    long, short = list(range(20, 40)), [3, 4, 5]
    first = run(runner, (2, 0, long[:-4]), (0, 0, short), (3, 0, [9]))
    assert (first.dtype, first.device.type, first.shape) == (torch.float32, "cpu", (3, VOCAB))
    second = run(runner, (2, len(long) - 4, long[-4:]), (0, 3, [6]), (1, 0, short))
    for scores, seen in zip(
        (*first, *second), (long[:-4], short, [9], long, [*short, 6], short), strict=True
    ):
        assert torch.allclose(scores, model(torch.tensor([seen]))[0, -1], atol=1e-4)


def test_places_are_written_again_and_slots_copied() -> None:
    model = made()
    runner = TorchRunner(model, 3, LENGTH)
    run(runner, (0, 0, list(range(30))))
    runner.copy(0, 2, 10)
    found = run(runner, (0, 5, [90, 91]), (2, 10, [92]))
    for scores, seen in zip(found, ([0, 1, 2, 3, 4, 90, 91], [*range(10), 92]), strict=True):
        assert torch.allclose(scores, model(torch.tensor([seen]))[0, -1], atol=1e-4)


def test_padding_reaches_beyond_the_last_place_without_harm() -> None:
    """A long row beside one at its slot's end."""
    model = made("learned")
    runner = TorchRunner(model, 2, LENGTH)
    full = list(range(LENGTH))
    run(runner, (0, 0, full[:-5]))
    found = run(runner, (0, LENGTH - 5, full[-5:]), (1, 0, full[:8]))
    for scores, seen in zip(found, (full, full[:8]), strict=True):
        assert torch.allclose(scores, model(torch.tensor([seen]))[0, -1], atol=1e-4)


def test_numbers_that_are_none_end_one_request_and_leave_nothing_behind() -> None:
    model = spread(Transformer(made().config))
    with torch.no_grad():
        model.head = torch.nn.Linear(32, VOCAB, bias=False)
        model.head.weight.copy_(model.tokens.weight)
        model.head.weight[90], model.tokens.weight[90] = (
            0,
            torch.nan,
        )  # no text is sick that does not hold a 90
    sick, long = [*range(30), 90, 40], request(range(40, 75), max_new_tokens=14, stop_ids=frozenset())
    shared = request([*range(40, 43), 50], max_new_tokens=9)
    for late in (request([1, 2], max_new_tokens=9), shared):  # one begins anew in the slot, one with a copy
        engine = Engine(TorchRunner(model, 2, LENGTH), pass_tokens=80, worth=1)
        asked = [request(sick), long, late]
        numbers = [engine.submit(one) for one in asked]
        found = drain(engine)
        assert found[numbers[0]].finish == "error" and "not finite" in str(found[numbers[0]].reason)
        for number, one in zip(numbers[1:], asked[1:], strict=True):
            assert found[number].ids == written(model, one)
    assert found[numbers[2]].cached == 3
    engine = Engine(TorchRunner(model, 1, LENGTH), pass_tokens=31)
    engine.submit(request(sick))
    (event,) = engine.step()  # seen in a piece of the prompt whose scores nobody wants
    assert event.finish == "error" and "not finite" in str(event.reason)


@pytest.mark.parametrize("name", ["bart", "marian", "t5"])
def test_answers_to_sources_are_those_of_the_bare_model(name: str, tmp_path: Path) -> None:
    kind = family("t5" if name == "t5" else "bart", "test")
    torch.manual_seed(3)
    theirs = transformers.AutoModelForSeq2SeqLM.from_config(
        transformers.AutoConfig.for_model(name, **kind.TINY[name])
    )
    for weight in theirs.parameters():
        weight.data.normal_(1.0 if weight.dim() == 1 else 0.0, 0.25) if weight.requires_grad else None
    theirs.save_pretrained(tmp_path)
    model = folder.load_model(tmp_path)
    assert isinstance(model, Transformer) and model.config.decoder_input is not None
    runner = TorchRunner(model, 2, 20)
    assert isinstance(runner, SourceRunner) and runner.source
    engine = Engine(runner, pass_tokens=12, worth=1)
    start = model.config.decoder_input.start or 0
    asked = {}
    for source in ([5, 6, 7, 8], [40], [9, 8, 7, 6, 5, 4, 3, 30, 20], [5, 6, 7, 8], [11, 12]):
        for way in ({}, {"temperature": 1.0}):
            one = request([start], source=source, max_new_tokens=12, stop_ids=frozenset({2}), **way)
            asked[engine.submit(one)] = one
    found = drain(engine)
    for number, one in asked.items():
        assert found[number].ids == with_memory(model, one), one


@torch.inference_mode()
def with_memory(model: Transformer, one: Request) -> list[int]:
    """What a request writes, all of it read anew for each token."""
    memory: Memory = model.encode(torch.tensor([one.source]))
    numbers, found = streams(one.sampling.seed, [one.prompt]), list[int]()
    while len(found) < one.sampling.max_new_tokens and found[-1:] != [2]:
        seen = torch.tensor([[*one.prompt, *found]])
        logits = model.logits(model.hidden(seen, memory=memory)[:, -1])
        found.append(int(sample(logits, one.sampling, None, numbers)))
    return found


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pool", ["mean", "first", "last"])
def test_vectors_are_those_of_reading(causal: bool, pool: Any) -> None:
    if causal:
        model = made()
    else:
        stack = StackConfig(
            dim=32, layers=2, heads=4, kv_heads=4, head_dim=8, hidden=48, causal=False, position=Learned()
        )
        model = spread(Transformer(ModelConfig(encoder=stack, encoder_input=Tokens(VOCAB, LENGTH))))
    engine = Engine(embedder=TorchEmbedder(model, pool), pass_tokens=16)
    texts = [[1, 2, 3], list(range(30)), [7], [5, 6, 7, 8, 9, 10]]
    numbers = [engine.submit(request(text, kind="embed")) for text in texts]
    found = drain(engine)
    documents = [Encoded(text, [0] * len(text), range(len(text)), range(0)) for text in texts]
    for number, vector in zip(numbers, embeddings(model, documents, pool), strict=True):
        event = found[number]
        assert event.vector is not None and np.allclose(event.vector, vector, atol=1e-5)


def test_models_that_cannot_run_are_refused() -> None:
    lstm = LSTM(shapes.LSTMConfig(vocab=VOCAB, length=LENGTH, dim=24, hidden=24))
    with pytest.raises(ModelError, match="Transformer that writes"):
        TorchRunner(lstm, 2, LENGTH)
    encoder = StackConfig(dim=8, layers=1, heads=1, kv_heads=1, head_dim=8, hidden=8, causal=False)
    with pytest.raises(ModelError, match="Transformer that writes"):
        TorchRunner(Transformer(ModelConfig(encoder=encoder, encoder_input=Tokens(9, 9))), 2, 9)


def test_a_slot_has_no_more_places_than_the_model_has_positions_of_its_own() -> None:
    assert TorchRunner(made(), 1, 999).length == LENGTH
    rope = shapes.Rope(scaling=shapes.RopeScaling("dynamic", 2.0, 20))
    assert TorchRunner(made(position=rope), 1, 999).length == 20
