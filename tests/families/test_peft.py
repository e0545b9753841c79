"""Adapters against PEFT: the same logits through saved files, in both directions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from langmill.adapt.lora import adapt
from langmill.common.errors import ModelError
from langmill.common.settings import LoRASettings
from langmill.families import modules
from langmill.families.folder import load
from langmill.families.peft import adapters, load_adapter, low_ranks, merge, write_adapter
from langmill.model.layers import Int4Linear

TINY = {name: shape for module in modules().values() for name, shape in getattr(module, "TINY", {}).items()}
KINDS = ("llama", "llama-biased", "qwen2", "qwen3", "gpt2")
VARIANTS: dict[str, dict[str, Any]] = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
TOKENS = torch.arange(3, 40)[None] % 97


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of each kind, as transformers writes it."""
    import transformers

    found = {}
    for name in KINDS:
        kind = name.partition("-")[0]
        torch.manual_seed(1)
        config = transformers.AutoConfig.for_model(kind, **TINY[name], bos_token_id=1, eos_token_id=2)
        found[name] = tmp_path_factory.mktemp(name)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(found[name])
    return found


def random_(weights: dict[str, torch.Tensor]) -> None:
    """Fill an adapter's weights, so that it changes something."""
    for name, weight in sorted(weights.items()):
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name)))
        with torch.no_grad():
            weight.copy_(
                weight * (1 + 0.1 * noise) if "magnitude" in name or name.endswith(".m") else 0.2 * noise
            )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_pefts_in_both_directions(
    bases: dict[str, Path], kind: str, variant: str, tmp_path: Path
) -> None:
    import peft
    import transformers

    named: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    }
    config = peft.LoraConfig(**named, fan_in_fan_out=kind == "gpt2", **VARIANTS[variant])
    theirs = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(bases[kind]), config)
    random_({name: w for name, w in theirs.named_parameters() if "lora" in name})
    theirs.save_pretrained(tmp_path / "theirs")
    expected = theirs.eval()(TOKENS).logits
    model, _ = load(bases[kind])
    load_adapter(model, tmp_path / "theirs")
    torch.testing.assert_close(model(TOKENS), expected, rtol=1e-5, atol=1e-5)
    base = load(bases[kind])[0]
    assert (model(TOKENS) - base(TOKENS)).abs().max() > 0.01
    kept, layers = low_ranks(base, tmp_path / "theirs"), dict(adapters(model))
    assert kept.keys() == layers.keys() and not any(adapters(base))
    for name, one in kept.items():
        whole_OI = layers[name].base.weight + one.b_OR @ one.a_RI
        whole_OI = whole_OI if one.lengths_O is None else one.lengths_O[:, None] * whole_OI
        torch.testing.assert_close(whole_OI, layers[name].weight)

    (tmp_path / "ours").mkdir()
    write_adapter(model, tmp_path / "ours", str(bases[kind]))
    if kind != "gpt2":  # there one A for q, k and v becomes three
        theirs_file, ours_file = (
            load_file(tmp_path / n / "adapter_model.safetensors") for n in ("theirs", "ours")
        )
        assert all(torch.equal(theirs_file[name], ours_file[name]) for name in theirs_file | ours_file)
    again = transformers.AutoModelForCausalLM.from_pretrained(bases[kind])
    again = peft.PeftModel.from_pretrained(again, tmp_path / "ours").eval()
    torch.testing.assert_close(again(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
    names = merge(model)
    torch.testing.assert_close(model(TOKENS), expected, rtol=1e-5, atol=1e-5)
    assert len(names) == sum("lora_A" in n for n, _ in theirs.named_parameters()) + (
        4 if kind == "gpt2" else 0
    )


def test_an_adapter_made_on_a_model_without_its_head_is_read_and_one_of_words_refused(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    import peft
    import transformers

    def made(place: Path, targets: Any) -> Any:
        config = peft.LoraConfig(r=4, target_modules=targets)
        theirs = peft.get_peft_model(transformers.AutoModel.from_pretrained(bases["llama"]), config)
        random_({name: w for name, w in theirs.named_parameters() if "lora" in name})
        theirs.save_pretrained(place)
        return theirs.eval()

    theirs = made(tmp_path / "stack", "all-linear")
    whole = transformers.AutoModelForCausalLM.from_pretrained(bases["llama"])
    model, _ = load(bases["llama"])
    load_adapter(model, tmp_path / "stack")
    expected = whole.lm_head(theirs(TOKENS).last_hidden_state)
    torch.testing.assert_close(model(TOKENS), expected, rtol=1e-5, atol=1e-5)
    made(tmp_path / "words", ["q_proj", "embed_tokens"])
    with pytest.raises(ModelError, match="embed_tokens.lora_embedding_A changes the model's words"):
        load_adapter(load(bases["llama"])[0], tmp_path / "words")


def test_a_fresh_adapter_changes_nothing_and_trains_alone(bases: dict[str, Path]) -> None:
    model, plain = load(bases["llama"])[0], load(bases["llama"])[0]
    names = adapt(model, LoRASettings(lora_r=4, use_dora=True, lora_targets=["q_proj", "down"]), 0)
    assert len(names) == 4
    torch.testing.assert_close(model(TOKENS), plain(TOKENS), rtol=1e-6, atol=1e-6)
    model(TOKENS).sum().backward()
    trained = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert trained == {f"{name}.{part}" for name, _ in adapters(model) for part in ("a", "b", "m")}


def test_four_bits_meet_the_weights_and_keep_nothing_for_the_backward_pass() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 48)
    four = Int4Linear.of(layer)
    step = (layer.weight.unflatten(1, (2, 32)).amax(-1) - layer.weight.unflatten(1, (2, 32)).amin(-1)) / 15
    assert ((four.weight - layer.weight).abs().unflatten(1, (2, 32)) <= 0.51 * step[..., None] + 1e-4).all()
    assert sum(b.nbytes for b in four.buffers()) / (layer.weight.numel() * 4) <= 0.17
    x = torch.randn(5, 64, requires_grad=True)
    saved: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.shape), t)[1], lambda t: t):
        y = four(x)
    y.square().sum().backward()
    expected = (2 * y.detach()) @ four.weight
    torch.testing.assert_close(x.grad, expected)
    assert torch.Size([48, 64]) not in saved
    again = Int4Linear.of(torch.nn.Linear(64, 48, bias=False))
    again.codes, again.steps, again.lows = four.codes, four.steps, four.lows
    once_more = torch.nn.Linear(64, 48, bias=False)
    once_more.weight = torch.nn.Parameter(four.weight)
    torch.testing.assert_close(Int4Linear.of(once_more).weight, four.weight, rtol=1e-3, atol=1e-4)


def doubled(file: bytes) -> bytes:
    """A safetensors file whose header holds its first tensor twice."""
    size = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + size])
    name = next(key for key in header if key != "__metadata__")
    text = f"{{{json.dumps(name)}: {json.dumps(header[name])}, {json.dumps(header)[1:]}".encode()
    return len(text).to_bytes(8, "little") + text + file[8 + size :]


def test_a_model_with_a_tensor_named_twice_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(bases["llama"], tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(doubled(file.read_bytes()))
    with pytest.raises(ModelError, match="occurs twice: make or fetch the file again"):
        load(tmp_path / "model")


def test_adapters_of_another_model_or_kind_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    model, _ = load(bases["llama"])
    adapt(model, LoRASettings(lora_r=4), 0)
    write_adapter(model, tmp_path, "x")
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    whole, settings = weights.read_bytes(), json.loads(config.read_text())

    def refused(words: str, base: str = "llama", **changed: Any) -> None:
        config.write_text(json.dumps(settings | changed))
        fresh, _ = load(bases[base])
        before = fresh(TOKENS)
        with pytest.raises(ModelError, match=words):
            load_adapter(fresh, tmp_path)
        assert torch.equal(fresh(TOKENS), before) and not list(adapters(fresh))

    refused("another model or another rank", r=8)
    refused("belongs to no layer of this model", base="gpt2")
    refused("this model needs", base="qwen3")
    refused("peft_type is 'IA3'", peft_type="IA3")
    refused("modules_to_save", modules_to_save=["lm_head"])
    refused("not whole", use_dora=True)
    refused("lora_alpha is None", lora_alpha=None)
    refused("r is 1e\\+300; a number above 0, at most", r=1e300)
    refused("rank_pattern is no mapping", rank_pattern=[4])
    refused("lora_dropout is 'x'", lora_dropout="x")
    refused("target_modules in its adapter_config.json does not name", target_modules=["q_proj"])
    whole_numbers = {name: tensor.to(torch.int32) for name, tensor in load_file(weights).items()}
    save_file(whole_numbers, weights)
    refused("torch.int32, and an adapter's numbers are floats")
    weights.write_bytes(doubled(whole))
    refused("occurs twice")
    weights.write_bytes(whole)
    tensors = load_file(weights)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, weights)
    refused("not whole")
    weights.write_bytes(whole[: len(whole) // 2])
    refused("cut short")
    weights.unlink()
    refused("has no adapter_model")
