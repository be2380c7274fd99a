"""Union, intersection, heads side by side."""

from __future__ import annotations

import dataclasses
import itertools
import operator
import pickle
import random

import brute_force
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gdl_kernels import layouts
from gdl_kernels.layouts import Layout, _algebra, _masks, _plot


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
    check_parts(a | b, squeeze(mask_a | mask_b))
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


def check_parts(layout: Layout, mask: Tensor) -> None:
    """Parts keep every pair of the mask once, have different orders, and only the first can be in the natural one."""
    parts = layout.parts()
    heads = len(mask) if mask.dim() == 3 else 1
    kept = torch.zeros(heads, *mask.shape[-2:], dtype=torch.int64)
    for part in parts:
        assert part.rest is None
        assert part.heads == heads
        own = part.to_mask().view_as(kept)
        kept += own
        assert part.kept_pairs() == int(own.sum())
        assert part.causal <= (not bool(own.triu(1).any()))
        brute_force.check_structure(part)
    assert kept.max() <= 1, "a pair is kept twice"
    assert torch.equal(kept.view_as(mask).bool(), mask)
    assert layout.kept_pairs() == sum(part.kept_pairs() for part in parts) == int(mask.sum())
    assert layout.kept_blocks == sum(part.kept_blocks for part in parts)
    assert layout.causal == (not bool(mask.triu(1).any()))
    assert all(part.order.numel() and part.kept_blocks for part in parts[1:])
    assert all(_algebra._common_order(a, b) is None for a, b in itertools.combinations(parts, 2))


def in_parts(choose: random.Random, n: int, heads: int = 1) -> tuple[Layout, Tensor]:
    """Layouts with orders of their own, where parts have fewer blocks."""
    if heads > 1:
        several = [in_parts(choose, n) for _ in range(heads)]
        return layouts.per_head([layout for layout, _ in several]), torch.cat([mask for _, mask in several])
    stride, causal = choose.choice([12, 16, 20]), choose.random() < 0.5
    layout = layouts.strided(n, stride, causal=causal, block_size=16)
    return layout, brute_force.strided(n, stride, causal)[None]


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(250, 400))
def test_unions_of_orders(choose: random.Random, n: int) -> None:
    heads = choose.choice([(1, 1), (2, 2), (1, 2), (2, 1)])
    a, mask = in_parts(choose, n, heads[0])
    window = choose.randint(1, 20)
    other = choose.randrange(4)
    if other == 0:
        b, mask_b = in_parts(choose, n, heads[1])
    elif other == 1:
        b, mask_b = layouts.local(n, window, block_size=16), brute_force.local(n, window, True)[None]
    elif other == 2:
        b, mask_b = layouts.fixed(n, 64, 4, block_size=16), brute_force.fixed(n, 64, 4, 0, True)[None]
    else:
        b, mask_b = layouts.full(n, block_size=16), torch.ones(1, n, n, dtype=torch.bool)
    if choose.random() < 0.5:
        a, b, mask, mask_b = b, a, mask_b, mask
    union, mask = a | b, mask | mask_b
    check_parts(union, squeeze(mask))
    natural = _algebra.natural_order(union)
    brute_force.check(natural, squeeze(mask))
    assert union.kept_blocks <= natural.kept_blocks
    # And on: a third order, an order that is there already, and what parts may be combined into.
    c, mask_c = in_parts(choose, n)
    check_parts(union | c, squeeze(mask | mask_c))
    check_parts(c | union, squeeze(mask | mask_c))
    check_parts(union | union, squeeze(mask))
    brute_force.check(union & c, squeeze(mask & mask_c))
    brute_force.check(layouts.per_head([union, c]), torch.cat([mask, mask_c]))


def merged(n: int, stride: int) -> tuple[Layout, Tensor]:
    layout = layouts.strided(n, stride, block_size=16) | layouts.local(n, stride, block_size=16)
    return layout, brute_force.strided(n, stride, True) | brute_force.local(n, stride, True)


def test_a_merged_strided_pattern_keeps_both_orders() -> None:
    layout, mask = merged(600, 16)
    check_parts(layout, mask)
    local, strided = layout.parts()
    assert torch.equal(local.to_mask(), brute_force.local(600, 16, True))
    assert torch.equal(strided.order, layouts.strided(600, 16, block_size=16).order)
    assert layout.kept_blocks < _algebra.natural_order(layout).kept_blocks / 4
    assert torch.equal(layout.dense_mask()[0], mask)
    assert "2 parts" in repr(layout)
    assert f"kept_blocks={layout.kept_blocks}" in repr(layout)


def test_natural_order_where_parts_have_more_blocks() -> None:
    """Of a pattern that fills the blocks of the other one anyway."""
    for other in (layouts.full(256), layouts.causal(256)):
        union = layouts.strided(256, 8) | other
        assert union.rest is None
        assert not union.order.numel()
        assert union.kept_blocks == other.kept_blocks


def test_a_part_that_keeps_nothing_of_its_own_is_left_out() -> None:
    strided = layouts.strided(600, 16, block_size=16)
    nothing = layouts.from_mask(torch.zeros(600, 600, dtype=torch.bool), block_size=16)
    for union in (strided | nothing, nothing | strided, strided | layouts.strided(600, 32, block_size=16)):
        check_parts(union, strided.to_mask())
        assert len(union.parts()) == 1
        assert torch.equal(union.order, strided.order)


def test_a_copy_of_a_layout_with_parts() -> None:
    layout, mask = merged(600, 16)
    check_parts(pickle.loads(pickle.dumps(layout)), mask)
    moved = layout.to("meta")
    assert all(tensor.device.type == "meta" for part in moved.parts() for tensor in part.tensors())
    assert layout.to("cpu") is layout


def test_the_picture_of_a_layout_with_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    layout, mask = merged(300, 16)
    shown: list[Tensor] = []
    cells = _plot.cells
    monkeypatch.setattr(_plot, "cells", lambda of: [result := cells(of), shown.append(result[0])][0])
    (axis,) = layout.plot().axes
    assert axis.get_xlabel() == "key"
    padded = torch.zeros(304, 304)
    padded[:300, :300] = mask
    exists = torch.zeros(304, 304)
    exists[:300, :300] = 1
    kept, pairs = (t.unflatten(1, (19, 16)).unflatten(0, (19, 16)).sum((1, 3)) for t in (padded, exists))
    torch.testing.assert_close(shown[0][0], (kept / pairs).double(), rtol=1e-6, atol=0)


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
    monkeypatch.setattr(torch, "randint", lambda low, high, shape, **_: torch.zeros(*shape, dtype=torch.int64))
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
