"""Attention by plain products is the kernel's, to bfloat16's precision, and only takes what it is quicker at."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from langmill.model import short
from langmill.model.attend import Seen, attend

BF16 = torch.bfloat16
Parts = list[Tensor]


def parts(heads: int, groups: int, queries: int, keys: int, dtype: torch.dtype, rows: int = 1) -> Parts:
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, queries), (groups, keys), (groups, keys))
    made = [torch.randn(rows, h, n, 16, generator=generator).to(BF16).to(dtype) for h, n in shapes]
    return [x.requires_grad_() for x in made]


def gradients(mixed: Tensor, given: Parts) -> Parts:
    weight = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(1)).to(BF16)
    return list(torch.autograd.grad(mixed, given, weight.to(mixed.dtype)))


@pytest.mark.parametrize(
    ("heads", "groups", "queries", "keys", "causal"),
    [
        (4, 4, 33, 33, False),
        (4, 4, 33, 33, True),
        (6, 2, 40, 40, True),
        (6, 2, 7, 50, False),
        (2, 1, 1, 1, True),
    ],
)
def test_products_equal_the_kernel(heads: int, groups: int, queries: int, keys: int, causal: bool) -> None:
    exact, given = (parts(heads, groups, queries, keys, dtype, rows=2) for dtype in (torch.float32, BF16))
    wanted = F.scaled_dot_product_attention(*exact, is_causal=causal, scale=0.3, enable_gqa=True)
    found = short.attend_short(given[0], given[1], given[2], causal, 0.3)
    kernel = F.scaled_dot_product_attention(*given, is_causal=causal, scale=0.3, enable_gqa=True)
    pairs = zip([wanted, *gradients(wanted, exact)], [found, *gradients(found, given)],
                [kernel, *gradients(kernel, given)], strict=True)  # fmt: skip
    for right, mine, theirs in pairs:
        assert mine.shape == theirs.shape and mine.dtype == BF16
        size = right.detach().norm() + 1e-3
        assert float((mine.detach().float() - right.detach()).norm() / size) < max(
            0.01, 2 * float((theirs.detach().float() - right.detach()).norm() / size)
        )


def test_a_later_token_is_not_seen() -> None:
    q, k, v = parts(2, 2, 20, 20, BF16)
    before = short.attend_short(q, k, v, True, 0.25)[:, :, :10]
    changed = [torch.cat((x[:, :, :10], torch.zeros_like(x[:, :, 10:])), 2) for x in (k, v)]
    assert torch.equal(before, short.attend_short(q, changed[0], changed[1], True, 0.25)[:, :, :10])


def test_it_is_taken_where_it_is_the_faster_way(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[int, bool]] = []
    plain = short.attend_short

    def watched(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
        taken.append((q.shape[2], causal))
        return plain(q, k, v, causal, scale)

    monkeypatch.setattr(short, "attend_short", watched)
    q, k, v = parts(2, 2, 140, 140, BF16)
    cuts = ((60, 80), (60, 80))
    together = attend(q, k, v, Seen(causal=True, cuts=cuts), None)
    assert taken == [(60, True), (80, True)]
    alone = attend(q[:, :, :60], k[:, :, :60], v[:, :, :60], Seen(causal=True), None)
    torch.testing.assert_close(together[:, :, :60], alone)
    taken.clear()
    q, k, v = parts(2, 2, 30, 30, BF16)
    cuts = ((10, 20), (10, 20))
    with torch.autocast("cpu", BF16):
        tiny = attend(q, k, v, Seen(causal=True, cuts=cuts), None)
    exact = attend(q.float(), k.float(), v.float(), Seen(causal=True, cuts=cuts), None)
    assert torch.equal(tiny, exact.to(BF16))
    with torch.no_grad():
        attend(q, k, v, Seen(), None)
    attend(*parts(2, 2, 30, 30, torch.float32), Seen(), None)
    attend(*parts(1, 1, short.LONGEST + 1, 4, BF16), Seen(), None)
    attend(q, k, v, Seen(torch.ones(30, 30, dtype=torch.bool)), None)
    assert not taken


def test_padding_on_one_side_alone() -> None:
    q, k, v = parts(2, 2, 20, 30, BF16)
    mixed = attend(q, k, v, Seen(cuts=((12, 8, 0), (10, 15, 5))), None)
    empty = attend(q, k, v, Seen(cuts=((12, 8), (30, 0))), None)
    for made in (mixed, empty):
        made.float().sum().backward()
        assert made.shape == q.shape
    assert not empty[:, :, 12:].any() and k.grad is not None and bool(k.grad.isfinite().all())
