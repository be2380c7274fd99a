"""The backward pass: queries are walked by their own kernel, keys and values by theirs."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .launch import Call, as_map
from .maps import half_squares, load_pixels, products, store_pixels, store_windows


@triton.jit
def _grad_query(
    query, key, value, out, grad_out, lse, delta, grad_query, q_strides, k_strides, v_strides, out_strides, g_strides,
    grad_strides, n_q, n_k, scale,
    C: tl.constexpr, CV: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, OWN: tl.constexpr,
    STEP: tl.constexpr, DOT: tl.constexpr, L2: tl.constexpr,
):  # fmt: skip
    # Besides, delta = sum_j p t of each query, with t = g.v, which the gradients of keys and values take. It is
    # sum_c out * grad_out, but for the rounding of out: that, times sum_j p k, would be most of the error in 16 bit. So
    # the walk starts from it, finds what it lacks, excess = sum_j p (t - delta), and takes that from what it summed.
    n_tiles = tl.cdiv(n_q, OWN)
    image = (tl.program_id(0) // n_tiles).to(tl.int64)
    rows = tl.program_id(0) % n_tiles * OWN + tl.arange(0, OWN)
    inside = rows < n_q  # [OWN]
    key += image * k_strides[0]
    value += image * v_strides[0]
    q = load_pixels(query + image * q_strides[0], q_strides, rows, inside, C, BLOCK_C).to(DOT)
    g = load_pixels(grad_out + image * g_strides[0], g_strides, rows, inside, CV, BLOCK_V)
    o = load_pixels(out + image * out_strides[0], out_strides, rows, inside, CV, BLOCK_V)
    row_delta = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    g = g.to(DOT)
    row_lse = tl.load(lse + image * n_q + rows, mask=inside, other=float("inf")) * 1.4426950408889634  # log2(e)
    acc = tl.zeros([OWN, BLOCK_C], tl.float32)
    mean_key = tl.zeros([OWN, BLOCK_C], tl.float32)
    excess = tl.zeros([OWN], tl.float32)
    for start in range(0, n_k, STEP):
        columns = start + tl.arange(0, STEP)
        there = columns < n_k  # [STEP]
        k = load_pixels(key, k_strides, columns, there, C, BLOCK_C).to(DOT)
        v = load_pixels(value, v_strides, columns, there, CV, BLOCK_V).to(DOT)
        scores = products(q, k)  # [OWN, STEP]
        if L2:
            scores -= half_squares(k)[None, :]
        weights = tl.exp2(scores * (scale * 1.4426950408889634) - row_lse[:, None])
        weights = tl.where(there[None, :], weights, 0.0)
        grad_scores = weights * (products(g, v) - row_delta[:, None])
        acc = tl.dot(grad_scores.to(DOT), k, acc, input_precision="ieee")
        mean_key = tl.dot(weights.to(DOT), k, mean_key, input_precision="ieee")
        excess += tl.sum(grad_scores, 1)
    acc -= excess[:, None] * mean_key
    tl.store(delta + image * n_q + rows, row_delta + excess, mask=inside)
    store_pixels(grad_query + image * grad_strides[0], grad_strides, rows, inside, acc * scale, C, BLOCK_C)


@triton.jit
def _grad_key_value(
    query, key, value, grad_out, lse, delta, grad_key, grad_value, key_winner, value_winner,
    q_strides, k_strides, v_strides, g_strides, grad_k_strides, grad_v_strides, width, n_q, n_k, scale,
    C: tl.constexpr, CV: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, OWN: tl.constexpr,
    STEP: tl.constexpr, DOT: tl.constexpr, L2: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(n_k, OWN)
    image = (tl.program_id(0) // n_tiles).to(tl.int64)
    own = tl.program_id(0) % n_tiles * OWN + tl.arange(0, OWN)
    inside = own < n_k  # [OWN]
    query += image * q_strides[0]
    grad_out += image * g_strides[0]
    k = load_pixels(key + image * k_strides[0], k_strides, own, inside, C, BLOCK_C).to(DOT)
    v = load_pixels(value + image * v_strides[0], v_strides, own, inside, CV, BLOCK_V).to(DOT)
    if L2:
        bias = half_squares(k)
    grad_k = tl.zeros([OWN, BLOCK_C], tl.float32)
    grad_v = tl.zeros([OWN, BLOCK_V], tl.float32)
    of_scores = tl.zeros([OWN], tl.float32)
    for start in range(0, n_q, STEP):
        rows = start + tl.arange(0, STEP)
        there = rows < n_q  # [STEP]
        q = load_pixels(query, q_strides, rows, there, C, BLOCK_C).to(DOT)
        g = load_pixels(grad_out, g_strides, rows, there, CV, BLOCK_V).to(DOT)
        # Weights of queries that are not there are exp2(-inf).
        row_lse = tl.load(lse + image * n_q + rows, mask=there, other=float("inf")) * 1.4426950408889634  # log2(e)
        row_delta = tl.load(delta + image * n_q + rows, mask=there, other=0.0)
        scores = products(k, q)  # [OWN, STEP], keys by queries
        if L2:
            scores -= bias[:, None]
        weights = tl.exp2(scores * (scale * 1.4426950408889634) - row_lse[None, :])
        grad_v = tl.dot(weights.to(DOT), g, grad_v, input_precision="ieee")
        grad_scores = weights * (products(v, g) - row_delta[None, :])
        grad_k = tl.dot(grad_scores.to(DOT), q, grad_k, input_precision="ieee")
        if L2:
            of_scores += tl.sum(grad_scores, 1)
    if L2:
        grad_k -= of_scores[:, None] * k.to(tl.float32)
    grad_key += image * grad_k_strides[0]
    grad_value += image * grad_v_strides[0]
    if key_winner is not None:
        key_winner += image * k_strides[0]
        value_winner += image * v_strides[0]
    store_windows(grad_key, grad_k_strides, key_winner, k_strides, own, inside, grad_k * scale, width, C, BLOCK_C)
    store_windows(grad_value, grad_v_strides, value_winner, v_strides, own, inside, grad_v, width, CV, BLOCK_V)


def backward(
    outputs: tuple[Tensor, Tensor, Tensor], grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor,
    lse: Tensor, *rest: Any,
) -> None:  # fmt: skip
    """Fill ``(grad_query, grad_key, grad_value)``. Two launches, four where keys and values are pooled."""
    call = Call(query, value, *rest)
    keys, values = call.walked(key), call.walked(value)
    q, k, v, o, g = as_map(query), keys.pooled, values.pooled, as_map(out), as_map(grad_out)
    grad_q, grad_k, grad_v = map(as_map, outputs)
    lse = lse.contiguous()
    (delta,) = call.rows(1)
    call.launch(
        "grad_query", _grad_query, q.tensor, k.tensor, v.tensor, o.tensor, g.tensor, lse, delta, grad_q.tensor,
        q.strides, k.strides, v.strides, o.strides, g.strides, grad_q.strides,
    )  # fmt: skip
    call.launch(
        "grad_key_value", _grad_key_value, q.tensor, k.tensor, v.tensor, g.tensor, lse, delta,
        grad_k.tensor, grad_v.tensor, keys.winner, values.winner,
        q.strides, k.strides, v.strides, g.strides, grad_k.strides, grad_v.strides, call.width,
    )  # fmt: skip
