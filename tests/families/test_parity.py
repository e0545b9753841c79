"""Every family's TINY against transformers, through files that save_pretrained wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from langmill.common.errors import ModelError
from langmill.families import family, folder

TINY = {name: shape for kind in ("gpt2", "llama") for name, shape in family(kind, "test").TINY.items()}
FULL = {
    "gpt2": {},
    "llama": {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_key_value_heads": 8},
    "mistral": {},
    "qwen2": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
              "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {},
}  # fmt: skip


def reference(name: str, where: Path) -> Any:
    """transformers' model of random weights, saved by itself."""
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    config = transformers.AutoConfig.for_model(name.split("-")[0], **TINY[name], **ids)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():  # biases and norms too, which start as 0 and 1
        weight.data.normal_(1.0 if weight.dim() == 1 else 0.0, 0.1)
    model.save_pretrained(where)
    return model


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_logits_names_and_cache_agree_with_transformers(name: str, tmp_path: Path) -> None:
    theirs = reference(name, tmp_path / "theirs")
    ours = folder.load_model(tmp_path / "theirs")
    tokens = torch.randint(0, 97, (2, 60), generator=torch.Generator().manual_seed(1))
    expected, logits = theirs(tokens).logits, ours(tokens)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)

    cache = ours.new_cache(2, 60)
    steps = [ours(tokens[:, :20], cache=cache)]
    steps += [ours(tokens[:, place : place + 1], cache=cache) for place in range(20, 50)]
    steps += [ours(tokens[:, 50:], cache=cache)]  # several at once behind a cache
    torch.testing.assert_close(torch.cat(steps, dim=1), logits, atol=1e-4, rtol=0)

    folder.save(ours, None, tmp_path / "ours")
    before, after = (load_file(tmp_path / side / "model.safetensors") for side in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert type(again) is type(theirs)
    torch.testing.assert_close(again(tokens).logits, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_rows_of_unequal_length_do_not_disturb_each_other(name: str, tmp_path: Path) -> None:
    reference(name, tmp_path)
    model = folder.load_model(tmp_path)
    rows = [torch.arange(5), torch.arange(30, 42), torch.arange(60, 61)]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    cache = model.new_cache(3, 20)
    model(padded, cache=cache, lengths_B=lengths)
    following = torch.tensor([[7, 8], [9, 10], [11, 12]])
    together = torch.cat([model(following[:, i : i + 1], cache=cache) for i in range(2)], dim=1)
    cache.select(torch.tensor([2, 0]))
    last = model(torch.tensor([[1], [2]]), cache=cache)
    for row, alone in enumerate(rows):
        logits = model(torch.cat([alone, following[row]])[None])
        torch.testing.assert_close(together[row], logits[0, -2:], atol=1e-5, rtol=0)
    expected = model(torch.cat([rows[2], following[2], torch.tensor([1])])[None])[0, -1]
    torch.testing.assert_close(last[0, 0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", FULL)
def test_full_size_shapes_agree_on_the_meta_device(name: str) -> None:
    theirs = transformers.AutoConfig.for_model(name, **FULL[name])
    with torch.device("meta"):
        state = transformers.AutoModelForCausalLM.from_config(theirs).state_dict()
    module = family(name, "test")
    config = module.config(theirs.to_dict())
    with torch.device("meta"):
        ours = folder.Transformer(config)
    mine = dict(ours.named_parameters())
    rules = module.rules(config)
    for rule in rules:
        shapes = [mine[part].shape for part in rule.ours]
        joined = [sum(shape[0] for shape in shapes), *shapes[0][1:]]
        assert tuple(state[rule.theirs].shape) == tuple(joined[::-1] if rule.transposed else joined), rule
    tied = {"lm_head.weight"} if config.head.tied else set()
    assert {rule.theirs for rule in rules} == state.keys() - tied
    assert module.config(module.export(config)) == config


def test_a_body_without_head_names_loads_too(tmp_path: Path) -> None:
    """The hub's oldest GPT-2 files come from the body alone and carry masks as buffers."""
    theirs = reference("gpt2", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    bare = {key.removeprefix("transformer."): tensor for key, tensor in state.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file(bare, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tokens = torch.arange(9)[None]
    torch.testing.assert_close(folder.load_model(tmp_path)(tokens), theirs(tokens).logits, atol=1e-5, rtol=0)


def damage_config(where: Path, **changes: Any) -> None:
    path = where / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "'mamba' is not supported; known are"),
        ({"hidden_size": 64}, r"has shape \(97, 32\)"),
        ({"num_hidden_layers": 3}, "layers.2.* is missing"),
        ({"num_hidden_layers": 1}, "layers.1.* is not part of this model"),
        ({"hidden_act": "snake"}, "hidden_act is 'snake'; supported are"),
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"vocab_size": 2**50}, "vocab_size is"),
        ({"intermediate_size": 2**39}, "has shape"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type is 'longrope'"),
        ({"rope_parameters": [1]}, "rope_parameters is"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
        ({"num_key_value_heads": 3}, "cannot share"),
        ({"num_hidden_layers": 2**39}, "num_hidden_layers is"),
        ({"num_hidden_layers": 16000}, "16000 layers are announced"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps is 'x'"),
        ({"hidden_act": ["silu"]}, "hidden_act is"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
        ({"rope_parameters": {"rope_theta": [1]}}, r"rope_theta is \[1\]"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": -2}}, "factor is -2"),
        (
            {"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": "q"}},
            "embeddings is 'q'",
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "low_freq_factor": 4.0}},
            "low_freq_factor must be smaller",
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantised \(gptq\)"),
    ],
)
def test_wrong_configurations_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    reference("llama", tmp_path)
    damage_config(tmp_path, **changes)
    with pytest.raises(ModelError, match=message) as caught:
        folder.load_model(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_window_layers": "x"}, "max_window_layers is 'x'"),
        ({"layer_types": [["a"], 2]}, "layer_types must name"),
        ({"layer_types": 5}, "layer_types must name"),
    ],
)
def test_wrong_windows_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    reference("qwen2-windows", tmp_path)
    damage_config(tmp_path, **{"layer_types": None, **changes})
    with pytest.raises(ModelError, match=message):
        folder.load_model(tmp_path)


@torch.no_grad()
def test_an_output_matrix_of_its_own_counts_where_the_configuration_ties_it(tmp_path: Path) -> None:
    """transformers 5 keeps the file's matrix where the two differ, and so do the logits here."""
    reference("llama-biased", tmp_path)
    damage_config(tmp_path, tie_word_embeddings=True)
    theirs, tokens = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval(), torch.arange(9)[None]
    ours = folder.load_model(tmp_path)
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=0)
    folder.save(ours, None, tmp_path / "again")
    assert torch.equal(folder.load_model(tmp_path / "again")(tokens), ours(tokens))


def test_weights_that_are_no_floats_are_refused(tmp_path: Path) -> None:
    reference("llama", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({name: tensor.to(torch.int8) for name, tensor in state.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="holds torch.int8"):
        folder.load_model(tmp_path)


def test_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        folder.load_model(tmp_path)
    reference("llama", tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    for cut in (4, 40, len(whole) - 100):
        weights.write_bytes(whole[:cut])
        with pytest.raises(ModelError, match="cannot be read"):
            folder.load_model(tmp_path)
    weights.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ModelError, match="pickle"):
        folder.load_model(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    with pytest.raises(ModelError, match="not a file of this folder"):
        folder.load_model(tmp_path)


def test_sharded_folders_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference("llama", tmp_path / "theirs")
    model = folder.load_model(tmp_path / "theirs")
    monkeypatch.setattr(folder, "SHARD_BYTES", 20_000)
    folder.save(model, None, tmp_path / "ours")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    tokens = torch.arange(9)[None]
    assert torch.equal(folder.load_model(tmp_path / "ours")(tokens), model(tokens))
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
