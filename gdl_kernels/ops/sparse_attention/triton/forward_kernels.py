"""The forward pass: one walk over a row's list, with a softmax that is corrected as it goes."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ...._triton import launch
from .decode_kernels import DECODED_QUERIES, decode
from .dropout import Dropout, load_seed, survives
from .launch import Call
from .walk import (
    SCALARS,
    Keys,
    first_position,
    kept_keys,
    key_tile,
    list_bounds,
    load_rows,
    load_tile,
    n_seen_keys,
    own_tile,
    positions_of,
    store_rows,
    tile_start,
)


@triton.jit
def _forward_tiles(
    acc, total, peak, q, positions, row_inner, key, value, key_tiles, value_tiles, batch, kv_head, keys, dropout,
    first, last, n_tiles, k_strides, v_strides, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, DOT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    LOAD_MASKED: tl.constexpr = MASKED or keys.padding is not None
    for tile in range(n_tiles):
        key_positions, inner, inside = key_tile(keys, first, last, tile, BLOCK, STEP)
        start = 0
        if key_tiles is not None or value_tiles is not None:
            start = tile_start(keys.lists.blocks, first, tile, BLOCK, STEP)
        k = load_tile(
            key, key_tiles, batch, kv_head, start, key_positions, inside, k_strides, D, BLOCK_D, LOAD_MASKED
        )  # fmt: skip
        scores = tl.dot(q, tl.trans(k.to(DOT)), input_precision="ieee") * scale_log2  # [OWN, STEP]
        if MASKED:
            kept = kept_keys(keys.lists, keys.table, first, last, tile, row_inner, inner, BLOCK, STEP)
            scores = tl.where(kept & inside[None, :], scores, float("-inf"))
        elif LOAD_MASKED:
            scores = tl.where(inside[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        shift = new_peak
        if LOAD_MASKED:
            shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # a row that has kept nothing so far
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(peak - shift)
        total = total * decay + tl.sum(weights, 1)
        if dropout.seed is not None:
            weights = tl.where(survives(dropout, positions, key_positions, keys.order is None), weights, 0.0)
        v = load_tile(
            value, value_tiles, batch, kv_head, start, key_positions, inside, v_strides, DV, BLOCK_DV, LOAD_MASKED
        )  # fmt: skip
        acc = tl.dot(weights.to(DOT), v.to(DOT), acc * decay[:, None], input_precision="ieee")
        peak = new_peak
    return acc, total, peak


@triton.jit(do_not_specialize=SCALARS)
def _forward(
    query, key, value, key_tiles, value_tiles, out, lse, lists, table, order, padding, start, seed,
    q_strides, k_strides, v_strides, out_strides,
    n_batch, n_heads, group, n_q, n_k, query_start, n_layout_q, n_lines, n_tiles, whole, causal, ragged,
    list_step, order_step, threshold, keep_scale, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    first_query = first_position(start, query_start, n_layout_q)
    n_seen = n_seen_keys(first_query, n_q, n_k, causal)
    seed_value = load_seed(seed)
    first_tile = 0 if order is not None else first_query // OWN
    scale_log2 = scale * 1.4426950408889634  # log2(e)
    batch, head, own = own_tile(
        tl.program_id(0), first_tile, lists.longest_first, n_batch, n_heads, n_lines, n_tiles, whole, list_step,
        BLOCK // OWN, True,
    )  # fmt: skip
    q_base = query + batch * q_strides[0] + head * q_strides[1]
    k_base = key + batch * k_strides[0] + head // group * k_strides[1]
    v_base = value + batch * v_strides[0] + head // group * v_strides[1]
    out_base = out + batch * out_strides[0] + head * out_strides[1]
    lse_base = lse + (batch * n_heads + head) * n_q
    head_order = order
    if order is not None:
        head_order = order + head * order_step
    batch_padding = padding
    if padding is not None:
        batch_padding = padding + batch * n_k
    keys = Keys(lists, table, head_order, n_layout_q, batch_padding, n_seen)
    dropout = Dropout(seed_value, threshold, keep_scale, (batch * n_heads + head).to(tl.int32))

    places = own * OWN + tl.arange(0, OWN)
    positions = positions_of(head_order, places, n_layout_q)
    rows = positions - first_query
    inside = (rows >= 0) & (rows < n_q)  # [OWN]
    known = inside & (positions < n_layout_q)
    row_inner = places % BLOCK
    q = load_rows(q_base, rows, inside, q_strides, D, BLOCK_D, True).to(DOT)

    line = head * list_step * n_lines + tl.minimum(own // (BLOCK // OWN), n_lines - 1)
    begin, full_tiles, rest, rest_tiles, end = list_bounds(lists, line, ragged, BLOCK, STEP)
    # A tile may hold none of this call's queries; then its full blocks may hold keys that do not exist yet.
    present = tl.max(known.to(tl.int32), 0)
    acc = tl.zeros([OWN, BLOCK_DV], tl.float32)
    total = tl.zeros([OWN], tl.float32)
    peak = tl.full([OWN], float("-inf"), tl.float32)
    acc, total, peak = _forward_tiles(
        acc, total, peak, q, positions, row_inner, k_base, v_base, key_tiles, value_tiles, batch, head // group, keys,
        dropout, begin, end, full_tiles * present, k_strides, v_strides, scale_log2,
        D, DV, BLOCK, STEP, BLOCK_D, BLOCK_DV, DOT, False,
    )  # fmt: skip
    acc, total, peak = _forward_tiles(
        acc, total, peak, q, positions, row_inner, k_base, v_base, key_tiles, value_tiles, batch, head // group, keys,
        dropout, rest, end, rest_tiles * present, k_strides, v_strides, scale_log2,
        D, DV, BLOCK, STEP, BLOCK_D, BLOCK_DV, DOT, True,
    )  # fmt: skip
    empty = (total == 0.0) | (positions >= n_layout_q)
    norm = 1.0 / tl.where(empty, 1.0, total)
    if seed is not None:
        norm *= keep_scale
    acc = tl.where(empty[:, None], 0.0, acc * norm[:, None])
    store_rows(out_base, rows, inside, out_strides, acc, DV, BLOCK_DV)
    natural = (peak + tl.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453  # log(2)
    tl.store(lse_base + rows, tl.where(empty, float("-inf"), natural), mask=inside)


def forward(outputs: tuple[Tensor, Tensor], query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> None:
    """Fill ``(out, lse)``. One launch; two where the keys of few queries are split among programs."""
    out, lse = outputs
    call = Call(query, key, value, *rest)
    if call.n_q <= DECODED_QUERIES:
        decode(call, out, lse, query, key, value)
        return
    config, constants = call.tiles("forward")
    n_tiles, programs, whole = call.row_work(config["own"])
    launch(
        _forward, programs, call.device,
        query, key, value, *call.key_descriptors(key, value, config["step"]), out, lse, *call.tensors(call.rows),
        query.stride(), key.stride(), value.stride(), out.stride(),
        *call.scalars(call.rows, n_tiles, whole), **constants,
    )  # fmt: skip
