"""The derivative of the backward pass: rows are walked twice, then columns once.

``a``, ``b`` and ``c`` are what is given for the gradients of queries, keys and values; ``g`` is the gradient of the
output, ``z`` the dropout multiplier. Of each kept pair::

    p = exp(scale q.k - lse)    t = z g.v    u = scale (a.k + q.b)    w = z g.c
    r = t (u - mu) - delta u + w    e = p (r - rho)    ds = p (t - delta)

and of each row ``delta = sum p t - grad_lse``, ``mu = sum p u``, ``rho = sum p r``. Then::

    grad_q = scale (sum e k + ds b)       grad_k = scale (sum e q + ds a)      grad_v = sum z p (u - mu) g
    grad_grad_out = sum z p ((u - mu) v + c)                                   grad_grad_lse = mu
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ...._triton import launch
from .dropout import Dropout, load_seed, survives
from .launch import Call
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
    n_seen_keys,
    own_tile,
    positions_of,
    store_rows,
)


@triton.jit
def _dot(x, y):
    return tl.dot(x, tl.trans(y), input_precision="ieee")


@triton.jit
def _load_lse(lse, row, inside):
    # In base 2, +inf for a row that keeps nothing or is none: its weights are then 0 with no test.
    natural = tl.load(lse + row, mask=inside, other=float("-inf"))
    return tl.where(natural == float("-inf"), float("inf"), natural * 1.4426950408889634)  # log2(e)


@triton.jit
def _row_sums(
    q, a, g, row_lse, positions, row_inner, key, value, grad_grad_key, grad_grad_value, keys, dropout,
    first, last, n_tiles, k_strides, v_strides, b_strides, c_strides, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    # Of p t, p u, p t u and p w.
    pt = tl.zeros([q.shape[0]], tl.float32)
    pu, ptu, pw = pt, pt, pt
    for tile in range(n_tiles):
        key_positions, inner, inside = key_tile(keys, first, last, tile, BLOCK, STEP)
        k = load_rows(key, key_positions, inside, k_strides, D, BLOCK_D, True).to(DOT)
        kept = kept_keys(keys.lists, keys.table, first, last, tile, row_inner, inner, BLOCK, STEP) & inside[None, :]
        p = tl.where(kept, tl.exp2(_dot(q, k) * (scale * 1.4426950408889634) - row_lse[:, None]), 0.0)  # [OWN, STEP]
        b = load_rows(grad_grad_key, key_positions, inside, b_strides, D, BLOCK_D, True).to(DOT)
        u = (_dot(a, k) + _dot(q, b)) * scale
        pu += tl.sum(p * u, 1)
        if dropout.seed is not None:
            p_alive = tl.where(survives(dropout, positions, key_positions, keys.order is None), p * dropout.scale, 0.0)
        else:
            p_alive = p
        v = load_rows(value, key_positions, inside, v_strides, DV, BLOCK_DV, True).to(DOT)
        t = p_alive * _dot(g, v)
        pt += tl.sum(t, 1)
        ptu += tl.sum(t * u, 1)
        c = load_rows(grad_grad_value, key_positions, inside, c_strides, DV, BLOCK_DV, True).to(DOT)
        pw += tl.sum(p_alive * _dot(g, c), 1)
    return pt, pu, ptu, pw


@triton.jit
def _row_gradients(
    q, a, g, row_lse, delta, mu, rho, positions, row_inner, key, value, grad_grad_key, grad_grad_value, keys, dropout,
    first, last, n_tiles, k_strides, v_strides, b_strides, c_strides, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    grad_q = tl.zeros([q.shape[0], BLOCK_D], tl.float32)
    grad_g = tl.zeros([q.shape[0], BLOCK_DV], tl.float32)
    for tile in range(n_tiles):
        key_positions, inner, inside = key_tile(keys, first, last, tile, BLOCK, STEP)
        k = load_rows(key, key_positions, inside, k_strides, D, BLOCK_D, True).to(DOT)
        kept = kept_keys(keys.lists, keys.table, first, last, tile, row_inner, inner, BLOCK, STEP) & inside[None, :]
        p = tl.where(kept, tl.exp2(_dot(q, k) * (scale * 1.4426950408889634) - row_lse[:, None]), 0.0)  # [OWN, STEP]
        b = load_rows(grad_grad_key, key_positions, inside, b_strides, D, BLOCK_D, True).to(DOT)
        u = (_dot(a, k) + _dot(q, b)) * scale
        v = load_rows(value, key_positions, inside, v_strides, DV, BLOCK_DV, True).to(DOT)
        c = load_rows(grad_grad_value, key_positions, inside, c_strides, DV, BLOCK_DV, True).to(DOT)
        t = _dot(g, v)
        w = _dot(g, c)
        p_alive = p
        if dropout.seed is not None:
            z = tl.where(survives(dropout, positions, key_positions, keys.order is None), dropout.scale, 0.0)
            t, w, p_alive = t * z, w * z, p * z
        e = p * (t * (u - mu[:, None]) - delta[:, None] * u + w - rho[:, None])
        ds = p * (t - delta[:, None])
        grad_q = tl.dot(e.to(DOT), k, grad_q, input_precision="ieee")
        grad_q = tl.dot(ds.to(DOT), b, grad_q, input_precision="ieee")
        grad_g = tl.dot((p_alive * (u - mu[:, None])).to(DOT), v, grad_g, input_precision="ieee")
        grad_g = tl.dot(p_alive.to(DOT), c, grad_g, input_precision="ieee")
    return grad_q, grad_g


@triton.jit(do_not_specialize=SCALARS)
def _double_rows(
    query, key, value, grad_out, grad_grad_query, grad_grad_key, grad_grad_value, lse, grad_lse,
    grad_query, grad_grad_out, grad_grad_lse, row_delta, row_rho, lists, table, order, padding, start, seed,
    q_strides, k_strides, v_strides, g_strides, a_strides, b_strides, c_strides, grad_q_strides, grad_g_strides,
    n_batch, n_heads, group, n_q, n_k, query_start, n_layout_q, n_lines, n_tiles, whole, causal, ragged,
    list_step, order_step, threshold, keep_scale, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    first_query = first_position(start, query_start, n_layout_q)
    n_seen = n_seen_keys(first_query, n_q, n_k, causal)
    seed_value = load_seed(seed)
    first_tile = 0 if order is not None else first_query // OWN
    batch, head, own = own_tile(
        tl.program_id(0), first_tile, lists.longest_first, n_batch, n_heads, n_lines, n_tiles, whole, list_step,
        BLOCK // OWN, True,
    )  # fmt: skip
    k_base = key + batch * k_strides[0] + head // group * k_strides[1]
    v_base = value + batch * v_strides[0] + head // group * v_strides[1]
    b_base = grad_grad_key + batch * b_strides[0] + head // group * b_strides[1]
    c_base = grad_grad_value + batch * c_strides[0] + head // group * c_strides[1]
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
    q_base = query + batch * q_strides[0] + head * q_strides[1]
    a_base = grad_grad_query + batch * a_strides[0] + head * a_strides[1]
    g_base = grad_out + batch * g_strides[0] + head * g_strides[1]
    q = load_rows(q_base, rows, inside, q_strides, D, BLOCK_D, True).to(DOT)
    a = load_rows(a_base, rows, inside, a_strides, D, BLOCK_D, True).to(DOT)
    g = load_rows(g_base, rows, inside, g_strides, DV, BLOCK_DV, True).to(DOT)
    row = (batch * n_heads + head) * n_q + rows
    row_lse = _load_lse(lse, row, inside)

    line = head * list_step * n_lines + tl.minimum(own // (BLOCK // OWN), n_lines - 1)
    # All through the loop that knows masks: another without would save less than it adds to what is compiled.
    _begin, _none, begin, list_tiles, end = list_bounds(lists, line, 1, BLOCK, STEP)
    list_tiles *= tl.max((inside & (positions < n_layout_q)).to(tl.int32), 0)  # as in _forward
    delta, mu, rho, pw = _row_sums(
        q, a, g, row_lse, positions, row_inner, k_base, v_base, b_base, c_base, keys, dropout,
        begin, end, list_tiles, k_strides, v_strides, b_strides, c_strides, scale,
        D, DV, BLOCK, STEP, BLOCK_D, BLOCK_DV, DOT,
    )  # fmt: skip
    rho += pw - mu * delta
    if grad_lse is not None:
        delta -= tl.load(grad_lse + row, mask=inside, other=0.0)
    rho -= delta * mu
    tl.store(grad_grad_lse + row, mu, mask=inside)
    tl.store(row_delta + row, delta, mask=inside)
    tl.store(row_rho + row, rho, mask=inside)
    grad_q, grad_g = _row_gradients(
        q, a, g, row_lse, delta, mu, rho, positions, row_inner, k_base, v_base, b_base, c_base, keys, dropout,
        begin, end, list_tiles, k_strides, v_strides, b_strides, c_strides, scale,
        D, DV, BLOCK, STEP, BLOCK_D, BLOCK_DV, DOT,
    )  # fmt: skip
    q_out = grad_query + batch * grad_q_strides[0] + head * grad_q_strides[1]
    g_out = grad_grad_out + batch * grad_g_strides[0] + head * grad_g_strides[1]
    store_rows(q_out, rows, inside, grad_q_strides, grad_q * scale, D, BLOCK_D)
    store_rows(g_out, rows, inside, grad_g_strides, grad_g, DV, BLOCK_DV)


@triton.jit
def _column_gradients(
    grad_k, grad_v, k, v, b, c, positions, own_start, query, grad_grad_query, grad_out, lse, delta, mu, rho,
    lists, table, order, n_places, dropout, first, last, n_tiles, q_strides, a_strides, g_strides, n_q, first_query,
    scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    for tile in range(n_tiles):
        places, inner = list_tile(lists.blocks, first, last, tile, BLOCK, STEP)
        query_positions = positions_of(order, places, n_places)
        rows = query_positions - first_query
        inside = (rows >= 0) & (rows < n_q)  # [STEP]
        q = load_rows(query, rows, inside, q_strides, D, BLOCK_D, True).to(DOT)
        a = load_rows(grad_grad_query, rows, inside, a_strides, D, BLOCK_D, True).to(DOT)
        g = load_rows(grad_out, rows, inside, g_strides, DV, BLOCK_DV, True).to(DOT)
        row_delta = tl.load(delta + rows, mask=inside, other=0.0)[None, :]
        row_mu = tl.load(mu + rows, mask=inside, other=0.0)[None, :]
        row_rho = tl.load(rho + rows, mask=inside, other=0.0)[None, :]
        kept = kept_queries(lists, table, first, last, tile, inner, own_start, OWN, BLOCK, STEP)
        scores = _dot(k, q) * (scale * 1.4426950408889634)  # [OWN, STEP], keys by queries
        p = tl.where(kept, tl.exp2(scores - _load_lse(lse, rows, inside)[None, :]), 0.0)
        u = (_dot(k, a) + _dot(b, q)) * scale
        t = _dot(v, g)
        w = _dot(c, g)
        p_alive = p
        if dropout.seed is not None:
            z = tl.trans(tl.where(survives(dropout, query_positions, positions, order is None), dropout.scale, 0.0))
            t, w, p_alive = t * z, w * z, p * z
        e = p * (t * (u - row_mu) - row_delta * u + w - row_rho)
        ds = p * (t - row_delta)
        grad_k = tl.dot(e.to(DOT), q, grad_k, input_precision="ieee")
        grad_k = tl.dot(ds.to(DOT), a, grad_k, input_precision="ieee")
        grad_v = tl.dot((p_alive * (u - row_mu)).to(DOT), g, grad_v, input_precision="ieee")
    return grad_k, grad_v


@triton.jit(do_not_specialize=SCALARS)
def _double_columns(
    query, key, value, grad_out, grad_grad_query, grad_grad_key, grad_grad_value, lse, delta, mu, rho,
    grad_key, grad_value, lists, table, order, padding, start, seed,
    q_strides, k_strides, v_strides, g_strides, a_strides, b_strides, c_strides, grad_k_strides, grad_v_strides,
    n_batch, n_heads, group, n_q, n_k, query_start, n_layout_q, n_lines, n_tiles, whole, causal, ragged,
    list_step, order_step, threshold, keep_scale, scale, summed,
    D: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    first_query = first_position(start, query_start, n_layout_q)
    n_seen = n_seen_keys(first_query, n_q, n_k, causal)
    seed_value = load_seed(seed)
    batch, grad_head, own = own_tile(
        tl.program_id(0), 0, lists.longest_first, n_batch, n_heads // summed, n_lines, n_tiles, whole, list_step,
        BLOCK // OWN, False,
    )  # fmt: skip
    kv_head = grad_head * summed // group
    head_order = order
    if order is not None:
        head_order = order + grad_head * summed * order_step  # heads that are summed share their order

    places = own * OWN + tl.arange(0, OWN)
    positions = positions_of(head_order, places, n_layout_q)
    inside = positions < n_k  # [OWN]
    seen = positions < n_seen
    if padding is not None:
        seen &= tl.load(padding + batch * n_k + positions, mask=seen, other=1) == 0
    k_base = key + batch * k_strides[0] + kv_head * k_strides[1]
    v_base = value + batch * v_strides[0] + kv_head * v_strides[1]
    b_base = grad_grad_key + batch * b_strides[0] + kv_head * b_strides[1]
    c_base = grad_grad_value + batch * c_strides[0] + kv_head * c_strides[1]
    k = load_rows(k_base, positions, seen, k_strides, D, BLOCK_D, True).to(DOT)
    v = load_rows(v_base, positions, seen, v_strides, DV, BLOCK_DV, True).to(DOT)
    b = load_rows(b_base, positions, seen, b_strides, D, BLOCK_D, True).to(DOT)
    c = load_rows(c_base, positions, seen, c_strides, DV, BLOCK_DV, True).to(DOT)
    present = tl.max(seen.to(tl.int32), 0)
    grad_k = tl.zeros([OWN, BLOCK_D], tl.float32)
    grad_v = tl.zeros([OWN, BLOCK_DV], tl.float32)
    for member in range(summed):
        head = grad_head * summed + member
        q_base = query + batch * q_strides[0] + head * q_strides[1]
        a_base = grad_grad_query + batch * a_strides[0] + head * a_strides[1]
        g_base = grad_out + batch * g_strides[0] + head * g_strides[1]
        row = (batch * n_heads + head) * n_q
        dropout = Dropout(seed_value, threshold, keep_scale, (batch * n_heads + head).to(tl.int32))
        line = head * list_step * n_lines + own // (BLOCK // OWN)
        _begin, _none, begin, list_tiles, end = list_bounds(lists, line, 1, BLOCK, STEP)  # as in _double_rows
        grad_k, grad_v = _column_gradients(
            grad_k, grad_v, k, v, b, c, positions, own * OWN % BLOCK, q_base, a_base, g_base,
            lse + row, delta + row, mu + row, rho + row, lists, table, head_order, n_layout_q, dropout,
            begin, end, list_tiles * present, q_strides, a_strides, g_strides, n_q, first_query, scale,
            D, DV, BLOCK, OWN, STEP, BLOCK_D, BLOCK_DV, DOT,
        )  # fmt: skip
    grad_k = tl.where(seen[:, None], grad_k * scale, 0.0)  # as in _grad_key_value
    grad_v = tl.where(seen[:, None], grad_v, 0.0)
    k_out = grad_key + batch * grad_k_strides[0] + grad_head * grad_k_strides[1]
    v_out = grad_value + batch * grad_v_strides[0] + grad_head * grad_v_strides[1]
    store_rows(k_out, positions, inside, grad_k_strides, grad_k, D, BLOCK_D)
    store_rows(v_out, positions, inside, grad_v_strides, grad_v, DV, BLOCK_DV)


def double_backward(
    outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], grad_grad_query: Tensor, grad_grad_key: Tensor,
    grad_grad_value: Tensor, grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor,
    _out: Tensor, lse: Tensor, *rest: Any,
) -> None:  # fmt: skip
    """Fill ``(grad_grad_out, grad_grad_lse, grad_query, grad_key, grad_value)``. Two launches."""
    grad_grad_out, grad_grad_lse, grad_query, grad_key, grad_value = outputs
    call = Call(query, key, value, *rest)
    delta, rho = call.empty_like_rows(2)
    lse = lse.contiguous()
    given = (query, key, value, grad_out, grad_grad_query, grad_grad_key, grad_grad_value)
    strides = tuple(t.stride() for t in given)

    config, constants = call.tiles("double_rows")
    n_tiles, programs, whole = call.row_work(config["own"])
    launch(
        _double_rows, programs, call.device,
        *given, lse, grad_lse if grad_lse is None else grad_lse.contiguous(),
        grad_query, grad_grad_out, grad_grad_lse, delta, rho, *call.tensors(call.rows),
        *strides, grad_query.stride(), grad_grad_out.stride(),
        *call.scalars(call.rows, n_tiles, whole), **constants,
    )  # fmt: skip

    config, constants = call.tiles("double_columns")
    summed = call.summed()
    n_tiles, programs, whole = call.column_work(config["own"], summed)
    with call.summed_over_groups(grad_key, grad_value) as (partial_key, partial_value):
        launch(
            _double_columns, programs, call.device,
            *given, lse, delta, grad_grad_lse, rho, partial_key, partial_value, *call.tensors(call.columns),
            *strides, partial_key.stride(), partial_value.stride(),
            *call.scalars(call.columns, n_tiles, whole), summed, **constants,
        )  # fmt: skip
