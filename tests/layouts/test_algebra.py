"""Union, intersection, heads side by side."""

from __future__ import annotations

import dataclasses
import operator
import random

import brute_force
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gdl_kernels import layouts
from gdl_kernels.layouts import Layout, _algebra, _masks


def draw(choose: random.Random, n: int, block_size: int, heads: int = 1) -> tuple[Layout, Tensor]:
    """A layout of any kind with ``heads`` patterns, and its mask, ``(heads, n, n)``."""
    causal = choose.random() < 0.5
    size = choose.randint(1, n + 3)
    kind = choose.randrange(5 if heads == 1 else 2)
    if kind == 0:
        seed = torch.Generator().manual_seed(choose.randrange(2**31))
        mask = torch.rand(heads, n, n, generator=seed) < choose.choice([0.0, 0.01, 0.5, 0.99])
        return layouts.from_mask(mask, block_size=block_size), mask
    if kind == 1:
        parts = [draw(choose, n, block_size) for _ in range(heads)]
        return layouts.per_head([layout for layout, _ in parts]), torch.cat([mask for _, mask in parts])
    if kind == 2:
        layout, mask = layouts.local(n, size, causal=causal, block_size=block_size), brute_force.local(n, size, causal)
    elif kind == 3:
        layout = layouts.strided(n, size, causal=causal, block_size=block_size)
        mask = brute_force.strided(n, size, causal)
    else:
        summary = choose.randint(1, size)
        layout = layouts.fixed(n, size, summary, causal=causal, block_size=block_size)
        mask = brute_force.fixed(n, size, summary, 0, causal)
    return layout, mask[None]


def squeeze(mask: Tensor) -> Tensor:
    return mask[0] if len(mask) == 1 else mask


@settings(max_examples=120, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 200), st.sampled_from([16, 32, 64, 128]))
def test_union_and_intersection(choose: random.Random, n: int, block_size: int) -> None:
    heads = choose.choice([(1, 1), (3, 3), (1, 3), (3, 1)])
    (a, mask_a), (b, mask_b) = (draw(choose, n, block_size, h) for h in heads)
    brute_force.check(a | b, squeeze(mask_a | mask_b))
    brute_force.check(a & b, squeeze(mask_a & mask_b))


@settings(max_examples=40, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 200), st.sampled_from([16, 32, 64, 128]))
def test_per_head(choose: random.Random, n: int, block_size: int) -> None:
    parts = [draw(choose, n, block_size, choose.choice([1, 1, 2])) for _ in range(choose.randint(1, 3))]
    brute_force.check(layouts.per_head([a for a, _ in parts]), squeeze(torch.cat([mask for _, mask in parts])))


@settings(max_examples=40, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 200), st.sampled_from([16, 32, 64, 128]))
def test_the_same_pairs_give_the_same_layout(choose: random.Random, n: int, block_size: int) -> None:
    layout = _algebra.natural_order(draw(choose, n, block_size, choose.choice([1, 3]))[0])
    again = layouts.from_mask(layout.to_mask(), block_size=block_size)
    assert all(torch.equal(a, b) for a, b in zip(layout.tensors(), again.tensors(), strict=True))


@pytest.mark.parametrize("operation", [operator.or_, operator.and_])
def test_one_order_is_kept(operation) -> None:
    a, b = layouts.strided(300, 6, block_size=16), layouts.strided(300, 6, causal=False, block_size=16)
    both = operation(a, b)
    assert torch.equal(both.order, a.order)
    brute_force.check(both, operation(a.to_mask(), b.to_mask()))


def test_an_order_of_each_head_is_kept() -> None:
    parts = [layouts.strided(300, 6, block_size=16), layouts.causal(300, block_size=16)]
    a = layouts.per_head(parts)
    assert a.order.shape == (2, 300)
    assert a.order[1].tolist() == list(range(300))
    b = a & a
    assert torch.equal(b.order, a.order)
    brute_force.check(b, a.to_mask())


def test_heads_with_one_order_share_it() -> None:
    layout = layouts.per_head([layouts.strided(300, 6), layouts.strided(300, 6, causal=False)])
    assert layout.order.shape == (1, 300)
    brute_force.check(layout, torch.stack([brute_force.strided(300, 6, causal) for causal in (True, False)]))


def test_an_intersection_may_be_causal_where_neither_is() -> None:
    n, order = 96, torch.randperm(96).to(torch.int32)[None]
    later = torch.ones(n, n, dtype=torch.bool).triu(1)
    # Both keep some later keys, but not the same ones.
    half = torch.rand(n, n) < 0.5
    kept = [(later & some) | ~later for some in (half, ~half)]
    parts = []
    for mask in kept:
        layout = layouts.from_mask(mask[order[0].long()][:, order[0].long()], block_size=16)
        parts.append(dataclasses.replace(layout, causal=False, order=order))
    assert torch.equal(parts[0].to_mask(), kept[0])
    brute_force.check(parts[0] & parts[1], ~later)
    assert (parts[0] & parts[1]).causal


def test_masks_that_share_a_hash_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randint", lambda low, high, shape, generator: torch.zeros(*shape, dtype=torch.int64))
    words = torch.tensor([[[3], [5]], [[7], [1]], [[3], [5]]], dtype=torch.int32)
    table, index = _masks.distinct(words)
    assert len(table) == 2
    assert torch.equal(table[index], words)


def test_what_does_not_fit() -> None:
    a = layouts.local(256, 20)
    with pytest.raises(ValueError, match=r"same n_q, got 256 and 255"):
        _ = a | layouts.local(255, 20)
    with pytest.raises(ValueError, match=r"same n_k, got 256 and 64"):
        _ = a & layouts.full(256, 64)
    with pytest.raises(ValueError, match=r"same block_size, got 64 and 32"):
        _ = a | layouts.local(256, 20, block_size=32)
    with pytest.raises(ValueError, match=r"same device, got cpu and meta"):
        _ = a | a.to("meta")
    with pytest.raises(ValueError, match=r"same heads, or one of them 1, got 2 and 3"):
        _ = layouts.per_head([a] * 2) | layouts.per_head([a] * 3)
    with pytest.raises(TypeError, match="unsupported operand"):
        _ = a | torch.ones(256, 256, dtype=torch.bool)
    with pytest.raises(ValueError, match="at least one layout, got none"):
        layouts.per_head([])
    with pytest.raises(TypeError, match="layouts must be a sequence of layouts, got one Layout"):
        layouts.per_head(layouts.causal(64))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"layouts\[1\] must be a Layout, got Tensor"):
        layouts.per_head([a, torch.ones(2, 2)])
    with pytest.raises(ValueError, match=r"layouts\[0\] and layouts\[2\] must have the same block_size, got 64 and 16"):
        layouts.per_head([a, a, layouts.local(256, 20, block_size=16)])
