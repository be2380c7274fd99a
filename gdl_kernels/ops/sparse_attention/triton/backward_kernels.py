"""The backward pass: rows are walked for the gradient of the queries, columns for those of keys and values."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ...._triton import ceil_div, launch
from .dropout import Dropout, load_seed, survives
from .launch import Call, padded
from .walk import (
    SCALARS,
    Keys,
    first_position,
    kept_keys,
    kept_queries,
    key_tile,
    list_bounds,
    list_tile,
    load_rows,
    load_tile,
    n_seen_keys,
    own_tile,
    positions_of,
    store_rows,
    tile_start,
)


@triton.jit(do_not_specialize=SCALARS)
def _row_terms(
    out, grad_out, lse, grad_lse, delta, lse_log2, out_strides, grad_strides, n_heads, n_q, n_tiles,
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
    o = load_rows(out, rows, inside, out_strides, DV, BLOCK_DV, True).to(tl.float32)
    g = load_rows(grad_out, rows, inside, grad_strides, DV, BLOCK_DV, True).to(tl.float32)
    total = tl.sum(o * g, 1)
    if grad_lse is not None:
        total -= tl.load(grad_lse + line * n_q + rows, mask=inside, other=0.0)
    natural = tl.load(lse + line * n_q + rows, mask=inside, other=0.0)
    base_2 = tl.where(natural == float("-inf"), float("inf"), natural * 1.4426950408889634)  # log2(e)
    tl.store(delta + line * n_q + rows, total, mask=inside)
    tl.store(lse_log2 + line * n_q + rows, base_2, mask=inside)


@triton.jit
def _grad_query_tiles(
    acc, q, g, row_lse, row_delta, positions, row_inner, key, value, key_tiles, value_tiles, batch, kv_head, keys,
    dropout, first, last, n_tiles, k_strides, v_strides, scale_log2,
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
        ).to(DOT)  # fmt: skip
        v = load_tile(
            value, value_tiles, batch, kv_head, start, key_positions, inside, v_strides, DV, BLOCK_DV, LOAD_MASKED
        ).to(DOT)  # fmt: skip
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2  # [OWN, STEP]
        weights = tl.exp2(scores - row_lse[:, None])
        if MASKED:
            kept = kept_keys(keys.lists, keys.table, first, last, tile, row_inner, inner, BLOCK, STEP)
            weights = tl.where(kept & inside[None, :], weights, 0.0)
        elif LOAD_MASKED:
            weights = tl.where(inside[None, :], weights, 0.0)
        grad_weights = tl.dot(g, tl.trans(v), input_precision="ieee")
        if dropout.seed is not None:
            alive = survives(dropout, positions, key_positions, keys.order is None)
            grad_weights = tl.where(alive, grad_weights * dropout.scale, 0.0)
        grad_scores = weights * (grad_weights - row_delta[:, None])
        acc = tl.dot(grad_scores.to(DOT), k, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=SCALARS)
def _grad_query(
    query, key, value, key_tiles, value_tiles, grad_out, grad_query, delta, lse_log2,
    lists, table, order, padding, start, seed,
    q_strides, k_strides, v_strides, grad_strides, out_strides,
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
    g_base = grad_out + batch * grad_strides[0] + head * grad_strides[1]
    out_base = grad_query + batch * out_strides[0] + head * out_strides[1]
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
    row_inner = places % BLOCK
    q = load_rows(q_base, rows, inside, q_strides, D, BLOCK_D, True).to(DOT)
    g = load_rows(g_base, rows, inside, grad_strides, DV, BLOCK_DV, True).to(DOT)
    row = (batch * n_heads + head) * n_q + rows
    row_lse = tl.load(lse_log2 + row, mask=inside, other=float("inf"))
    row_delta = tl.load(delta + row, mask=inside, other=0.0)

    line = head * list_step * n_lines + tl.minimum(own // (BLOCK // OWN), n_lines - 1)
    begin, full_tiles, rest, rest_tiles, end = list_bounds(lists, line, ragged, BLOCK, STEP)
    present = tl.max((inside & (positions < n_layout_q)).to(tl.int32), 0)  # as in _forward
    acc = tl.zeros([OWN, BLOCK_D], tl.float32)
    acc = _grad_query_tiles(
        acc, q, g, row_lse, row_delta, positions, row_inner, k_base, v_base, key_tiles, value_tiles, batch,
        head // group, keys, dropout, begin, end, full_tiles * present, k_strides, v_strides, scale_log2,
        D, DV, BLOCK, STEP, BLOCK_D, BLOCK_DV, DOT, False,
    )  # fmt: skip
    acc = _grad_query_tiles(
        acc, q, g, row_lse, row_delta, positions, row_inner, k_base, v_base, key_tiles, value_tiles, batch,
        head // group, keys, dropout, rest, end, rest_tiles * present, k_strides, v_strides, scale_log2,
        D, DV, BLOCK, STEP, BLOCK_D, BLOCK_DV, DOT, True,
    )  # fmt: skip
    store_rows(out_base, rows, inside, out_strides, acc * scale, D, BLOCK_D)


@triton.jit
def _grad_key_value_tiles(
    grad_k, grad_v, k, v, positions, own_start, query, grad_out, query_tiles, grad_tiles, batch, head, delta, lse_log2,
    lists, table, order, n_places, dropout, first, last, n_tiles, q_strides, grad_strides, n_q, first_query, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, DOT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for tile in range(n_tiles):
        places, inner = list_tile(lists.blocks, first, last, tile, BLOCK, STEP)
        query_positions = positions_of(order, places, n_places)
        rows = query_positions - first_query
        inside = (rows >= 0) & (rows < n_q)  # [STEP]
        start = 0
        if query_tiles is not None or grad_tiles is not None:
            start = tile_start(lists.blocks, first, tile, BLOCK, STEP) - first_query
        q = load_tile(query, query_tiles, batch, head, start, rows, inside, q_strides, D, BLOCK_D, True).to(DOT)
        g = load_tile(grad_out, grad_tiles, batch, head, start, rows, inside, grad_strides, DV, BLOCK_DV, True).to(DOT)
        row_lse = tl.load(lse_log2 + rows, mask=inside, other=float("inf"))  # weight 0 for rows outside
        row_delta = tl.load(delta + rows, mask=inside, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2  # [OWN, STEP], keys by queries
        weights = tl.exp2(scores - row_lse[None, :])
        if MASKED:
            kept = kept_queries(lists, table, first, last, tile, inner, own_start, OWN, BLOCK, STEP)
            weights = tl.where(kept, weights, 0.0)
        grad_weights = tl.dot(v, tl.trans(g), input_precision="ieee")
        if dropout.seed is not None:
            alive = tl.trans(survives(dropout, query_positions, positions, order is None))
            grad_v = tl.dot(tl.where(alive, weights, 0.0).to(DOT), g, grad_v, input_precision="ieee")
            grad_weights = tl.where(alive, grad_weights * dropout.scale, 0.0)
        else:
            grad_v = tl.dot(weights.to(DOT), g, grad_v, input_precision="ieee")
        grad_scores = weights * (grad_weights - row_delta[None, :])
        grad_k = tl.dot(grad_scores.to(DOT), q, grad_k, input_precision="ieee")
    return grad_k, grad_v


@triton.jit(do_not_specialize=SCALARS)
def _grad_key_value(
    query, key, value, grad_out, query_tiles, grad_tiles, grad_key, grad_value, delta, lse_log2,
    lists, table, order, padding, start, seed,
    q_strides, k_strides, v_strides, grad_strides, grad_k_strides, grad_v_strides,
    n_batch, n_heads, group, n_q, n_k, query_start, n_layout_q, n_lines, n_tiles, whole, causal, ragged,
    list_step, order_step, threshold, keep_scale, scale, summed,
    D: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    # Sums over the ``summed`` query heads that share one gradient: all of a key's group, or one.
    first_query = first_position(start, query_start, n_layout_q)
    n_seen = n_seen_keys(first_query, n_q, n_k, causal)
    seed_value = load_seed(seed)
    scale_log2 = scale * 1.4426950408889634  # log2(e)
    batch, grad_head, own = own_tile(
        tl.program_id(0), 0, lists.longest_first, n_batch, n_heads // summed, n_lines, n_tiles, whole, list_step,
        BLOCK // OWN, False,
    )  # fmt: skip
    k_base = key + batch * k_strides[0] + grad_head * summed // group * k_strides[1]
    v_base = value + batch * v_strides[0] + grad_head * summed // group * v_strides[1]
    head_order = order
    if order is not None:
        head_order = order + grad_head * summed * order_step  # heads that are summed share their order

    places = own * OWN + tl.arange(0, OWN)
    positions = positions_of(head_order, places, n_layout_q)
    inside = positions < n_k  # [OWN]
    seen = positions < n_seen
    if padding is not None:
        seen &= tl.load(padding + batch * n_k + positions, mask=seen, other=1) == 0
    k = load_rows(k_base, positions, seen, k_strides, D, BLOCK_D, True).to(DOT)
    v = load_rows(v_base, positions, seen, v_strides, DV, BLOCK_DV, True).to(DOT)
    present = tl.max(seen.to(tl.int32), 0)
    grad_k = tl.zeros([OWN, BLOCK_D], tl.float32)
    grad_v = tl.zeros([OWN, BLOCK_DV], tl.float32)
    for member in range(summed):
        head = grad_head * summed + member
        q_base = query + batch * q_strides[0] + head * q_strides[1]
        g_base = grad_out + batch * grad_strides[0] + head * grad_strides[1]
        row = (batch * n_heads + head) * n_q
        dropout = Dropout(seed_value, threshold, keep_scale, (batch * n_heads + head).to(tl.int32))
        line = head * list_step * n_lines + own // (BLOCK // OWN)
        begin, full_tiles, rest, rest_tiles, end = list_bounds(lists, line, 0, BLOCK, STEP)
        grad_k, grad_v = _grad_key_value_tiles(
            grad_k, grad_v, k, v, positions, own * OWN % BLOCK, q_base, g_base, query_tiles, grad_tiles, batch, head,
            delta + row, lse_log2 + row, lists, table, head_order, n_layout_q, dropout,
            begin, end, full_tiles * present, q_strides, grad_strides, n_q, first_query, scale_log2,
            D, DV, BLOCK, OWN, STEP, BLOCK_D, BLOCK_DV, DOT, False,
        )  # fmt: skip
        grad_k, grad_v = _grad_key_value_tiles(
            grad_k, grad_v, k, v, positions, own * OWN % BLOCK, q_base, g_base, query_tiles, grad_tiles, batch, head,
            delta + row, lse_log2 + row, lists, table, head_order, n_layout_q, dropout,
            rest, end, rest_tiles * present, q_strides, grad_strides, n_q, first_query, scale_log2,
            D, DV, BLOCK, OWN, STEP, BLOCK_D, BLOCK_DV, DOT, True,
        )  # fmt: skip
    if seed is not None:
        grad_v *= keep_scale
    # A key that no query may see has been treated as one of zeros; its own gradients are 0.
    grad_k = tl.where(seen[:, None], grad_k * scale, 0.0)
    grad_v = tl.where(seen[:, None], grad_v, 0.0)
    k_out = grad_key + batch * grad_k_strides[0] + grad_head * grad_k_strides[1]
    v_out = grad_value + batch * grad_v_strides[0] + grad_head * grad_v_strides[1]
    store_rows(k_out, positions, inside, grad_k_strides, grad_k, D, BLOCK_D)
    store_rows(v_out, positions, inside, grad_v_strides, grad_v, DV, BLOCK_DV)


#: How ``_row_terms`` is launched; ``own``: queries of a program. Not tuned yet.
_ROW_TERMS = {"own": 64, "num_warps": 4}


def backward(
    outputs: tuple[Tensor, Tensor, Tensor], grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor,
    value: Tensor, out: Tensor, lse: Tensor, *rest: Any,
) -> None:  # fmt: skip
    """Fill ``(grad_query, grad_key, grad_value)``. Three launches."""
    grad_query, grad_key, grad_value = outputs
    call = Call(query, key, value, *rest)
    delta, lse_log2 = call.empty_like_rows(2)
    block_dv = padded(call.value_dim)
    config = call.config("row_terms", (block_dv, call.dtype.itemsize), _ROW_TERMS)
    n_tiles = ceil_div(call.n_q, config["own"])
    launch(
        _row_terms, n_tiles * call.batch * call.heads, call.device,
        out, grad_out, lse.contiguous(), grad_lse if grad_lse is None else grad_lse.contiguous(), delta, lse_log2,
        out.stride(), grad_out.stride(), call.heads, call.n_q, n_tiles,
        DV=call.value_dim, BLOCK_DV=block_dv, OWN=config["own"], num_warps=config["num_warps"],
    )  # fmt: skip

    config, constants = call.tiles("grad_query")
    n_tiles, programs, whole = call.row_work(config["own"])
    launch(
        _grad_query, programs, call.device,
        query, key, value, *call.key_descriptors(key, value, config["step"]), grad_out, grad_query, delta, lse_log2,
        *call.tensors(call.rows),
        query.stride(), key.stride(), value.stride(), grad_out.stride(), grad_query.stride(),
        *call.scalars(call.rows, n_tiles, whole), **constants,
    )  # fmt: skip

    config, constants = call.tiles("grad_key_value")
    summed = call.summed()
    n_tiles, programs, whole = call.column_work(config["own"], summed)
    with call.summed_over_groups(grad_key, grad_value) as (partial_key, partial_value):
        launch(
            _grad_key_value, programs, call.device,
            query, key, value, grad_out, *call.query_descriptors(query, grad_out, config["step"]),
            partial_key, partial_value, delta, lse_log2, *call.tensors(call.columns),
            query.stride(), key.stride(), value.stride(), grad_out.stride(),
            partial_key.stride(), partial_value.stride(),
            *call.scalars(call.columns, n_tiles, whole), summed, **constants,
        )  # fmt: skip
