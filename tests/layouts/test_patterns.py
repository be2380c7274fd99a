"""Every named pattern against its formula."""

from __future__ import annotations

import brute_force
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gdl_kernels import layouts

# Smaller than a block; one block; a block and one; whole blocks; a cut last block.
SIZES = (1, 7, 16, 17, 64, 65, 128, 200, 257, 384)
BLOCK_SIZES = (16, 32, 64, 128)

sizes = st.sampled_from(SIZES) | st.integers(1, 300)
block_sizes = st.sampled_from(BLOCK_SIZES)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("n", SIZES)
def test_full_and_causal(n: int, block_size: int) -> None:
    brute_force.check(layouts.full(n, block_size=block_size), torch.ones(n, n, dtype=torch.bool))
    brute_force.check(layouts.full(n, 99, block_size=block_size), torch.ones(n, 99, dtype=torch.bool))
    brute_force.check(layouts.causal(n, block_size=block_size), torch.ones(n, n, dtype=torch.bool).tril())


@settings(max_examples=80, deadline=None)
@given(sizes, st.integers(1, 400), st.booleans(), block_sizes)
def test_local(n: int, window: int, causal: bool, block_size: int) -> None:
    layout = layouts.local(n, window, causal=causal, block_size=block_size)
    brute_force.check(layout, brute_force.local(n, window, causal))


@settings(max_examples=80, deadline=None)
@given(sizes, st.integers(1, 310), st.booleans(), block_sizes)
def test_strided(n: int, stride: int, causal: bool, block_size: int) -> None:
    layout = layouts.strided(n, stride, causal=causal, block_size=block_size)
    brute_force.check(layout, brute_force.strided(n, stride, causal))
    if layout.order.numel():
        assert layout.order[0].tolist() == sorted(range(n), key=lambda p: (p % stride, p))


def test_strided_lies_on_the_diagonal() -> None:
    # 4096 / 64 places for each residue: one block each, where natural order would keep all 2080 below the diagonal.
    assert layouts.strided(4096, 64).kept_blocks == 64


@settings(max_examples=120, deadline=None)
@given(st.data(), sizes, st.integers(1, 310), st.integers(1, 5), st.booleans(), block_sizes)
def test_fixed(data: st.DataObject, n: int, stride: int, heads: int, causal: bool, block_size: int) -> None:
    summary = data.draw(st.integers(1, stride))
    part = data.draw(st.sampled_from(["merged", "local", "summary"]))
    layout = layouts.fixed(n, stride, summary, heads=heads, causal=causal, part=part, block_size=block_size)
    masks = [brute_force.fixed(n, stride, summary, head, causal, part) for head in range(heads)]
    if heads > 1 and part != "local" and stride // summary > 1:
        brute_force.check(layout, torch.stack(masks))
    else:
        brute_force.check(layout, masks[0])


def test_fixed_parts_make_up_the_merged_pattern() -> None:
    local, summary = (layouts.fixed(500, 60, 7, heads=3, part=part) for part in ("local", "summary"))
    brute_force.check(local | summary, layouts.fixed(500, 60, 7, heads=3).to_mask())


def test_fixed_heads_that_take_the_same_columns_share_one_pattern() -> None:
    layout = layouts.fixed(300, 50, 10, heads=4, distinct=False)
    brute_force.check(layout, brute_force.fixed(300, 50, 10, 0, True))


def test_fixed_is_the_released_block_rule_where_sizes_are_whole_blocks() -> None:
    # Sparse Transformer's code: s blocks a run, v summary blocks a head, block row I and column J (arXiv 1904.10509).
    blocks, s, v, heads, size = 24, 8, 2, 6, 16
    row, column = brute_force.positions(blocks)
    layout = layouts.fixed(blocks * size, s * size, v * size, heads=heads, block_size=size)
    for head, mask in enumerate(layout.to_mask()):
        u = head % (s // v)
        kept = (row // s == column // s) | ((s - (u + 1) * v <= column % s) & (column % s <= s - u * v - 1))
        assert torch.equal(mask, (kept & (column <= row)).repeat_interleave(size, 0).repeat_interleave(size, 1).tril())


@settings(max_examples=80, deadline=None)
@given(sizes, st.integers(1, 310), st.integers(0, 310), block_sizes)
def test_sliding_with_sinks(n: int, window: int, sinks: int, block_size: int) -> None:
    layout = layouts.sliding_with_sinks(n, window, sinks, block_size=block_size)
    brute_force.check(layout, brute_force.sliding_with_sinks(n, window, sinks))


@settings(max_examples=80, deadline=None)
@given(st.data(), sizes, sizes, block_sizes, st.integers(0, 2**32))
def test_from_mask(data: st.DataObject, n_q: int, n_k: int, block_size: int, seed: int) -> None:
    shape = (n_q, n_k) if data.draw(st.booleans()) else (data.draw(st.integers(1, 3)), n_q, n_k)
    share = data.draw(st.sampled_from([0.0, 0.003, 0.5, 0.999, 1.0]))
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share
    layout = layouts.from_mask(mask, block_size=block_size)
    if mask.dim() == 3 and len(mask) == 1:
        mask = mask[0]
    brute_force.check(layout, mask)


def test_from_mask_takes_any_strides_and_several_stripes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gdl_kernels.layouts._patterns._MASK_AT_ONCE", 5000)
    mask = (torch.rand(3, 210, 330) < 0.02)[:, ::2, ::3].transpose(1, 2)
    brute_force.check(layouts.from_mask(mask, block_size=16), mask)


@pytest.mark.parametrize("shape", [(3, 5), (2, 4, 4), (1, 1)])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_from_blocks(shape: tuple[int, ...], block_size: int) -> None:
    blocks = torch.rand(shape) < 0.6
    mask = blocks.repeat_interleave(block_size, -1).repeat_interleave(block_size, -2)
    brute_force.check(layouts.from_blocks(blocks, block_size=block_size), mask)
    brute_force.check(layouts.from_blocks(blocks, block_size=block_size, causal=True), mask.tril())


@pytest.mark.parametrize(
    "build",
    [
        lambda: layouts.fixed(600, 96, 20, heads=3, causal=False, block_size=16),
        lambda: layouts.strided(600, 7, block_size=16),
        lambda: layouts.sliding_with_sinks(600, 70, 40, block_size=16),
        lambda: layouts.local(600, 70, block_size=16) | layouts.strided(600, 7, block_size=16),
    ],
)
def test_stripes_change_nothing(build, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build().tensors()
    monkeypatch.setattr("gdl_kernels.layouts._build.BLOCKS_AT_ONCE", 50)
    monkeypatch.setattr("gdl_kernels.layouts._algebra.BLOCKS_AT_ONCE", 50)
    monkeypatch.setattr("gdl_kernels.layouts._algebra._PAIRS_AT_ONCE", 3000)
    assert all(torch.equal(a, b) for a, b in zip(whole, build().tensors(), strict=True))
