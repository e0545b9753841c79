"""A whole model in fewer bits: which layers, in what order, and that text helps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from langmill.adapt.lora import adapt
from langmill.common.errors import ModelError
from langmill.common.settings import LoRASettings
from langmill.compress import quantize
from langmill.compress.quantize import plan, quantise
from langmill.model.config import Head, Learned, LSTMConfig, ModelConfig, Relative, Rope, StackConfig, Tokens
from langmill.model.init import init_
from langmill.model.layers import Int4Embedding, Int4Linear, Int8Embedding, Int8Linear
from langmill.model.recurrent import LSTM
from langmill.model.transformer import Transformer


def shape(**changed: Any) -> StackConfig:
    plain = {
        "dim": 64,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "hidden": 96,
        "position": Rope(),
    }
    return StackConfig(**(plain | changed))


CONFIGS = {
    "decoder": ModelConfig(shape(), Tokens(97, 64), head=Head(97)),
    "untied": ModelConfig(shape(gated=False, bias=frozenset({"q", "mlp"})), Tokens(97, 64), head=Head(97, False)),
    "encoder": ModelConfig(
        encoder=shape(position=Learned(), causal=False, kv_heads=4), encoder_input=Tokens(97, 64), head=Head(97)
    ),
    "classifier": ModelConfig(
        encoder=shape(position=Learned(), causal=False), encoder_input=Tokens(97, 64),
        head=Head(3, False, True, pool="first", task="classify"),
    ),
    "both": ModelConfig(
        shape(position=Relative(), cross=True), Tokens(97, 64, start=0), shape(position=Relative(), causal=False),
        Tokens(97, 64), Head(97),
    ),
}  # fmt: skip


def network(kind: str) -> Transformer:
    """Random weights of a size at which attention attends and correlated inputs arise."""
    model = Transformer(CONFIGS[kind])
    init_(model, 0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.mul_(6.0 if "blocks" in name else 10.0)
    return model.eval()


def batches(kind: str, seed: int = 0, count: int = 6) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def tokens() -> Tensor:
        return torch.randint(0, 97, (4, 48), generator=generator)

    return [
        {"tokens_BT": tokens(), **({"encoder_tokens": tokens()} if kind == "both" else {})}
        for _ in range(count)
    ]


def distance(model: Transformer, other: Transformer, given: list[dict[str, Any]]) -> float:
    with torch.no_grad():
        pairs = [(model.hidden(**batch), other.hidden(**batch)) for batch in given]
    return float(sum((a - b).norm() for a, b in pairs) / sum(b.norm() for _, b in pairs))


@pytest.mark.parametrize("kind", CONFIGS)
def test_text_makes_four_bits_better_and_eight_are_near(kind: str) -> None:
    model, fresh = network(kind), batches(kind, seed=9)
    close, simple, eight = (copy.deepcopy(model) for _ in range(3))
    wanted = plan(model, 4, head_bits=16)
    done = quantise(close, wanted, batches(kind))
    plain = quantise(simple, wanted)
    quantise(eight, plan(eight, 8))
    assert {d.name for d in done} == {d.name for d in plain} == set(wanted.roundings)
    assert {d.method for d in done} == {"gptq"} and {d.method for d in plain} == {"nearest"}
    assert all(isinstance(close.get_submodule(d.name), Int4Linear) for d in done)
    assert distance(close, model, fresh) < 0.9 * distance(simple, model, fresh)
    assert distance(eight, model, fresh) < 0.05
    for change in done:
        assert (
            change.output_error is not None
            and 0 < change.output_error < 0.3
            and change.bytes * 7 < change.bytes_before
        )


@pytest.mark.parametrize("kind", ["decoder", "both"])
def test_each_block_is_rounded_on_what_the_rounded_ones_before_it_give(kind: str) -> None:
    """The second block's Hessian is that of the model whose first block is rounded already."""
    model, given = network(kind), batches(kind, count=2)
    seen: dict[str, Tensor] = {}
    real = quantize.gptq

    def spy(weight: Tensor, hessian: Any, *rest: Any) -> Any:
        seen[str(len(seen))] = hessian.sum_II.clone()
        return real(weight, hessian, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "gptq", spy)
        names = [d.name for d in quantise(model, plan(model, 4, 16), given)]
    hessians = dict(zip(names, seen.values(), strict=True))
    for name in names:
        if (
            name.split(".")[2] == "1"
        ):  # the rounded model as it is now, but for the block itself, gives its inputs
            before = copy.deepcopy(model)
            own: dict[str, Tensor] = {}
            block = before.get_submodule(".".join(name.split(".")[:3]))
            original = network(kind).get_submodule(".".join(name.split(".")[:3]))
            block.load_state_dict(original.state_dict(), strict=False)
            for leaf, layer in original.named_modules():
                if isinstance(layer, nn.Linear):
                    quantize._put(block, leaf, layer)
            sums = torch.zeros_like(hessians[name])

            def add(layer: nn.Module, x: tuple[Tensor], sums: Tensor = sums) -> None:
                flat = x[0].flatten(0, -2)
                sums += flat.T @ flat

            hook = before.get_submodule(name).register_forward_pre_hook(add)  # type: ignore[arg-type]
            with torch.no_grad():
                for batch in given:
                    before.hidden(**batch)
            hook.remove()
            assert float((sums - hessians[name]).norm()) < 0.02 * float(sums.norm()), (name, own)


def test_the_plan_names_bits_for_every_matrix_and_what_stays() -> None:
    model = network("untied")
    linear = {f"decoder.blocks.{i}.{n}" for i in range(2) for n in ("attention.q", "attention.k", "attention.v",
                                                                   "attention.o", "mlp.up", "mlp.down")}  # fmt: skip
    found = plan(model, 4)
    assert {n: r.bits for n, r in found.roundings.items()} == {
        **dict.fromkeys(linear, 4),
        "tokens": 8,
        "head": 8,
    }
    assert (
        found.roundings["tokens"].digits == 4
        and plan(model, 8, portable=False).roundings["tokens"].digits == 8
    )
    assert set(plan(model, 4, 16).roundings) == linear
    assert plan(model, 4, 4, symmetric=False).roundings["decoder.blocks.0.mlp.up"].symmetric is False
    assert set(plan(network("classifier"), 8).roundings) & {"head", "tokens"} == {"tokens"}
    quantise(model, plan(model, 4, 4))
    assert isinstance(model.tokens, Int4Embedding) and isinstance(model.head, Int4Linear)
    quantise(tied := network("decoder"), plan(tied, 4))
    assert isinstance(tied.tokens, Int8Embedding) and not isinstance(
        tied.decoder.blocks[0].mlp.up, Int8Linear
    )  # type: ignore[union-attr,index]
    odd = Transformer(ModelConfig(shape(hidden=40), Tokens(97, 64), head=Head(97)))
    left = plan(odd, 4).left
    assert left == {f"decoder.blocks.{i}.mlp.down": "40 inputs are not a multiple of 32" for i in range(2)}
    with torch.no_grad():
        odd.decoder.blocks[0].mlp.up.weight[0, 0] = 1e5  # type: ignore[union-attr,index]
    assert "float16" in plan(odd, 4).left["decoder.blocks.0.mlp.up"]


def test_what_cannot_be_rounded_is_refused() -> None:
    with pytest.raises(ModelError, match="LSTM"):
        plan(LSTM(LSTMConfig(97, 32, 64, 64)), 8)
    model = network("decoder")
    quantise(model, plan(model, 8))
    with pytest.raises(ModelError, match="rounded already"):
        plan(model, 4)
    adapted = network("decoder")
    adapt(adapted, LoRASettings(lora_r=2), 0)
    with pytest.raises(ModelError, match="merge"):
        plan(adapted, 4)
    damaged = network("decoder")
    with torch.no_grad():
        damaged.decoder.blocks[1].attention.q.weight[0, 0] = torch.nan  # type: ignore[union-attr,index]
    with pytest.raises(ModelError, match=r"blocks\.1\.attention\.q holds weights that are not finite"):
        plan(damaged, 4)
