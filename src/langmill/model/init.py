"""First weights."""

from __future__ import annotations

import torch
from torch import nn

from langmill.model.blocks import MLP, Attention
from langmill.model.recurrent import LSTM
from langmill.model.transformer import Stack, Transformer


@torch.no_grad()
def init_(model: Transformer | LSTM, seed: int) -> None:
    """Fill a model with fresh weights from `seed` alone, whatever was drawn before.

    Normal with deviation 0.02; projections that write to the residual stream are divided by
    sqrt(2 · layers) (3 with cross-attention) so that its variance does not grow with depth (Radford et al. 2019,
    section 2.3).
    LSTM matrices are uniform in ±1/sqrt(hidden), with forget gates open (Jozefowicz et al. 2015).
    """
    generator = torch.Generator(device=model.tokens.weight.device).manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.normal_(0.0, 0.02, generator=generator)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.RMSNorm | nn.LayerNorm):
            nn.init.ones_(module.weight)
            if isinstance(module, nn.LayerNorm):
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LSTM):
            reach = module.hidden_size**-0.5
            for name, weight in module.named_parameters():
                if name.startswith("weight"):
                    weight.uniform_(-reach, reach, generator=generator)
                else:
                    weight.zero_()
                    if name.startswith("bias_ih"):
                        weight[module.hidden_size : 2 * module.hidden_size] = 1.0  # the forget gate's quarter
    if isinstance(model, Transformer) and model.output_bias is not None:
        model.output_bias.zero_()
    for stack in [module for module in model.modules() if isinstance(module, Stack)]:
        shrink = ((3 if stack.config.cross else 2) * stack.config.layers) ** -0.5
        for module in stack.modules():
            if isinstance(module, Attention):
                module.o.weight.mul_(shrink)
            elif isinstance(module, MLP):
                module.down.weight.mul_(shrink)
