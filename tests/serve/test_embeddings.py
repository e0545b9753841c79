"""/v1/embeddings by OpenAI's own client: the vectors of `langmill embed`, in order, in both forms."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from safetensors.torch import save_file

from langmill.apps import embed, sentence
from langmill.apps.texts import Row
from langmill.common.settings import EmbedSettings, ServeSettings
from langmill.serve import embeddings
from langmill.serve.errors import Refused
from langmill.serve.models import Loaded, Models, load_models

TEXTS = ["The quick brown fox", "春眠不觉晓。", "a", "every day and every night"]


@pytest.fixture(scope="module")
def encoder(encoder_folder: str, folder: str, serving_long: Any) -> Any:
    return serving_long(encoder_folder, folder)


@pytest.fixture
def client(encoder: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{encoder.url}/v1", api_key="none", max_retries=0) as made:
        yield made
    encoder.until(lambda: encoder.busy() == 0)


@pytest.fixture
def loaded(encoder: Any) -> Loaded:
    found: Loaded = encoder.state.models.named("encoder")
    return found


def commanded(folder: str, **more: Any) -> Any:
    reader = embed.Reader.of(EmbedSettings(model=folder, device="cpu", **more), quiet=True)
    return np.stack([v for text in TEXTS for v in reader.vectors([Row("", text, {})], Counter())])


@pytest.mark.parametrize("form", ["float", "base64"])
@pytest.mark.parametrize("dims", [None, 8])
def test_vectors_are_those_of_the_command_in_order(
    client: openai.OpenAI, encoder_folder: str, form: Any, dims: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embeddings, "GROUP_TOKENS", 12)  # several groups
    more: dict[str, Any] = {} if dims is None else {"dimensions": dims}
    made = client.embeddings.create(model="encoder", input=TEXTS, encoding_format=form, **more)
    assert [one.index for one in made.data] == list(range(len(TEXTS)))
    got = [
        np.frombuffer(base64.b64decode(one.embedding), "<f4") if isinstance(one.embedding, str)
        else one.embedding for one in made.data
    ]  # fmt: skip
    assert np.allclose(np.array(got), commanded(encoder_folder, dims=dims), atol=1e-6)


def test_a_text_a_list_and_ids_give_the_same_vector(client: openai.OpenAI, loaded: Loaded) -> None:
    ids = loaded.tokenizer.frame.one(loaded.tokenizer.encode(TEXTS[0])).ids
    given = (TEXTS[0], [TEXTS[0]], ids, [ids])
    made = [client.embeddings.create(model="encoder", input=one) for one in given]
    assert all(one.data[0].embedding == made[0].data[0].embedding for one in made)
    assert made[0].usage.prompt_tokens == made[0].usage.total_tokens == len(ids)


def test_what_stands_beside_a_model_holds_here_too(encoder_folder: str, tmp_path: Path) -> None:
    """A length, a word in front of every text, and a layer behind the pooling."""
    folder = Path(shutil.copytree(encoder_folder, tmp_path / "own"))
    sentence.write(folder, "first", 32, 9)
    modules = [*json.loads((folder / "modules.json").read_text()), {"type": "Dense", "path": "3_Dense"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "3_Dense").mkdir()
    (folder / "3_Dense" / "config.json").write_text('{"bias": false}')
    save_file({"linear.weight": torch.randn(40, 32)}, folder / "3_Dense" / "model.safetensors")
    prompts = {"prompts": {"any": "a "}, "default_prompt_name": "any"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    for bits in (None, 8):
        models = load_models(ServeSettings(model=[str(folder)], device="cpu", bits=bits))
        (loaded,) = models.names()
        assert loaded.window == 9
        with pytest.raises(Refused, match="this model reads 9 tokens and input has"):
            embeddings.ids_of(loaded, ["day " * 9])

        async def made(models: Models = models, loaded: Loaded = loaded) -> Any:
            found = await embeddings.vectors_of(loaded, embeddings.ids_of(loaded, ["a", "night"]), 36)
            with pytest.raises(Refused, match="this model's vectors have 40"):
                await embeddings.vectors_of(loaded, [[1]], 41)
            await models.close(drain=True)
            return found

        reader = embed.Reader.of(
            EmbedSettings(model=str(folder), device="cpu", bits=bits, dims=36), quiet=True
        )
        wanted = list(reader.vectors([Row("", text, {}) for text in ("a", "night")], Counter()))
        assert np.allclose(np.stack(asyncio.run(made())), np.stack(wanted), atol=1e-5)


REFUSED: list[tuple[dict[str, Any], str, str | None]] = [
    ({"input": "day " * 200}, r"this model reads 64 tokens and input has \d{3}, special", "input"),
    ({"input": ["a", "day " * 200]}, "input 1 has", "input"),
    ({"input": []}, "input", "input"),
    ({"input": ""}, "input is empty", "input"),
    ({"input": ["a", ""]}, "input 1 is empty", "input"),
    ({"input": [99999]}, "ids of no token: this model knows 0 to", "input"),
    ({"dimensions": 33}, "dimensions is 33: this model's vectors have 32", "dimensions"),
    ({"encoding_format": "hex"}, "encoding_format should be 'float' or 'base64'", "encoding_format"),
    ({"model": "tiny"}, "the model tiny does not make vectors", None),
]


@pytest.mark.parametrize("given, message, param", REFUSED, ids=[str(row[0])[:30] for row in REFUSED])
def test_what_cannot_be_read_is_refused(
    client: openai.OpenAI, given: dict[str, Any], message: str, param: str | None
) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as error:
        client.embeddings.create(**{"model": "encoder", "input": "a", "encoding_format": "float", **given})
    assert error.value.param == param
