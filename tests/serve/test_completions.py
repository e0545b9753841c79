"""/v1/completions by OpenAI's own client: what it writes, in which shapes, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from tests.serve.conftest import save

import langmill
from langmill.serve.state import State
from langmill.text.infill import gap_ids
from langmill.text.training import FIM

GREEDY: dict[str, Any] = {"model": "plain", "max_tokens": 24, "temperature": 0}
PROMPTS = ["The quick", "day", "春眠", "over the lazy dog, every"]


def generated(folder: str, prompt: str, **sampling: Any) -> str:
    model, tokenizer = langmill.load(folder)
    return "".join(langmill.generate(model, tokenizer, prompt, max_new_tokens=24, **sampling))


def test_greedy_text_is_that_of_generate_streamed_or_not(client: openai.OpenAI, plain_folder: str) -> None:
    for prompt in PROMPTS:
        whole = client.completions.create(prompt=prompt, **GREEDY)
        parts = list(client.completions.create(prompt=prompt, stream=True, **GREEDY))
        assert whole.choices[0].text == generated(plain_folder, prompt) != ""
        assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
        assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason
        assert whole.object == parts[0].object == "text_completion"
        assert whole.system_fingerprint.startswith("fp_") and whole.id.startswith("cmpl-")


def test_prompts_of_all_four_forms_and_their_usage(client: openai.OpenAI, state: State) -> None:
    tokenizer = state.models.find("plain", "write").tokenizer
    ids = [tokenizer.prompt_ids(prompt) for prompt in PROMPTS]
    texts = [client.completions.create(prompt=prompt, **GREEDY).choices[0].text for prompt in PROMPTS]
    assert client.completions.create(prompt=ids[0], **GREEDY).choices[0].text == texts[0]
    for prompts in (PROMPTS, ids):
        answer = client.completions.create(prompt=prompts, n=2, **GREEDY)
        assert [choice.index for choice in answer.choices] == list(range(8))
        assert [choice.text for choice in answer.choices[::2]] == texts
        assert answer.usage.prompt_tokens == sum(map(len, ids))
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    *chunks, last = client.completions.create(
        prompt=PROMPTS, n=2, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    joined = [""] * 8
    for chunk in chunks:
        assert chunk.usage is None
        joined[chunk.choices[0].index] += chunk.choices[0].text
    assert joined[::2] == texts and last.choices == []
    assert (last.usage.completion_tokens, last.usage.prompt_tokens) == (
        answer.usage.completion_tokens,
        answer.usage.prompt_tokens,
    )
    long = "春眠不觉晓。" * 20
    client.completions.create(prompt=long, **GREEDY)
    again = client.completions.create(prompt=long, **GREEDY)
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens - 1


def test_a_seed_fixes_the_draws_and_choices_draw_apart(client: openai.OpenAI, plain_folder: str) -> None:
    how = {**GREEDY, "temperature": 1.0, "prompt": "The"}
    first, again = (client.completions.create(n=3, seed=7, **how) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices] and len(set(texts)) == 3
    assert texts[0] == generated(plain_folder, "The", temperature=1.0, seed=7)
    free = {client.completions.create(**how).choices[0].text for _ in range(4)}
    assert len(free) > 1


def test_stop_texts_end_before_them(client: openai.OpenAI, plain_folder: str) -> None:
    whole = generated(plain_folder, "The quick")
    stop = whole[5:8]
    for given in (stop, [stop, "never"]):
        answer = client.completions.create(prompt="The quick", stop=given, **GREEDY)
        assert answer.choices[0].text == whole[: whole.index(stop)]
        assert answer.choices[0].finish_reason == "stop"
    parts = client.completions.create(prompt="The quick", stop=stop, stream=True, **GREEDY)
    assert "".join(part.choices[0].text for part in parts) == whole[: whole.index(stop)]


def test_echo_puts_the_prompt_in_front(client: openai.OpenAI, state: State) -> None:
    bare = client.completions.create(prompt="The quick", **GREEDY).choices[0].text
    ids = state.models.find("plain", "write").tokenizer.encode("The quick")
    for prompt in ("The quick", ids):
        assert (
            client.completions.create(prompt=prompt, echo=True, **GREEDY)
            .choices[0]
            .text.startswith("The quick")
        )
    parts = client.completions.create(prompt="The quick", echo=True, stream=True, **GREEDY)
    assert "".join(part.choices[0].text for part in parts) == "The quick" + bare


def test_log_probabilities_are_columns_whose_tokens_join_to_the_text(client: openai.OpenAI) -> None:
    whole = client.completions.create(prompt="day", logprobs=3, **GREEDY).choices[0]
    columns = whole.logprobs
    written = "".join(token for token in columns.tokens if "\ufffd" not in token)
    assert len(columns.tokens) == len(columns.token_logprobs) == len(columns.top_logprobs)
    assert len(written) > 3 and columns.text_offset == sorted(columns.text_offset)
    for token, log, top in zip(columns.tokens, columns.token_logprobs, columns.top_logprobs, strict=True):
        assert log == max(top.values()) and len(top) <= 3 and token in top
    offsets, tokens = [], []
    for part in client.completions.create(prompt="day", logprobs=3, stream=True, **GREEDY):
        if part.choices[0].logprobs is not None:
            offsets += part.choices[0].logprobs.text_offset
            tokens += part.choices[0].logprobs.tokens
    assert (offsets, tokens) == (columns.text_offset, columns.tokens)


def test_ids_that_do_not_fit_are_not_made_text_of(
    client: openai.OpenAI, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = state.models.find("plain", "write")
    monkeypatch.setattr(type(loaded.tokenizer), "decode", None)
    with pytest.raises(openai.BadRequestError, match=f"the prompt has {loaded.window + 1}"):
        client.completions.create(prompt=[1] * (loaded.window + 1), echo=True, **GREEDY)


def test_echo_with_log_probabilities_tells_the_prompts_too(
    client: openai.OpenAI, state: State, plain_folder: str
) -> None:
    model, tokenizer = langmill.load(plain_folder)
    ids = tokenizer.encode("The quick brown fox. 春眠")
    with torch.inference_mode():
        logs = model(torch.tensor([ids]))[0].log_softmax(-1)
    how: dict[str, Any] = {**GREEDY, "prompt": ids, "echo": True, "logprobs": 2, "max_tokens": 1}
    for _ in range(2):  # the second time slots hold the prompt
        columns = client.completions.create(**how).choices[0].logprobs
        assert columns.token_logprobs[0] is None and columns.top_logprobs[0] is None
        assert columns.token_logprobs[1 : len(ids)] == pytest.approx(
            [float(logs[place, id]) for place, id in enumerate(ids[1:])], abs=1e-3
        )
    (part, *rest) = client.completions.create(stream=True, **how)
    assert part.choices[0].logprobs.token_logprobs == columns.token_logprobs and not rest
    text = client.completions.create(**how | {"prompt": "The quick"}).choices[0]
    offsets = zip(text.logprobs.tokens[1:], text.logprobs.text_offset[1:], strict=True)
    assert all(text.text[at:].startswith(token) for token, at in offsets)


def test_biases_and_penalties_change_what_is_written(client: openai.OpenAI, state: State) -> None:
    tokenizer = state.models.find("plain", "write").tokenizer
    x = tokenizer.encode("x")[0]
    biased = client.completions.create(prompt="The", logit_bias={str(x): 100}, **GREEDY)
    assert biased.choices[0].text == "x" * 24
    varied = client.completions.create(
        prompt="The", logit_bias={str(x): 50}, frequency_penalty=2, extra_body={"ignore_eos": True},
        **GREEDY | {"max_tokens": 60},
    )  # fmt: skip
    assert varied.choices[0].text.count("x") < 60 and varied.usage.completion_tokens == 60
    only = client.completions.create(prompt="The", extra_body={"top_k": 1}, **GREEDY | {"temperature": 5})
    assert only.choices[0].text == client.completions.create(prompt="The", **GREEDY).choices[0].text


REFUSED: list[tuple[dict[str, Any], str, str | None]] = [
    ({"prompt": "a" * 9000}, r"context is 512 tokens and the prompt has 9\d\d\d", None),
    (
        {"max_tokens": 600},
        r"context is 512 tokens and the prompt has 2, and 600 were asked for",
        "max_tokens",
    ),
    ({"prompt": []}, "prompt", "prompt"),
    ({"prompt": [99999]}, "ids of no token: this model knows 0 to", "prompt"),
    ({"suffix": "end"}, "this model has no marks of a gap", "suffix"),
    ({"suffix": "end", "prompt": [5, 6]}, "suffix stands behind a text", "suffix"),
    ({"suffix": "end", "echo": True}, "leave echo or suffix out", "suffix"),
    ({"extra_body": {"structured_outputs": {}}}, "says none of json, regex, choice", "structured_outputs"),
    (
        {"extra_body": {"structured_outputs": {"regex": "("}}},
        "structured_outputs.regex: ",
        "structured_outputs.regex",
    ),
    ({"best_of": 4}, "best_of is not supported", "best_of"),
    ({"n": 17}, "n is 17: at most 16", "n"),
    ({"temperature": -1}, "temperature should be greater than or equal to 0", "temperature"),
    ({"temperature": "hot"}, "temperature should be a valid number", "temperature"),
    ({"logit_bias": {"the": 1}}, "logit_bias names 'the': its names are ids", "logit_bias"),
    ({"stop": ["x"] * 17}, "stop", "stop"),
    (
        {"extra_body": {"temprature": 1}},
        "no field 'temprature' here: did you mean 'temperature'",
        "temprature",
    ),
    ({"extra_body": {"prompt": {"a": 1}}}, "prompt should be a valid string or", "prompt"),
    ({"stream_options": {"include_usage": True}}, "stream_options is for stream: true", "stream_options"),
]


@pytest.mark.parametrize("given, message, param", REFUSED, ids=[str(row[0])[:30] for row in REFUSED])
def test_what_cannot_be_done_is_refused_by_name(
    client: openai.OpenAI, given: dict[str, Any], message: str, param: str | None
) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as error:
        client.completions.create(**{**GREEDY, "prompt": "The", **given})
    assert error.value.param == param and error.value.type == "invalid_request_error"
    assert error.value.code == ("context_length_exceeded" if "context is" in message else error.value.code)


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="this server has tiny, plain, long"):
        client.completions.create(**GREEDY | {"model": "gpt-4"}, prompt="a")


def test_a_gap_before_a_suffix_is_filled_as_the_command_does(
    serving: Callable[..., Any], tmp_path: Path
) -> None:
    folder = save(tmp_path / "gaps", template=None, seed=2, more=FIM)
    model, tokenizer = langmill.load(folder)
    assert tokenizer is not None
    with openai.OpenAI(base_url=f"{serving(folder).url}/v1", api_key="none") as client:
        got = client.completions.create(
            model="gaps", prompt=["The", "day"], suffix=" fox jumps", temperature=0, max_tokens=12
        )
    ids = [gap_ids(tokenizer, before, " fox jumps") for before in ("The", "day")]
    wanted = ["".join(langmill.generate(model, tokenizer, one, max_new_tokens=12)) for one in ids]
    assert [choice.text for choice in got.choices] == wanted and wanted[0] != wanted[1]
    assert got.usage.prompt_tokens == sum(map(len, ids))


def test_what_may_be_written_by_the_fields_of_vllm(client: openai.OpenAI) -> None:
    for name, value in (
        ("choice", ["fox"]),
        ("regex", "fox"),
        ("grammar", 'start: "fox"'),
        ("json", {"const": "fox"}),
    ):
        for body in ({"structured_outputs": {name: value}}, {f"guided_{name}": value}):
            got = client.completions.create(prompt="The", extra_body=body, **GREEDY)
            assert got.choices[0].text.strip('"') == "fox"


def test_what_may_not_wait_is_refused_for_now(long_folder: str, serving: Callable[..., Any]) -> None:
    running = serving(long_folder, slots=1, queue_tokens=20)
    how = {"model": "long", "prompt": [5] * 12, "max_tokens": 8000, "ignore_eos": True}
    waiting = [running.ask("/v1/completions", how)]
    running.until(lambda: accounting(running)["slots"] == 1)
    waiting.append(running.ask("/v1/completions", how))
    running.until(lambda: accounting(running)["queued"] == 1)
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError, match="12 tokens cannot wait beside the 12") as error:
                client.completions.create(model="long", prompt=[5] * 12, stream=stream)
            assert error.value.code == "queue_full" and error.value.response.headers["retry-after"] == "1"
    for connection in waiting:
        connection.close()
    running.until(lambda: running.busy() == 0)


def accounting(running: Any) -> dict[str, int]:
    return running.state.models.all[0].engine.accounting()
