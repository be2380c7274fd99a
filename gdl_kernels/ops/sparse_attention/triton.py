"""Block-sparse attention on the GPU, in Triton.

A program owns one tile of queries (or, for the gradients of keys and values, of keys) of one head and walks the list of
blocks that the layout keeps for it: first its full blocks, whose loop knows no mask, then the rest. Every element of
the outputs is written by one program and summed in one order, so results are the same every run.

Scores live in base 2: ``exp(scale * s) = exp2(scale * log2(e) * s)``, and the GPU has an instruction for the latter.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _native


class Tiles(NamedTuple):
    """How one kernel is launched.

    Attributes:
        own: positions that a program owns: queries, or keys in the kernel of their gradients. At most a block.
        step: positions that a program takes from its list at a time: several small blocks, or a part of a large one.
        num_stages: depth of the pipeline. A tile's address hangs on a load of its own, that of the block's number, so
            five stages keep two tiles in flight, three keep one.
        num_warps: warps a program.
    """

    own: int
    step: int
    num_stages: int
    num_warps: int


#: ``(own, step, num_stages)`` for 16-bit inputs, by the major compute capability that a row was made for, kernel and
#: padded head size. Up to 128 features, in blocks of 64 and 128, nothing spills, and row 8 needs at most the 99 KB of
#: shared memory of the smaller chips of its generation. Above, some spill: in the gradients of keys and values two
#: accumulators alone fill the registers. Chosen by what the compiler reports; not yet timed on any GPU.
TILES = {
    8: {
        "forward": {64: (128, 64, 5), 128: (128, 32, 5), 256: (64, 16, 3)},
        "grad_query": {64: (128, 32, 5), 128: (64, 32, 5), 256: (64, 16, 3)},
        "grad_key_value": {64: (128, 32, 3), 128: (64, 16, 3), 256: (64, 16, 2)},
    },
    9: {
        "forward": {64: (128, 64, 5), 128: (128, 64, 5), 256: (64, 16, 5)},
        "grad_query": {64: (128, 64, 5), 128: (128, 32, 5), 256: (64, 16, 3)},
        "grad_key_value": {64: (128, 64, 5), 128: (128, 32, 3), 256: (64, 16, 3)},
    },
}


def tiles(kernel: str, capability: int, head_dim: int, block_size: int, itemsize: int) -> Tiles:
    """The launch configuration of a kernel.

    Args:
        kernel: ``"forward"``, ``"grad_query"`` or ``"grad_key_value"``.
        capability: the GPU's major compute capability.
        head_dim: the larger of the padded head sizes.
        itemsize: bytes an element.
    """
    if itemsize == 4:
        # "ieee" products of float32 run on the ordinary cores, operands in registers: small tiles, many warps.
        return Tiles(min(32, block_size), 16, 1, 4 if head_dim <= 64 else 8)
    # Only data-centre Hopper (9) and Blackwell (10) have the shared memory that row 9 asks for.
    own, step, num_stages = TILES[9 if capability in (9, 10) else 8][kernel][max(64, head_dim)]
    own = min(own, block_size)
    if own < 64:
        # Few warps share a tile's loads: a large one would take all their registers for addresses.
        step, num_stages = (16, 2) if kernel == "grad_key_value" else (max(16, min(step, 128 * own // head_dim)), 3)
    # A tensor core instruction takes 16 rows a warp (four warps make Hopper's 64): fewer warps would hold more
    # accumulators than there are registers, more would all compute the same rows.
    return Tiles(own, step, num_stages, own // 16)


#: Kernel arguments of which Triton makes no variants (of 1, of multiples of 16), so that a new length compiles nothing.
_LENGTHS = (
    "n_heads", "n_q", "n_k", "query_start", "n_places", "n_lines", "n_tiles", "first_tile", "order_step",
)  # fmt: skip


@triton.jit
def _load_rows(base, rows, inside, strides, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    # Rows of a (batch, heads, positions, features) tensor at one batch and head; 0 outside.
    features = tl.arange(0, BLOCK_D).to(tl.int64)
    pointers = base + rows.to(tl.int64)[:, None] * strides[2] + features[None, :] * strides[3]
    if MASKED:
        tile = tl.load(pointers, mask=inside[:, None] & (features < D)[None, :], other=0.0)
    elif D < BLOCK_D:
        tile = tl.load(pointers, mask=(features < D)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile  # [rows, BLOCK_D]


@triton.jit
def _store_rows(base, rows, inside, strides, tile, D: tl.constexpr, BLOCK_D: tl.constexpr):
    features = tl.arange(0, BLOCK_D).to(tl.int64)
    pointers = base + rows.to(tl.int64)[:, None] * strides[2] + features[None, :] * strides[3]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside[:, None] & (features < D)[None, :])


@triton.jit
def _positions(order, places, n_places):
    # The position that each place holds; past the last place one that no query and no key has.
    if order is not None:
        positions = tl.load(order + places, mask=places < n_places, other=2147483647)
    else:
        positions = places
    return positions


@triton.jit
def _list_bounds(starts, splits, line, BLOCK: tl.constexpr, STEP: tl.constexpr):
    # Tiles made of full blocks alone, then everything else: partial blocks, and full ones that fill no whole tile.
    first, last = tl.load(starts + line), tl.load(starts + line + 1)
    full = tl.load(splits + line) - first
    if STEP <= BLOCK:
        full_tiles = full * (BLOCK // STEP)
        rest = first + full
        rest_tiles = (last - rest) * (BLOCK // STEP)
    else:
        full_tiles = full // (STEP // BLOCK)
        rest = first + full_tiles * (STEP // BLOCK)
        rest_tiles = tl.cdiv(last - rest, STEP // BLOCK)
    return first, full_tiles, rest, rest_tiles, last


@triton.jit
def _list_tile(blocks, first, last, tile, BLOCK: tl.constexpr, STEP: tl.constexpr):
    # Places of a tile's lanes, INT_MAX past the end of the list, and each lane's index in its block.
    lane = tl.arange(0, STEP)
    if STEP <= BLOCK:
        inner = (tile % (BLOCK // STEP)) * STEP + lane
        places = tl.load(blocks + first + tile // (BLOCK // STEP)) * BLOCK + inner
    else:
        inner = lane % BLOCK
        item = first + tile * (STEP // BLOCK) + lane // BLOCK
        places = tl.load(blocks + item, mask=item < last, other=0) * BLOCK + inner
        places = tl.where(item < last, places, 2147483647)
    return places, inner


# A packed word of the mask table covers 32 columns of a row. Both functions below load a word once for each row and let
# every lane of the tile pick its bit: no pointer for each element of the tile, which would cost more than the scores.
# A full block that fills no whole tile has mask -1, all ones.


@triton.jit
def _kept_keys(table, masks, first, last, tile, row, column, BLOCK: tl.constexpr, STEP: tl.constexpr):
    # Bits [rows, STEP] of a tile whose lanes are columns; ``row`` and ``column`` are indices in the block.
    WORDS: tl.constexpr = (BLOCK + 31) // 32
    SEGMENT: tl.constexpr = 16 if BLOCK == 16 or STEP == 16 else 32  # lanes that read one word
    lane = tl.arange(0, STEP)
    word = tl.zeros([row.shape[0], STEP], tl.int32)
    for segment in tl.static_range(STEP // SEGMENT):
        if STEP <= BLOCK:
            item = first + tile // (BLOCK // STEP)
            index = ((tile % (BLOCK // STEP)) * STEP + segment * SEGMENT) // 32
        else:
            item = first + tile * (STEP // BLOCK) + segment * SEGMENT // BLOCK
            index = segment * SEGMENT % BLOCK // 32
        mask = tl.load(masks + item, mask=item < last, other=-1).to(tl.int64)
        bits = tl.load(table + mask * (BLOCK * WORDS) + index + row * WORDS, mask=mask >= 0, other=-1)
        word = tl.where((lane // SEGMENT == segment)[None, :], bits[:, None], word)
    return ((word >> (column & 31)[None, :]) & 1) != 0


@triton.jit
def _kept_queries(
    table, masks, first, last, tile, row, own_start, OWN: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr
):
    # Bits [OWN, STEP] of a tile whose lanes are rows, for the OWN columns from ``own_start`` in the block on.
    WORDS: tl.constexpr = (BLOCK + 31) // 32
    SEGMENT: tl.constexpr = 16 if OWN == 16 else 32  # columns in one word
    lane = tl.arange(0, STEP)
    if STEP <= BLOCK:
        item = first + tile // (BLOCK // STEP) + lane * 0
    else:
        item = first + tile * (STEP // BLOCK) + lane // BLOCK
    mask = tl.load(masks + item, mask=item < last, other=-1).to(tl.int64)
    column = tl.arange(0, OWN)
    word = tl.zeros([OWN, STEP], tl.int32)
    for segment in tl.static_range(OWN // SEGMENT):
        index = (own_start + segment * SEGMENT) // 32
        bits = tl.load(table + mask * (BLOCK * WORDS) + index + row * WORDS, mask=mask >= 0, other=-1)
        word = tl.where((column // SEGMENT == segment)[:, None], bits[None, :], word)
    return ((word >> ((own_start + column) & 31)[:, None]) & 1) != 0


@triton.jit
def _forward_tiles(
    acc, total, peak, q, row_inner, key, value, padding, order, blocks, masks, table, first, last, n_tiles,
    k_strides, v_strides, padding_stride, n_k, n_places, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, DOT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    LOAD_MASKED: tl.constexpr = MASKED or padding is not None
    for tile in range(n_tiles):
        places, inner = _list_tile(blocks, first, last, tile, BLOCK, STEP)
        positions = _positions(order, places, n_places)
        inside = positions < n_k  # [STEP]
        if padding is not None:
            inside &= tl.load(padding + positions.to(tl.int64) * padding_stride, mask=inside, other=1) == 0
        k = _load_rows(key, positions, inside, k_strides, D, BLOCK_D, LOAD_MASKED)
        scores = tl.dot(q, tl.trans(k.to(DOT)), input_precision="ieee") * scale_log2  # [OWN, STEP]
        if MASKED:
            kept = _kept_keys(table, masks, first, last, tile, row_inner, inner, BLOCK, STEP) & inside[None, :]
            scores = tl.where(kept, scores, float("-inf"))
        elif LOAD_MASKED:
            scores = tl.where(inside[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        shift = new_peak
        if LOAD_MASKED:
            shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # a row that has kept nothing so far
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(peak - shift)
        total = total * decay + tl.sum(weights, 1)
        v = _load_rows(value, positions, inside, v_strides, DV, BLOCK_DV, LOAD_MASKED)
        acc = tl.dot(weights.to(DOT), v.to(DOT), acc * decay[:, None], input_precision="ieee")
        peak = new_peak
    return acc, total, peak


@triton.jit(do_not_specialize=_LENGTHS)
def _forward(
    query, key, value, out, lse, padding, starts, splits, blocks, masks, table, order,
    q_strides, k_strides, v_strides, out_strides, padding_strides,
    n_heads, group, n_q, n_k, query_start, n_places, n_lines, n_tiles, first_tile, layout_step, order_step, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    # Late queries first: under a causal layout they keep the most, and the last programs to start should be short ones.
    own = first_tile + n_tiles - 1 - pid % n_tiles
    batch, head = (pid // n_tiles // n_heads).to(tl.int64), (pid // n_tiles % n_heads).to(tl.int64)
    query += batch * q_strides[0] + head * q_strides[1]
    key += batch * k_strides[0] + head // group * k_strides[1]
    value += batch * v_strides[0] + head // group * v_strides[1]
    out += batch * out_strides[0] + head * out_strides[1]
    lse += (batch * n_heads + head) * n_q
    if order is not None:
        order += head * order_step
    if padding is not None:
        padding += batch * padding_strides[0]

    places = own * OWN + tl.arange(0, OWN)
    rows = _positions(order, places, n_places) - query_start
    inside = (rows >= 0) & (rows < n_q)  # [OWN]
    row_inner = places % BLOCK
    q = _load_rows(query, rows, inside, q_strides, D, BLOCK_D, True).to(DOT)

    line = head * layout_step * n_lines + own // (BLOCK // OWN)
    first, full_tiles, rest, rest_tiles, last = _list_bounds(starts, splits, line, BLOCK, STEP)
    # Reordered, a tile may hold none of this call's queries; then its full blocks may hold keys that do not exist yet.
    present = tl.max(inside.to(tl.int32), 0)
    acc = tl.zeros([OWN, BLOCK_DV], tl.float32)
    total = tl.zeros([OWN], tl.float32)
    peak = tl.full([OWN], float("-inf"), tl.float32)
    acc, total, peak = _forward_tiles(
        acc, total, peak, q, row_inner, key, value, padding, order, blocks, masks, table, first, last,
        full_tiles * present, k_strides, v_strides, padding_strides[1], n_k, n_places, scale_log2,
        D, DV, BLOCK, STEP, BLOCK_D, BLOCK_DV, DOT, False,
    )  # fmt: skip
    acc, total, peak = _forward_tiles(
        acc, total, peak, q, row_inner, key, value, padding, order, blocks, masks, table, rest, last,
        rest_tiles * present, k_strides, v_strides, padding_strides[1], n_k, n_places, scale_log2,
        D, DV, BLOCK, STEP, BLOCK_D, BLOCK_DV, DOT, True,
    )  # fmt: skip
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    _store_rows(out, rows, inside, out_strides, acc, DV, BLOCK_DV)
    natural = (peak + tl.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453  # log(2); peak is -inf where empty
    tl.store(lse + rows, natural, mask=inside)


@triton.jit(do_not_specialize=_LENGTHS)
def _row_terms(
    out, grad_out, lse, grad_lse, delta, lse_log2, out_strides, grad_strides, grad_lse_strides, n_heads, n_q, n_tiles,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    # delta = sum_d out * grad_out - grad_lse, and lse in base 2, +inf for a row that keeps nothing: its weights
    # exp2(score - lse) are then 0 with no test.
    pid = tl.program_id(0)
    line = (pid // n_tiles).to(tl.int64)
    batch, head = line // n_heads, line % n_heads
    rows = pid % n_tiles * OWN + tl.arange(0, OWN)
    inside = rows < n_q
    out += batch * out_strides[0] + head * out_strides[1]
    grad_out += batch * grad_strides[0] + head * grad_strides[1]
    o = _load_rows(out, rows, inside, out_strides, DV, BLOCK_DV, True).to(tl.float32)
    g = _load_rows(grad_out, rows, inside, grad_strides, DV, BLOCK_DV, True).to(tl.float32)
    total = tl.sum(o * g, 1)
    if grad_lse is not None:
        grad_lse += batch * grad_lse_strides[0] + head * grad_lse_strides[1]
        total -= tl.load(grad_lse + rows.to(tl.int64) * grad_lse_strides[2], mask=inside, other=0.0)
    natural = tl.load(lse + line * n_q + rows, mask=inside, other=0.0)
    base_2 = tl.where(natural == float("-inf"), float("inf"), natural * 1.4426950408889634)  # log2(e)
    tl.store(delta + line * n_q + rows, total, mask=inside)
    tl.store(lse_log2 + line * n_q + rows, base_2, mask=inside)


@triton.jit
def _grad_query_tiles(
    acc, q, g, row_lse, row_delta, row_inner, key, value, padding, order, blocks, masks, table, first, last, n_tiles,
    k_strides, v_strides, padding_stride, n_k, n_places, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, DOT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    LOAD_MASKED: tl.constexpr = MASKED or padding is not None
    for tile in range(n_tiles):
        places, inner = _list_tile(blocks, first, last, tile, BLOCK, STEP)
        positions = _positions(order, places, n_places)
        inside = positions < n_k  # [STEP]
        if padding is not None:
            inside &= tl.load(padding + positions.to(tl.int64) * padding_stride, mask=inside, other=1) == 0
        k = _load_rows(key, positions, inside, k_strides, D, BLOCK_D, LOAD_MASKED).to(DOT)
        v = _load_rows(value, positions, inside, v_strides, DV, BLOCK_DV, LOAD_MASKED).to(DOT)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2  # [OWN, STEP]
        weights = tl.exp2(scores - row_lse[:, None])
        if MASKED:
            kept = _kept_keys(table, masks, first, last, tile, row_inner, inner, BLOCK, STEP) & inside[None, :]
            weights = tl.where(kept, weights, 0.0)
        elif LOAD_MASKED:
            weights = tl.where(inside[None, :], weights, 0.0)
        grad_weights = tl.dot(g, tl.trans(v), input_precision="ieee")
        grad_scores = weights * (grad_weights - row_delta[:, None])
        acc = tl.dot(grad_scores.to(DOT), k, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=_LENGTHS)
def _grad_query(
    query, key, value, grad_out, grad_query, delta, lse_log2, padding, starts, splits, blocks, masks, table, order,
    q_strides, k_strides, v_strides, grad_strides, out_strides, padding_strides,
    n_heads, group, n_q, n_k, query_start, n_places, n_lines, n_tiles, first_tile, layout_step, order_step,
    scale, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    own = first_tile + n_tiles - 1 - pid % n_tiles  # late queries first, as in _forward
    batch, head = (pid // n_tiles // n_heads).to(tl.int64), (pid // n_tiles % n_heads).to(tl.int64)
    query += batch * q_strides[0] + head * q_strides[1]
    key += batch * k_strides[0] + head // group * k_strides[1]
    value += batch * v_strides[0] + head // group * v_strides[1]
    grad_out += batch * grad_strides[0] + head * grad_strides[1]
    grad_query += batch * out_strides[0] + head * out_strides[1]
    if order is not None:
        order += head * order_step
    if padding is not None:
        padding += batch * padding_strides[0]

    places = own * OWN + tl.arange(0, OWN)
    rows = _positions(order, places, n_places) - query_start
    inside = (rows >= 0) & (rows < n_q)  # [OWN]
    row_inner = places % BLOCK
    q = _load_rows(query, rows, inside, q_strides, D, BLOCK_D, True).to(DOT)
    g = _load_rows(grad_out, rows, inside, grad_strides, DV, BLOCK_DV, True).to(DOT)
    row = (batch * n_heads + head) * n_q + rows
    row_lse = tl.load(lse_log2 + row, mask=inside, other=float("inf"))
    row_delta = tl.load(delta + row, mask=inside, other=0.0)

    line = head * layout_step * n_lines + own // (BLOCK // OWN)
    first, full_tiles, rest, rest_tiles, last = _list_bounds(starts, splits, line, BLOCK, STEP)
    present = tl.max(inside.to(tl.int32), 0)  # as in _forward
    acc = tl.zeros([OWN, BLOCK_D], tl.float32)
    acc = _grad_query_tiles(
        acc, q, g, row_lse, row_delta, row_inner, key, value, padding, order, blocks, masks, table, first, last,
        full_tiles * present, k_strides, v_strides, padding_strides[1], n_k, n_places, scale_log2,
        D, DV, BLOCK, STEP, BLOCK_D, BLOCK_DV, DOT, False,
    )  # fmt: skip
    acc = _grad_query_tiles(
        acc, q, g, row_lse, row_delta, row_inner, key, value, padding, order, blocks, masks, table, rest, last,
        rest_tiles * present, k_strides, v_strides, padding_strides[1], n_k, n_places, scale_log2,
        D, DV, BLOCK, STEP, BLOCK_D, BLOCK_DV, DOT, True,
    )  # fmt: skip
    _store_rows(grad_query, rows, inside, out_strides, acc * scale, D, BLOCK_D)


@triton.jit
def _grad_key_value_tiles(
    grad_k, grad_v, k, v, own_start, query, grad_out, delta, lse_log2, order, blocks, masks, table, first, last,
    n_tiles, q_strides, grad_strides, n_q, query_start, n_places, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, DOT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for tile in range(n_tiles):
        places, inner = _list_tile(blocks, first, last, tile, BLOCK, STEP)
        rows = _positions(order, places, n_places) - query_start
        inside = (rows >= 0) & (rows < n_q)  # [STEP]
        q = _load_rows(query, rows, inside, q_strides, D, BLOCK_D, True).to(DOT)
        g = _load_rows(grad_out, rows, inside, grad_strides, DV, BLOCK_DV, True).to(DOT)
        row_lse = tl.load(lse_log2 + rows, mask=inside, other=float("inf"))  # weight 0 for rows outside
        row_delta = tl.load(delta + rows, mask=inside, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2  # [OWN, STEP], keys by queries
        weights = tl.exp2(scores - row_lse[None, :])
        if MASKED:
            kept = _kept_queries(table, masks, first, last, tile, inner, own_start, OWN, BLOCK, STEP)
            weights = tl.where(kept, weights, 0.0)
        grad_v = tl.dot(weights.to(DOT), g, grad_v, input_precision="ieee")
        grad_weights = tl.dot(v, tl.trans(g), input_precision="ieee")
        grad_scores = weights * (grad_weights - row_delta[None, :])
        grad_k = tl.dot(grad_scores.to(DOT), q, grad_k, input_precision="ieee")
    return grad_k, grad_v


@triton.jit(do_not_specialize=_LENGTHS)
def _grad_key_value(
    query, key, value, grad_out, grad_key, grad_value, delta, lse_log2, padding,
    starts, splits, blocks, masks, table, order,
    q_strides, k_strides, v_strides, grad_strides, grad_k_strides, grad_v_strides, padding_strides,
    n_heads, group, summed, n_q, n_k, query_start, n_places, n_lines, n_tiles, layout_step, order_step,
    scale, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    # Sums over the ``summed`` query heads that share one gradient: all of a key's group, or one.
    pid = tl.program_id(0)
    own = pid % n_tiles  # early keys first: under a causal layout most queries see them
    grad_heads = n_heads // summed
    batch, grad_head = (pid // n_tiles // grad_heads).to(tl.int64), (pid // n_tiles % grad_heads).to(tl.int64)
    query += batch * q_strides[0]
    key += batch * k_strides[0] + grad_head * summed // group * k_strides[1]
    value += batch * v_strides[0] + grad_head * summed // group * v_strides[1]
    grad_out += batch * grad_strides[0]
    grad_key += batch * grad_k_strides[0] + grad_head * grad_k_strides[1]
    grad_value += batch * grad_v_strides[0] + grad_head * grad_v_strides[1]
    if order is not None:
        order += grad_head * summed * order_step  # heads that are summed share their order

    places = own * OWN + tl.arange(0, OWN)
    positions = _positions(order, places, n_places)
    inside = positions < n_k  # [OWN]
    seen = inside
    if padding is not None:
        pointers = padding + batch * padding_strides[0] + positions.to(tl.int64) * padding_strides[1]
        seen &= tl.load(pointers, mask=inside, other=1) == 0
    k = _load_rows(key, positions, seen, k_strides, D, BLOCK_D, True).to(DOT)
    v = _load_rows(value, positions, seen, v_strides, DV, BLOCK_DV, True).to(DOT)
    grad_k = tl.zeros([OWN, BLOCK_D], tl.float32)
    grad_v = tl.zeros([OWN, BLOCK_DV], tl.float32)
    for member in range(summed):
        head = grad_head * summed + member
        row = (batch * n_heads + head) * n_q
        line = head * layout_step * n_lines + own // (BLOCK // OWN)
        first, full_tiles, rest, rest_tiles, last = _list_bounds(starts, splits, line, BLOCK, STEP)
        grad_k, grad_v = _grad_key_value_tiles(
            grad_k, grad_v, k, v, own * OWN % BLOCK, query + head * q_strides[1], grad_out + head * grad_strides[1],
            delta + row, lse_log2 + row, order, blocks, masks, table, first, last,
            full_tiles, q_strides, grad_strides, n_q, query_start, n_places, scale_log2,
            D, DV, BLOCK, OWN, STEP, BLOCK_D, BLOCK_DV, DOT, False,
        )  # fmt: skip
        grad_k, grad_v = _grad_key_value_tiles(
            grad_k, grad_v, k, v, own * OWN % BLOCK, query + head * q_strides[1], grad_out + head * grad_strides[1],
            delta + row, lse_log2 + row, order, blocks, masks, table, rest, last,
            rest_tiles, q_strides, grad_strides, n_q, query_start, n_places, scale_log2,
            D, DV, BLOCK, OWN, STEP, BLOCK_D, BLOCK_DV, DOT, True,
        )  # fmt: skip
    # A key that no query may see has been treated as one of zeros; its own gradients are 0.
    grad_k = tl.where(seen[:, None], grad_k * scale, 0.0)
    grad_v = tl.where(seen[:, None], grad_v, 0.0)
    _store_rows(grad_key, positions, inside, grad_k_strides, grad_k, D, BLOCK_D)
    _store_rows(grad_value, positions, inside, grad_v_strides, grad_v, DV, BLOCK_DV)


#: The dtype that each input dtype is multiplied in. Triton's interpreter can't multiply bfloat16; the products of two
#: bfloat16 are exact in float32, so what it computes there is the same but for the rounding of the weights.
_DOT = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.float32 if _native.interpreting() else tl.bfloat16,
}

#: Queries that a program of ``_row_terms`` owns.
_ROW_TERMS = 64


class _Layout(NamedTuple):
    """A layout as the kernels take it: lists of rows, lists of columns, and what both share."""

    rows: list[Tensor]
    columns: list[Tensor]
    table: Tensor
    order: Tensor | None
    layout_step: int  # 0 where all heads share their lists
    order_step: int  # 0 where all heads share their order


def _layout(tensors: list[Tensor]) -> _Layout:
    *lists, table, order = tensors
    heads, places = order.shape
    return _Layout(
        lists[:4], lists[4:], table, order if places else None,
        int(lists[1].shape[0] > 1), places if heads > 1 else 0,
    )  # fmt: skip


def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9  # the interpreter has no limits


def _constants(kernel: str, query: Tensor, value: Tensor, block_size: int) -> tuple[Tiles, dict[str, Any]]:
    head_dim, value_dim = query.shape[3], value.shape[3]
    block_d, block_dv = (max(16, triton.next_power_of_2(d)) for d in (head_dim, value_dim))
    config = tiles(kernel, _capability(query.device), max(block_d, block_dv), block_size, query.element_size())
    return config, {
        "D": head_dim, "DV": value_dim, "BLOCK_D": block_d, "BLOCK_DV": block_dv,
        "BLOCK": block_size, "OWN": config.own, "STEP": config.step, "DOT": _DOT[query.dtype],
    }  # fmt: skip


def _query_tiles(own: int, n_q: int, query_start: int, layout: _Layout, layout_n_q: int) -> tuple[int, int]:
    """First tile and number of tiles that can hold a call's queries: with an order, every tile."""
    if layout.order is not None:
        return 0, triton.cdiv(layout_n_q, own)
    first = query_start // own
    return first, triton.cdiv(query_start + n_q, own) - first


def _launch(
    kernel: Any, programs: int, device: torch.device, num_warps: int, num_stages: int, *args: Any, **constants: Any
) -> None:
    if programs:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            kernel[(programs,)](*args, **constants, num_warps=num_warps, num_stages=num_stages)


def _padding_strides(key_padding_mask: Tensor | None) -> tuple[int, ...]:
    return key_padding_mask.stride() if key_padding_mask is not None else (0, 0)


def forward(
    outputs: tuple[Tensor, Tensor], query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None,
    layout: list[Tensor], sizes: list[int], scale: float, query_start: int, backend: str,
) -> None:  # fmt: skip
    """Fill ``(out, lse)``. One launch."""
    out, lse = outputs
    batch, heads, n_q, _ = query.shape
    layout_n_q, _, block_size = sizes
    lists = _layout(layout)
    config, constants = _constants("forward", query, value, block_size)
    first_tile, n_tiles = _query_tiles(config.own, n_q, query_start, lists, layout_n_q)
    _launch(
        _forward, n_tiles * batch * heads, query.device, config.num_warps, config.num_stages,
        query, key, value, out, lse, key_padding_mask, *lists.rows, lists.table, lists.order,
        query.stride(), key.stride(), value.stride(), out.stride(), _padding_strides(key_padding_mask),
        heads, heads // key.shape[1], n_q, key.shape[2], query_start, layout_n_q, triton.cdiv(layout_n_q, block_size),
        n_tiles, first_tile, lists.layout_step, lists.order_step, scale * math.log2(math.e), **constants,
    )  # fmt: skip


def backward(
    outputs: tuple[Tensor, Tensor, Tensor], grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor,
    value: Tensor, out: Tensor, lse: Tensor, key_padding_mask: Tensor | None, layout: list[Tensor], sizes: list[int],
    scale: float, query_start: int, backend: str,
) -> None:  # fmt: skip
    """Fill ``(grad_query, grad_key, grad_value)``. Three launches."""
    grad_query, grad_key, grad_value = outputs
    batch, heads, n_q, _ = query.shape
    kv_heads, n_k = key.shape[1:3]
    group = heads // kv_heads
    layout_n_q, layout_n_k, block_size = sizes
    lists = _layout(layout)
    device, scale_log2 = query.device, scale * math.log2(math.e)
    padding_strides = _padding_strides(key_padding_mask)

    delta, lse_log2 = (torch.empty(batch, heads, n_q, dtype=torch.float32, device=device) for _ in range(2))
    config, constants = _constants("grad_query", query, value, block_size)
    n_tiles = triton.cdiv(n_q, _ROW_TERMS)
    _launch(
        _row_terms, n_tiles * batch * heads, device, 4, 1,
        out, grad_out, lse.contiguous(), grad_lse, delta, lse_log2, out.stride(), grad_out.stride(),
        grad_lse.stride() if grad_lse is not None else (0, 0, 0), heads, n_q, n_tiles,
        DV=constants["DV"], BLOCK_DV=constants["BLOCK_DV"], OWN=_ROW_TERMS,
    )  # fmt: skip

    first_tile, n_tiles = _query_tiles(config.own, n_q, query_start, lists, layout_n_q)
    _launch(
        _grad_query, n_tiles * batch * heads, device, config.num_warps, config.num_stages,
        query, key, value, grad_out, grad_query, delta, lse_log2, key_padding_mask,
        *lists.rows, lists.table, lists.order,
        query.stride(), key.stride(), value.stride(), grad_out.stride(), grad_query.stride(), padding_strides,
        heads, group, n_q, n_k, query_start, layout_n_q, triton.cdiv(layout_n_q, block_size), n_tiles, first_tile,
        lists.layout_step, lists.order_step, scale, scale_log2, **constants,
    )  # fmt: skip

    # A program owns places. Query heads that put different keys there can't share its accumulators: then each has
    # gradients of its own, summed afterwards.
    shared = lists.order_step == 0 or group == 1
    partial_key, partial_value = grad_key, grad_value
    if not shared:
        partial_key, partial_value = (
            torch.empty(batch, heads, n_k, grad.shape[3], dtype=torch.float32, device=device)
            for grad in (grad_key, grad_value)
        )
    summed = group if shared else 1
    config, constants = _constants("grad_key_value", query, value, block_size)
    n_tiles = triton.cdiv(n_k if lists.order is None else layout_n_k, config.own)
    _launch(
        _grad_key_value, n_tiles * batch * (heads // summed), device, config.num_warps, config.num_stages,
        query, key, value, grad_out, partial_key, partial_value, delta, lse_log2, key_padding_mask,
        *lists.columns, lists.table, lists.order,
        query.stride(), key.stride(), value.stride(), grad_out.stride(), partial_key.stride(), partial_value.stride(),
        padding_strides, heads, group, summed, n_q, n_k, query_start, layout_n_k, triton.cdiv(layout_n_k, block_size),
        n_tiles, lists.layout_step, lists.order_step, scale, scale_log2, **constants,
    )  # fmt: skip
    if not shared:
        for grad, partial in ((grad_key, partial_key), (grad_value, partial_value)):
            grad.copy_(partial.unflatten(1, (kv_heads, group)).sum(2))
