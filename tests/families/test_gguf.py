"""GGUF models: those written here and the real one equal transformers; what cannot be used is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from torch import Tensor

gguf = pytest.importorskip("gguf")

from langmill.common.errors import ModelError  # noqa: E402
from langmill.families import folder, gpt2, llama  # noqa: E402
from langmill.families.gguf import load_gguf  # noqa: E402
from langmill.families.gguf_blocks import nibbles  # noqa: E402
from langmill.families.gguf_file import read  # noqa: E402
from langmill.infer.ready import ready  # noqa: E402
from langmill.model.layers import Int4Embedding, Int4Linear, unpacked  # noqa: E402
from langmill.text.chat import chat_ids  # noqa: E402

Types = gguf.GGMLQuantizationType
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = [*LETTERS, "he", "hel", "<|endoftext|>", "<|im_end|>", "<think>"]
KINDS = [1] * 258 + [3, 3, 4]
VOCAB = 264  # one row more than there are tokens, as files padded for speed have
SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
METADATA: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": KINDS, "tokenizer.ggml.merges": ["h e", "he l"], "tokenizer.ggml.bos_token_id": 258,
    "tokenizer.ggml.eos_token_id": 258, "tokenizer.ggml.padding_token_id": 258,
    "tokenizer.chat_template": "{{ messages[0].content }}<|im_end|>",
}  # fmt: skip
SETTINGS = {
    "block_count": ("num_hidden_layers", "n_layer"), "context_length": ("max_position_embeddings", "n_positions"),
    "embedding_length": ("hidden_size", "n_embd"), "feed_forward_length": ("intermediate_size", "n_inner"),
    "attention.head_count": ("num_attention_heads", "n_head"), "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim",), "attention.sliding_window": ("sliding_window",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",), "attention.layer_norm_epsilon": ("layer_norm_epsilon",),
}  # fmt: skip


def write(path: Path, arch: str, theirs: Any, quantised: Any = None, **changes: Any) -> Path:
    """A .gguf file of a transformers model, as llama.cpp's converter writes it. changes: metadata, None drops."""
    writer = gguf.GGUFWriter(path, arch)
    config, entries = theirs.config.to_dict(), dict(METADATA)
    for key, options in SETTINGS.items():
        value = next((config[option] for option in options if config.get(option)), None)
        entries |= {f"{arch}.{key}": value} if value is not None else {}
    if arch == "gpt2":
        entries["gpt2.feed_forward_length"] = config["n_inner"] or 4 * config["n_embd"]
    entries |= rope(arch, config.get("rope_parameters") or {})
    for key, value in (entries | changes).items():
        if value is not None:
            kind = {bool: "bool", str: "string", list: "array", int: "uint32", float: "float32"}[type(value)]
            getattr(writer, f"add_{kind}")(key, value)
    for name, weight in weights(arch, theirs).items():
        whole = quantised and weight.ndim == 2 and weight.shape[1] % 32 == 0
        raw = gguf.quants.quantize(weight, quantised) if whole else weight
        writer.add_tensor(name, raw, raw_dtype=quantised if whole else None)
    finish(writer)
    return path


def finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rope(arch: str, given: dict[str, Any]) -> dict[str, Any]:
    entries = {f"{arch}.rope.freq_base": given["rope_theta"]} if given else {}
    if (kind := given.get("rope_type", "default")) in ("linear", "yarn"):
        entries |= {f"{arch}.rope.scaling.type": kind, f"{arch}.rope.scaling.factor": given["factor"]}
    if kind == "yarn":
        entries[f"{arch}.rope.scaling.original_context_length"] = given["original_max_position_embeddings"]
    return entries


def places(arch: str, theirs: Any) -> dict[str, str]:
    """llama.cpp's name of each of the model's tensors, from its own table."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], theirs.config.num_hidden_layers)
    names = [
        name for name in theirs.state_dict() if not name.endswith((".attn.bias", "masked_bias", "inv_freq"))
    ]
    tied = theirs.config.tie_word_embeddings
    kept = [name for name in names if not (tied and name == "lm_head.weight")]
    return {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in kept}


def turned(arch: str, theirs: Any, name: str, weight: Tensor, back: bool = False) -> Tensor:
    """A tensor between the two conventions: Conv1D transposed, llama's rotary pairs interleaved."""
    if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return weight.t()
    if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
        config = theirs.config
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        half = weight.shape[0] // heads // 2
        pairs = weight.reshape(heads, *((half, 2) if back else (2, half)), *weight.shape[1:])
        return pairs.transpose(1, 2).reshape(weight.shape)
    return weight


def weights(arch: str, theirs: Any) -> dict[str, np.ndarray]:
    state, names = theirs.state_dict(), places(arch, theirs)
    found = {at: turned(arch, theirs, name, state[name]).contiguous().numpy() for name, at in names.items()}
    if (getattr(theirs.config, "rope_parameters", None) or {}).get("rope_type") == "llama3":
        scaled = theirs.model.rotary_emb.inv_freq.double().numpy()
        plain = theirs.config.rope_parameters["rope_theta"] ** (-np.arange(len(scaled)) / len(scaled))
        found["rope_freqs.weight"] = (plain / scaled).astype(np.float32)
    return found


def reference(changes: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**changes))
    for name, weight in theirs.named_parameters():
        if "norm" in name or "ln_" in name or "bias" in name:
            torch.nn.init.normal_(weight, 0.5, 0.2)
    return theirs.eval()


BIG = {"num_hidden_layers": 1, "head_dim": 64, "max_position_embeddings": 131072, "num_attention_heads": 2}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
GPT2 = {**gpt2.TINY["gpt2"], "vocab_size": VOCAB, "model_type": "gpt2"}
OTHER3 = {**LLAMA3, "low_freq_factor": 2.0, "high_freq_factor": 6.0, "factor": 4.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3-published": ("llama", {**SMALL, **BIG, "model_type": "llama", "rope_parameters": LLAMA3}),
    "llama3-other": ("llama", {**SMALL, **BIG, "model_type": "llama", "rope_parameters": OTHER3}),
    "gpt2": ("gpt2", GPT2),
    "gpt2-untied": ("gpt2", {**GPT2, "tie_word_embeddings": False}),
}
for tiny, tiny_shape in llama.TINY.items():
    if tiny not in ("llama-dynamic", "qwen2-windows"):  # the format cannot say these
        model_type = tiny.partition("-")[0]
        MODELS[tiny] = (
            model_type if "qwen" in tiny else "llama",
            {**tiny_shape, **SMALL, "model_type": model_type},
        )


@pytest.mark.parametrize("name", MODELS)
def test_written_models_equal_transformers(name: str, tmp_path: Path) -> None:
    arch, shape = MODELS[name]
    theirs = reference(shape)
    model, tokenizer = load_gguf(write(tmp_path / "model.gguf", arch, theirs))
    tokens = torch.randint(0, VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert (model(tokens) - theirs(tokens).logits).abs().max() < 1e-4
    assert tokenizer is not None
    folder.save(model, tokenizer, tmp_path / "saved")
    with torch.inference_mode():  # and it leaves as a folder that transformers loads
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert (again(tokens).logits - theirs(tokens).logits).abs().max() < 1e-4


@pytest.mark.parametrize("quantised", [Types.F16, Types.BF16, Types.Q8_0, Types.Q4_0])
def test_quantised_models_equal_transformers_on_the_same_weights(quantised: Any, tmp_path: Path) -> None:
    theirs = reference(MODELS["llama"][1])
    path = write(tmp_path / "model.gguf", "llama", theirs, quantised)
    model, _ = folder.load(path)  # the general door
    for parameter in theirs.parameters():
        if parameter.ndim == 2:
            rounded = gguf.quants.dequantize(
                gguf.quants.quantize(parameter.detach().numpy(), quantised), quantised
            )
            parameter.data = torch.from_numpy(rounded)
    theirs.tie_weights()
    tokens = torch.randint(0, VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert (model(tokens) - theirs(tokens).logits).abs().max() < 1e-4
    assert load_gguf(path, dtype=torch.bfloat16)[0].tokens.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "llama3-other", "gpt2"])
@pytest.mark.parametrize("quantised", [Types.Q4_0, Types.Q4_1])
def test_four_bits_that_stay_are_the_same_weights(name: str, quantised: Any, tmp_path: Path) -> None:
    arch, shape = MODELS[name]
    path = write(tmp_path / "model.gguf", arch, reference(shape), quantised)
    kept, plain = folder.load(path, keep=True)[0], load_gguf(path)[0]
    stayed = [name for name, layer in kept.named_modules() if isinstance(layer, Int4Linear | Int4Embedding)]
    used = [ready(str(path), dtype, "cpu")[0].modules() for dtype in ("auto", "float32")]
    assert [any(isinstance(layer, Int4Linear) for layer in layers) for layers in used] == [
        bool(stayed),
        False,
    ]
    assert bool(stayed) == (arch != "gpt2") and ("tokens" in stayed) == bool(stayed)
    for layer in stayed:
        assert torch.equal(kept.get_submodule(layer).weight, plain.get_submodule(layer).weight), layer
    rest = {
        name: weight for name, weight in plain.state_dict().items() if name.rpartition(".")[0] not in stayed
    }
    assert all(torch.equal(weight, kept.state_dict()[name]) for name, weight in rest.items())


def test_supers_of_llama_cpp_stay_in_four_bits(tmp_path: Path) -> None:
    """Q4_K, which the gguf package reads and does not write: blocks of arbitrary bytes, steps and minima in range."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (64, 3, 144), dtype=np.uint8)
    blocks[..., :4] = rng.uniform(1e-4, 1e-2, (64, 3, 2)).astype(np.float16).view(np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "llama")
    writer.add_tensor("k", blocks.reshape(64, -1), raw_dtype=Types.Q4_K)
    blocks = blocks.copy()
    blocks[5, 1, :2] = np.array([6e4], np.float16).view(np.uint8)  # 63 of these are beyond float16's largest
    writer.add_tensor("wide", blocks.reshape(64, -1), raw_dtype=Types.Q4_K)
    finish(writer)
    file = read(tmp_path / "k.gguf")
    kept = nibbles(file, "k")
    assert kept is not None and kept.lows is not None and nibbles(file, "wide") is None
    weight, exact = unpacked(*kept, torch.float32), torch.from_numpy(file.dequantize("k"))
    assert weight.shape == (64, 768)
    most_OG = 2.0**-11 * (15.1 * kept.steps.float() + kept.lows.float().abs())  # of float16's rounding
    assert ((weight - exact).abs().unflatten(1, (-1, 32)) <= most_OG[..., None]).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"llama.block_count": 2**31 - 1}, "tensors of 2 blocks"),
        ({"llama.block_count": "2"}, "llama.block_count is '2'"),
        ({"llama.embedding_length": 2**31 - 1}, "model.embed_tokens.weight has shape"),
        ({"llama.attention.head_count": 3}, "heads"),
        ({"llama.attention.head_count_kv": [2, 1]}, "llama.attention.head_count_kv is"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is None"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon is nan"),
        ({"llama.expert_count": 8}, "llama.expert_count = 8 is not supported"),
        ({"llama.rope.dimension_count": 4}, "rope.dimension_count = 4 is not supported"),
        ({"llama.rope.scaling.type": "longrope"}, "'longrope'; supported are"),
        ({"split.count": 3}, "one part of a split model"),
        ({"llama.expert_count": [1, 2]}, "llama.expert_count is a list of 2"),
        ({"llama.rope.scaling.type": ["yarn"]}, "rope.scaling.type is a list of 1"),
        ({"tokenizer.ggml.model": ["gpt2"]}, "tokenizer.ggml.model is a list of 1"),
        ({"tokenizer.ggml.pre": [1, 2]}, "tokenizer.ggml.pre is a list of 2"),
        ({"tokenizer.ggml.bos_token_id": [1, 2]}, "bos_token_id is a list of 2"),
        ({"tokenizer.ggml.add_bos_token": [True, False]}, "add_bos_token is a list of 2"),
        ({"tokenizer.ggml.token_type": ["a"] * 261}, "a type for each of 261 tokens"),
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model is 'bert'"),
        ({"tokenizer.ggml.model": "t5"}, "tokenizer.ggml.model is 't5'"),
        ({"tokenizer.ggml.pre": "new-thing"}, "the pre-tokenizer 'new-thing'"),
        ({"tokenizer.ggml.pre": None}, "the pre-tokenizer None"),
        ({"tokenizer.ggml.tokens": [*TOKENS[:-1], "h"]}, "holds 'h' twice"),
        ({"tokenizer.ggml.token_type": [1]}, "a type for each of 261 tokens"),
        ({"tokenizer.ggml.merges": ["he"]}, "merges[0] is 'he'"),
        ({"tokenizer.ggml.merges": ["h zz"]}, "cannot be rebuilt"),
        ({"tokenizer.ggml.eos_token_id": 999}, "eos_token_id is 999"),
        ({"tokenizer.ggml.tokens": [*TOKENS, *"0123456789"], "tokenizer.ggml.token_type": None}, "holds '0' twice"),
        ({"tokenizer.ggml.tokens": [*TOKENS, *"你我他她"], "tokenizer.ggml.token_type": None}, "do not belong"),
    ],
)  # fmt: skip
def test_metadata_that_cannot_be_used(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "bad.gguf", "llama", reference(MODELS["llama"][1]), **changes)
    with pytest.raises(ModelError) as caught:
        load_gguf(path)
    assert words in str(caught.value) and "bad.gguf" in str(caught.value)


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = write(tmp_path_factory.mktemp("gguf") / "valid.gguf", "llama", reference(MODELS["llama"][1]))
    return path.with_name("damaged.gguf"), path.read_bytes()


@settings(max_examples=150)
@given(data=st.data())
def test_damaged_files_load_or_are_refused(valid: tuple[Path, bytes], data: st.DataObject) -> None:
    path, content = valid
    head = content.index(b"token_embd.weight") + 2000  # damage where the structure is
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, head))
        new = data.draw(
            st.sampled_from([b"\0", b"\xff", b"\xff" * 8, b"\x01", b"\x7f", bytes(8), b"\x80\0\0\0"])
        )
        damaged[at : at + len(new)] = new
    path.write_bytes(damaged[: data.draw(st.sampled_from([len(damaged), head, head // 2, 100]))])
    try:
        load_gguf(path)
    except ModelError as error:
        assert str(error)


# The real model


@pytest.fixture(scope="module")
def real(asset: Callable[[str], Path]) -> Path:
    return next(asset("smollm2").rglob("*.gguf"))


PROMPTS = ("The capital of France is", "Water boils at", "def add(a, b):", "Once upon a time", "1, 2, 3,",
           "Dear Sir or Madam,", "The three primary colours are", "import numpy",
           "Q: Why is the sky blue?\nA:", "她说")  # fmt: skip


@torch.inference_mode()
def test_the_real_model_equals_transformers(real: Path) -> None:
    model, tokenizer = load_gguf(real)
    shape = {**SMALL, "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
             "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
             "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}, "tie_word_embeddings": True}  # fmt: skip
    theirs = reference({**shape, "model_type": "llama"})
    file = read(real)
    for name, at in places("llama", theirs).items():
        weight = torch.from_numpy(file.dequantize(at))
        theirs.get_parameter(name).data = turned("llama", theirs, name, weight, back=True)
    theirs.tie_weights()
    assert tokenizer is not None
    question = chat_ids(tokenizer, [{"role": "user", "content": "What is the capital of France?"}])
    prompts = [*(tokenizer.encode(prompt) for prompt in PROMPTS), question]
    rows = greedy(model, prompts, 64)
    answer = rows[-1][len(question) :]
    stop = next(i for i, id in enumerate(answer) if id in tokenizer.stop_ids)
    assert "Paris" in tokenizer.decode(answer[:stop])
    longest = max(map(len, rows))
    batch = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    logits = theirs(batch).logits
    for prompt, row, scores in zip(prompts, rows, logits, strict=True):  # theirs chooses the same 64 tokens
        assert scores[len(prompt) - 1 : len(row) - 1].argmax(-1).tolist() == row[len(prompt) :]
        assert len(row) == len(prompt) + 64
    assert (model(batch[-3:]) - logits[-3:]).abs().max() < 2e-3


def greedy(model: Any, prompts: list[list[int]], new: int) -> list[list[int]]:
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    tokens = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    cache = model.new_cache(len(prompts), tokens.shape[1] + new)
    logits: Tensor = model(tokens, cache=cache, lengths_B=lengths)
    last = logits[torch.arange(len(prompts)), lengths - 1].argmax(-1)
    rows = [[*prompt, int(id)] for prompt, id in zip(prompts, last, strict=True)]
    for _ in range(new - 1):
        last = model(last[:, None], cache=cache)[:, -1].argmax(-1)
        for row, id in zip(rows, last.tolist(), strict=True):
            row.append(id)
    return rows
