"""A pretraining step against transformers', eager and compiled, interleaved in one run; one JSON object."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from _figures import spread

from langmill.model.config import Head, ModelConfig, StackConfig, Tokens
from langmill.model.count import parameters, training_flops
from langmill.model.init import init_
from langmill.model.transformer import Transformer
from langmill.train.objectives import causal

SHAPES = {  # layers, dim, heads, hidden, vocabulary, rows, length
    "14m": (6, 384, 6, 1024, 8192, 16, 256),
    "350m": (24, 1024, 16, 2816, 32000, 16, 1024),  # for a GPU
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="14m")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    layers, dim, heads, hidden, vocabulary, rows, length = SHAPES[options.shape]
    config = ModelConfig(
        StackConfig(dim, layers, heads, heads, dim // heads, hidden),
        Tokens(vocabulary, length),
        head=Head(vocabulary),
    )
    device = torch.device(options.device)
    steps = {
        "transformers_eager": step(theirs(config), their_loss, False, config, rows, device, options.dtype),
        "transformers_compiled": step(theirs(config), their_loss, True, config, rows, device, options.dtype),
        "langmill_eager": step(ours(config), our_loss, False, config, rows, device, options.dtype),
        "langmill_compiled": step(ours(config), our_loss, True, config, rows, device, options.dtype),
    }
    rates: dict[str, list[float]] = {name: [] for name in steps}
    products: list[float] = []
    for run in steps.values():
        run(), run()
    for _ in range(options.rounds):
        products.append(product_rate(rows * length, dim, hidden, device, options.dtype))
        for name, run in steps.items():
            rates[name].append(rows * length / run())
    flops, machine = training_flops(config, length), max(products)
    report: dict[str, Any] = {
        "parameters": parameters(config),
        "product_gflops": spread([p / 1e9 for p in products], 3),
        "tokens_per_second": {name: spread(values, 3) for name, values in rates.items()},
        "share_of_products": {
            name: round(statistics.median(values) * flops / machine, 3) for name, values in rates.items()
        },
    }
    for mode in ("eager", "compiled"):
        mine = rates["langmill_compiled"]
        ratios = [a / b for a, b in zip(mine, rates[f"transformers_{mode}"], strict=True)]
        report[f"compiled_over_transformers_{mode}"] = spread(ratios, 3)
    eager = zip(rates["langmill_eager"], rates["transformers_eager"], strict=True)
    report["eager_over_transformers_eager"] = spread([a / b for a, b in eager], 3)
    print(json.dumps(report))


def theirs(config: ModelConfig) -> torch.nn.Module:
    d = config.decoder
    shape = transformers.LlamaConfig(
        vocab_size=config.vocab, hidden_size=d.dim, intermediate_size=d.hidden, num_hidden_layers=d.layers,
        num_attention_heads=d.heads, max_position_embeddings=config.length, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(shape)


def ours(config: ModelConfig) -> torch.nn.Module:
    model = Transformer(config)
    init_(model, 0)
    return model


def their_loss(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens, labels=tokens).loss


def our_loss(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    targets = torch.full_like(tokens, -100)
    targets[:, :-1] = tokens[:, 1:]
    loss, count = causal(model, {"tokens": tokens, "targets": targets})
    return loss / count


def step(
    model: torch.nn.Module,
    loss: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor],
    compiled: bool,
    config: ModelConfig,
    rows: int,
    device: torch.device,
    dtype: str,
) -> Callable[[], float]:
    """One whole optimiser step on fresh random tokens, and the seconds it took."""
    model = model.to(device).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward = torch.compile(loss) if compiled else loss

    def run() -> float:
        tokens = torch.randint(config.vocab, (rows, config.length), device=device)
        began = time.perf_counter()
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            value = forward(model, tokens)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        value.item()
        return time.perf_counter() - began

    return run


def product_rate(tokens: int, dim: int, hidden: int, device: torch.device, dtype: str) -> float:
    """The best of some products of this model's own shape, FLOP/s."""
    kind = getattr(torch, dtype)
    x, w = (
        torch.randn(tokens, hidden, device=device, dtype=kind),
        torch.randn(dim, hidden, device=device, dtype=kind),
    )
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        F.linear(x, w).sum().item()
        best = min(best, time.perf_counter() - began)
    return 2 * tokens * dim * hidden / best


if __name__ == "__main__":
    main()
