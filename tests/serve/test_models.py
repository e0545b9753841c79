"""Which models are served, under which names, what each does; adapters beside their model."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from tests.serve.conftest import settings_of

import langmill
from langmill.adapt.lora import adapt
from langmill.apps import embed
from langmill.apps.texts import Row
from langmill.common.errors import UsageError
from langmill.common.settings import EmbedSettings, LoRASettings, ServeSettings
from langmill.families.peft import adapters, write_adapter
from langmill.infer.request import Request
from langmill.model.config import Head, LSTMConfig, ModelConfig, StackConfig, Tokens
from langmill.serve.errors import Refused
from langmill.serve.models import abilities, fingerprint, load_models, name_of
from langmill.text.tasks import Limit, encode_texts
from langmill.text.tokenizer import Tokenizer

STACK: dict[str, Any] = {"dim": 16, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 8, "hidden": 16}
DECODER, ENCODER = StackConfig(**STACK), StackConfig(**STACK, causal=False)
CROSS = StackConfig(**STACK, cross=True)
INPUT = Tokens(320, 32)
TOKENIZER = Tokenizer.train(["The quick brown fox"] * 3, vocab_size=300)
CHATTY = TOKENIZER.with_template("{{ messages }}")


@pytest.mark.parametrize(
    "config, tokenizer, does",
    [
        (ModelConfig(DECODER, INPUT, head=Head(320)), TOKENIZER, {"write"}),
        (ModelConfig(DECODER, INPUT, head=Head(320)), CHATTY, {"write", "chat"}),
        (LSTMConfig(320, 32, 16, 16), TOKENIZER, {"write"}),
        (ModelConfig(encoder=ENCODER, encoder_input=INPUT), TOKENIZER, {"embed", "choose"}),
        (ModelConfig(DECODER, INPUT), TOKENIZER, {"embed", "choose"}),
        (
            ModelConfig(encoder=ENCODER, encoder_input=INPUT, head=Head(2, False, task="classify", pool="first")),
            TOKENIZER, {"classify"},
        ),
        (ModelConfig(encoder=ENCODER, encoder_input=INPUT, head=Head(2, False, task="tag")), TOKENIZER, {"tag"}),
        (ModelConfig(encoder=ENCODER, encoder_input=INPUT, head=Head(2, False, task="answer")), TOKENIZER, {"answer"}),
        (ModelConfig(CROSS, INPUT, ENCODER, INPUT, Head(320)), TOKENIZER, {"translate"}),
    ],
)  # fmt: skip
def test_what_a_model_does_follows_from_its_shape(config: Any, tokenizer: Tokenizer, does: set[str]) -> None:
    assert abilities(config, tokenizer, zero_shot=False) == does
    assert abilities(config, tokenizer, zero_shot=True) == does | ({"choose"} if "write" in does else set())


def test_a_model_is_called_by_the_last_part_of_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine.v1").mkdir()
    assert name_of(str(tmp_path / "mine.v1")) == name_of(f"{tmp_path}/mine.v1/") == "mine.v1"
    assert (name_of("org/name@main"), name_of("org/name/file.Q4_0.gguf")) == ("name", "file.Q4_0")


def adapter(folder: str, out: Path) -> str:
    """An adapter of the model that changes what it writes."""
    model, _ = langmill.load(folder)
    adapt(model, LoRASettings(lora_r=2), 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, layer in adapters(model):
            layer.b.normal_(generator=generator)
    out.mkdir()
    write_adapter(model, out, base=folder)
    return str(out)


def test_an_adapter_is_served_beside_its_model(
    folder: str, tmp_path: Path, serving: Callable[..., Any]
) -> None:
    put = adapter(folder, tmp_path / "put")
    url = serving(folder, adapter=[f"changed={put}"]).url
    how: dict[str, Any] = {"prompt": "The quick", "temperature": 0, "max_tokens": 12}
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        base, changed = (client.completions.create(model=name, **how) for name in ("tiny", "changed"))
        listed = [(one.id, (one.model_extra or {})["parent"]) for one in client.models.list()]
    model, tokenizer = langmill.load(put)
    wanted = "".join(langmill.generate(model, tokenizer, "The quick", max_new_tokens=12))
    assert changed.choices[0].text == wanted != base.choices[0].text
    assert changed.system_fingerprint != base.system_fingerprint
    assert listed == [("tiny", None), ("changed", "tiny")]
    metrics = httpx.get(f"{url}/metrics").text
    assert 'langmill_written_tokens_total{model="changed"} 12.0' in metrics
    assert 'langmill_engine_slots{model="tiny"}' in metrics
    assert 'langmill_engine_slots{model="changed"}' not in metrics


def test_of_several_models_an_adapter_takes_the_one_it_names_or_is_given(
    folder: str, plain_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = adapter(folder, tmp_path / "put")

    def parent(text: str) -> str:
        settings = settings_of(plain_folder, folder, adapter=[f"changed={text}"], context=16)
        models = load_models(settings)
        asyncio.run(models.close(drain=False))
        one = models.named("changed").parent
        assert one is not None
        return one.name

    assert (parent(put), parent(f"{put}@plain"), parent(f"{put}@tiny")) == ("tiny", "plain", "tiny")
    with pytest.raises(UsageError, match="no model is served as other: there is plain, tiny"):
        parent(f"{put}@other")
    (tmp_path / "a@b").mkdir()
    with pytest.raises(UsageError, match="a@b holds no adapter_config.json"):
        parent(str(tmp_path / "a@b"))
    config = tmp_path / "put" / "adapter_config.json"
    told = {**json.loads(config.read_text()), "base_model_name_or_path": "nobody/nothing"}
    config.write_text(json.dumps(told), encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)  # nothing is fetched to compare it
    with pytest.raises(UsageError, match=rf"made for nobody/nothing, .* as changed={put}@plain"):
        parent(put)
    assert parent(f"{put}@tiny") == "tiny"


def test_an_adapter_that_cannot_stand_beside_its_model_is_merged_and_told(
    folder: str, tmp_path: Path, serving: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    put = adapter(folder, tmp_path / "put")
    answers = []
    for zero_shot in (False, True):
        with caplog.at_level("INFO", "langmill.serve"):
            running = serving(folder, adapter=[f"changed={put}"], zero_shot=zero_shot)
        changed = running.state.models.named("changed")
        assert (changed.parent is None) == (changed.service is not None) == zero_shot
        body = {"model": "changed", "prompt": "The quick", "temperature": 0, "max_tokens": 12}
        answers.append(httpx.post(f"{running.url}/v1/completions", json=body).json()["choices"])
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("changed")]
    assert answers[0] == answers[1] and len(told) == 2
    assert "MB beside tiny" in told[0] and "takes the memory of a model of its own" in told[1]


@pytest.mark.parametrize("bits", [None, 8])
def test_an_encoder_makes_the_vectors_of_the_command(encoder_folder: str, bits: Any) -> None:
    models = load_models(ServeSettings(model=[encoder_folder], device="cpu", bits=bits))
    loaded = models.find("encoder", "embed")
    with pytest.raises(UsageError, match="the model encoder does not write text: serve a decoder"):
        models.find("encoder", "chat")
    texts = ["The quick", "春眠不觉晓。", "a"]
    frames = encode_texts(loaded.tokenizer, texts, Limit(loaded.window), Counter())

    async def vectors() -> list[Any]:
        found = []
        for frame in frames:
            async for event in loaded.engine.generate(Request(frame.ids, kind="embed")):
                found.append(event.vector)
        await models.close(drain=True)
        return found

    asked = EmbedSettings(model=encoder_folder, device="cpu", bits=bits)
    reader = embed.Reader.of(asked, quiet=True)
    wanted = [vector for text in texts for vector in reader.vectors([Row("", text, {})], Counter())]
    assert np.allclose(np.stack(asyncio.run(vectors())), np.stack(wanted), atol=1e-6)


def test_a_fingerprint_follows_the_weights(folder: str, plain_folder: str) -> None:
    assert fingerprint(folder, None) == fingerprint(folder, None) != fingerprint(plain_folder, None)


@pytest.mark.parametrize(
    "more, message",
    [
        ({"model": []}, "name at least one model to serve"),
        ({"name": ["a", "b"]}, "there are 2 names for 1 models"),
        ({"adapter": ["x"]}, "--adapter takes NAME=DIR or NAME=DIR@MODEL, not 'x'"),
        ({"adapter": ["x=/nowhere"]}, "/nowhere holds no adapter_config.json"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_loaded(
    folder: str, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        load_models(ServeSettings(**{"model": [folder], **more}))


def test_what_meets_a_closed_engine_may_come_again(folder: str, encoder_folder: str, serving: Any) -> None:
    running = serving(folder, encoder_folder)
    loaded = running.state.models.named("tiny")
    with pytest.raises(UsageError, match="^a wrong field$"), loaded.open():
        raise UsageError("a wrong field")
    asyncio.run(running.state.models.close(drain=True))
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    for path, body in (
        ("chat/completions", asked),
        ("chat/completions", {**asked, "stream": True}),
        ("messages", asked),
        ("embeddings", {"model": "encoder", "input": "a"}),
        ("classify", {"model": "encoder", "input": "a", "labels": ["x", "y"]}),
    ):
        answer = httpx.post(f"{running.url}/v1/{path}", json=body)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1"), path
    loaded.closing = False  # as if it closed between the look and the request
    with pytest.raises(Refused, match="is stopping"), loaded.open():
        loaded.closing = True
        raise UsageError("the engine is closed")


def test_two_models_of_one_name_are_refused(folder: str) -> None:
    with pytest.raises(UsageError, match="two models would be called tiny"):
        load_models(ServeSettings(model=[folder, folder]))
