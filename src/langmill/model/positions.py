"""Positions: rotary angles that turn queries and keys, waves that are added, and buckets of distances.

B batch, T tokens, H heads, D head dimension.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from langmill.model.config import Relative, Rope, RopeScaling


def rotary(positions_BT: Tensor, rope: Rope, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, float32, each of shape (B, 1, T, D).

    The two halves of D carry the same angles (half-split convention). Source: Su et al. 2021, eq. 34,
    with the stretching that `rope.scaling` names.
    """
    frequencies_D, attention = _frequencies(positions_BT, rope, head_dim)
    angles_BTD = positions_BT.float()[..., None] * frequencies_D
    angles_B1TD = torch.cat((angles_BTD, angles_BTD), dim=-1).unsqueeze(1)
    return angles_B1TD.cos() * attention, angles_B1TD.sin() * attention


def rotate(x_BHTD: Tensor, cos_B1TD: Tensor, sin_B1TD: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + D/2]) by its position's angle."""
    first, second = x_BHTD.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x_BHTD * cos_B1TD + turned * sin_B1TD


def _frequencies(positions_BT: Tensor, rope: Rope, head_dim: int) -> tuple[Tensor, float]:
    """One angular frequency for each pair of dimensions, and the factor on attention's cos and sin."""
    exponents_D = torch.arange(0, head_dim, 2, device=positions_BT.device).float() / head_dim
    plain_D = 1.0 / (rope.base**exponents_D)
    scaling = rope.scaling
    if scaling is None:
        return plain_D, 1.0
    if scaling.kind == "linear":
        return plain_D / scaling.factor, 1.0
    if scaling.kind == "dynamic":
        running = torch.clamp(positions_BT.max() + 1, min=scaling.original_length).float()
        growth = scaling.factor * running / scaling.original_length - (scaling.factor - 1)
        base = rope.base * growth ** (head_dim / (head_dim - 2))
        return 1.0 / (base**exponents_D), 1.0
    if scaling.kind == "llama3":
        return _llama3(plain_D, scaling), 1.0
    return _yarn(plain_D, rope.base, head_dim, scaling), _yarn_attention(scaling)


def _llama3(plain_D: Tensor, s: RopeScaling) -> Tensor:
    wavelengths_D = 2 * math.pi / plain_D
    ramp_D = (s.original_length / wavelengths_D - s.low_freq_factor) / (
        s.high_freq_factor - s.low_freq_factor
    )
    ramp_D = ramp_D.clamp(0, 1)
    return (1 - ramp_D) * plain_D / s.factor + ramp_D * plain_D


def _yarn(plain_D: Tensor, base: float, head_dim: int, s: RopeScaling) -> Tensor:
    """Peng et al. 2023, section 3.2: dimensions that turn often stay, those that turn rarely are stretched."""

    def dimension(turns: float) -> float:  # the one that turns this often over the original length
        return head_dim * math.log(s.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(s.beta_fast), dimension(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    steps_D = torch.arange(head_dim // 2, device=plain_D.device, dtype=torch.float32)
    stretched_D = ((steps_D - low) / max(high - low, 0.001)).clamp(0, 1)
    return stretched_D * plain_D / s.factor + (1 - stretched_D) * plain_D


def _yarn_attention(s: RopeScaling) -> float:
    if s.attention_factor is not None:
        return s.attention_factor

    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(s.factor) + 1.0 if s.factor > 1 else 1.0

    if s.mscale and s.mscale_all_dim:
        return temperature(s.mscale) / temperature(s.mscale_all_dim)
    return temperature(1.0)


def sinusoids(positions_BT: Tensor, dim: int) -> Tensor:
    """(B, T, dim) float32: sines of every wavelength, then cosines (Vaswani et al. 2017, 3.5, in Marian's order)."""
    wavelengths = 10000.0 ** (torch.arange(0, dim, 2, device=positions_BT.device, dtype=torch.float64) / dim)
    angles = positions_BT.double()[..., None] / wavelengths
    return torch.cat((angles.sin(), angles.cos()), dim=-1).float()


def relative_buckets(distances: Tensor, relative: Relative, both_ways: bool) -> Tensor:
    """The bucket of each distance (key's place minus query's): exact while small, then logarithmic up to `reach`.

    both_ways: half of the buckets are for keys that come after; otherwise those count as distance 0
    (Raffel et al. 2020, section 2.1, as in Mesh TensorFlow).
    """
    buckets, later = relative.buckets, torch.zeros_like(distances)
    if both_ways:
        buckets //= 2
        later, distances = (distances > 0).long() * buckets, distances.abs()
    else:
        distances = (-distances).clamp(min=0)
    exact = buckets // 2
    far = (
        torch.log(distances.float().clamp(min=1) / exact)
        / math.log(relative.reach / exact)
        * (buckets - exact)
    )
    far = (exact + far.long()).clamp(max=buckets - 1)
    return later + torch.where(distances < exact, distances, far)
