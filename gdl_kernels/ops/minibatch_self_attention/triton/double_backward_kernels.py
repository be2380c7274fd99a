"""The derivative of the backward pass: keys are walked twice for the queries, then queries once for the keys.

``a``, ``b`` and ``c`` are what is given for the gradients of queries, keys and values; ``g`` is the gradient of the
output. Of each pair, with scores ``s = scale q.k`` or, for the score ``"l2"``, ``s = scale (q.k - k.k / 2)``::

    p = exp(s - lse)    t = g.v    u = scale (a.k + q.b [- k.b])    w = g.c
    r = t (u - mu) - delta u + w    e = p (r - rho)    ds = p (t - delta)

and of each query ``delta = sum p t``, ``mu = sum p u``, ``rho = sum p r``. Then::

    grad_q = scale sum (e k + ds b)      grad_k = scale sum (e (q [- k]) + ds (a [- b]))      grad_v = sum p (u - mu) g
    grad_grad_out = sum p ((u - mu) v + c)

The terms in brackets are those of ``"l2"``.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .launch import Call, as_map
from .maps import half_squares, load_pixels, products, store_pixels, store_windows


@triton.jit
def _pairs(
    q, a, g, row_lse, key, value, b_map, c_map, start, n_k, k_strides, v_strides, b_strides, c_strides, scale,
    C: tl.constexpr, CV: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, STEP: tl.constexpr,
    DOT: tl.constexpr, L2: tl.constexpr,
):  # fmt: skip
    # A tile of keys, and of its pairs p, t, u, w.
    columns = start + tl.arange(0, STEP)
    there = columns < n_k  # [STEP]
    k = load_pixels(key, k_strides, columns, there, C, BLOCK_C).to(DOT)
    b = load_pixels(b_map, b_strides, columns, there, C, BLOCK_C).to(DOT)
    v = load_pixels(value, v_strides, columns, there, CV, BLOCK_V).to(DOT)
    c = load_pixels(c_map, c_strides, columns, there, CV, BLOCK_V).to(DOT)
    scores = products(q, k)  # [OWN, STEP]
    u = products(a, k) + products(q, b)
    if L2:
        scores -= half_squares(k)[None, :]
        u -= tl.sum(k.to(tl.float32) * b.to(tl.float32), 1)[None, :]
    p = tl.exp2(scores * (scale * 1.4426950408889634) - row_lse[:, None])  # log2(e)
    p = tl.where(there[None, :], p, 0.0)
    return k, b, v, c, p, products(g, v), u * scale, products(g, c)


@triton.jit
def _double_rows(
    query, key, value, grad_out, a_map, b_map, c_map, lse, delta, mu, rho, grad_query, grad_grad_out,
    q_strides, k_strides, v_strides, g_strides, a_strides, b_strides, c_strides, grad_q_strides, grad_g_strides,
    n_q, n_k, scale,
    C: tl.constexpr, CV: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, OWN: tl.constexpr,
    STEP: tl.constexpr, DOT: tl.constexpr, L2: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(n_q, OWN)
    image = (tl.program_id(0) // n_tiles).to(tl.int64)
    rows = tl.program_id(0) % n_tiles * OWN + tl.arange(0, OWN)
    inside = rows < n_q  # [OWN]
    key += image * k_strides[0]
    value += image * v_strides[0]
    b_map += image * b_strides[0]
    c_map += image * c_strides[0]
    q = load_pixels(query + image * q_strides[0], q_strides, rows, inside, C, BLOCK_C).to(DOT)
    a = load_pixels(a_map + image * a_strides[0], a_strides, rows, inside, C, BLOCK_C).to(DOT)
    g = load_pixels(grad_out + image * g_strides[0], g_strides, rows, inside, CV, BLOCK_V).to(DOT)
    row_lse = tl.load(lse + image * n_q + rows, mask=inside, other=float("inf")) * 1.4426950408889634  # log2(e)

    row_delta = tl.zeros([OWN], tl.float32)
    row_mu, ptu, pw = row_delta, row_delta, row_delta
    for start in range(0, n_k, STEP):
        _k, _b, _v, _c, p, t, u, w = _pairs(
            q, a, g, row_lse, key, value, b_map, c_map, start, n_k, k_strides, v_strides, b_strides, c_strides, scale,
            C, CV, BLOCK_C, BLOCK_V, STEP, DOT, L2,
        )  # fmt: skip
        row_delta += tl.sum(p * t, 1)
        row_mu += tl.sum(p * u, 1)
        ptu += tl.sum(p * t * u, 1)
        pw += tl.sum(p * w, 1)
    row_rho = ptu - 2 * row_mu * row_delta + pw
    tl.store(delta + image * n_q + rows, row_delta, mask=inside)
    tl.store(mu + image * n_q + rows, row_mu, mask=inside)
    tl.store(rho + image * n_q + rows, row_rho, mask=inside)

    grad_q = tl.zeros([OWN, BLOCK_C], tl.float32)
    grad_g = tl.zeros([OWN, BLOCK_V], tl.float32)
    for start in range(0, n_k, STEP):
        k, b, v, c, p, t, u, w = _pairs(
            q, a, g, row_lse, key, value, b_map, c_map, start, n_k, k_strides, v_strides, b_strides, c_strides, scale,
            C, CV, BLOCK_C, BLOCK_V, STEP, DOT, L2,
        )  # fmt: skip
        e = p * (t * (u - row_mu[:, None]) - row_delta[:, None] * u + w - row_rho[:, None])
        ds = p * (t - row_delta[:, None])
        grad_q = tl.dot(e.to(DOT), k, grad_q, input_precision="ieee")
        grad_q = tl.dot(ds.to(DOT), b, grad_q, input_precision="ieee")
        grad_g = tl.dot((p * (u - row_mu[:, None])).to(DOT), v, grad_g, input_precision="ieee")
        grad_g = tl.dot(p.to(DOT), c, grad_g, input_precision="ieee")
    store_pixels(grad_query + image * grad_q_strides[0], grad_q_strides, rows, inside, grad_q * scale, C, BLOCK_C)
    store_pixels(grad_grad_out + image * grad_g_strides[0], grad_g_strides, rows, inside, grad_g, CV, BLOCK_V)


@triton.jit
def _double_columns(
    query, key, value, grad_out, a_map, b_map, c_map, lse, delta, mu, rho, grad_key, grad_value,
    key_winner, value_winner, q_strides, k_strides, v_strides, g_strides, a_strides, b_strides, c_strides,
    grad_k_strides, grad_v_strides, width, n_q, n_k, scale,
    C: tl.constexpr, CV: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, OWN: tl.constexpr,
    STEP: tl.constexpr, DOT: tl.constexpr, L2: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(n_k, OWN)
    image = (tl.program_id(0) // n_tiles).to(tl.int64)
    own = tl.program_id(0) % n_tiles * OWN + tl.arange(0, OWN)
    inside = own < n_k  # [OWN]
    query += image * q_strides[0]
    a_map += image * a_strides[0]
    grad_out += image * g_strides[0]
    k = load_pixels(key + image * k_strides[0], k_strides, own, inside, C, BLOCK_C).to(DOT)
    b = load_pixels(b_map + image * b_strides[0], b_strides, own, inside, C, BLOCK_C).to(DOT)
    v = load_pixels(value + image * v_strides[0], v_strides, own, inside, CV, BLOCK_V).to(DOT)
    c = load_pixels(c_map + image * c_strides[0], c_strides, own, inside, CV, BLOCK_V).to(DOT)
    if L2:
        bias = half_squares(k)
        kb = tl.sum(k.to(tl.float32) * b.to(tl.float32), 1)
    grad_k = tl.zeros([OWN, BLOCK_C], tl.float32)
    grad_v = tl.zeros([OWN, BLOCK_V], tl.float32)
    sum_e = tl.zeros([OWN], tl.float32)
    sum_ds = tl.zeros([OWN], tl.float32)
    for start in range(0, n_q, STEP):
        rows = start + tl.arange(0, STEP)
        there = rows < n_q  # [STEP]
        row = image * n_q + rows
        q = load_pixels(query, q_strides, rows, there, C, BLOCK_C).to(DOT)
        a = load_pixels(a_map, a_strides, rows, there, C, BLOCK_C).to(DOT)
        g = load_pixels(grad_out, g_strides, rows, there, CV, BLOCK_V).to(DOT)
        row_lse = tl.load(lse + row, mask=there, other=float("inf")) * 1.4426950408889634  # log2(e)
        row_delta = tl.load(delta + row, mask=there, other=0.0)[None, :]
        row_mu = tl.load(mu + row, mask=there, other=0.0)[None, :]
        row_rho = tl.load(rho + row, mask=there, other=0.0)[None, :]
        scores = products(k, q)  # [OWN, STEP], keys by queries
        u = products(k, a) + products(b, q)
        if L2:
            scores -= bias[:, None]
            u -= kb[:, None]
        p = tl.exp2(scores * (scale * 1.4426950408889634) - row_lse[None, :])
        u *= scale
        t = products(v, g)
        e = p * (t * (u - row_mu) - row_delta * u + products(c, g) - row_rho)
        ds = p * (t - row_delta)
        grad_k = tl.dot(e.to(DOT), q, grad_k, input_precision="ieee")
        grad_k = tl.dot(ds.to(DOT), a, grad_k, input_precision="ieee")
        grad_v = tl.dot((p * (u - row_mu)).to(DOT), g, grad_v, input_precision="ieee")
        if L2:
            sum_e += tl.sum(e, 1)
            sum_ds += tl.sum(ds, 1)
    if L2:
        grad_k -= sum_e[:, None] * k.to(tl.float32) + sum_ds[:, None] * b.to(tl.float32)
    grad_key += image * grad_k_strides[0]
    grad_value += image * grad_v_strides[0]
    if key_winner is not None:
        key_winner += image * k_strides[0]
        value_winner += image * v_strides[0]
    store_windows(grad_key, grad_k_strides, key_winner, k_strides, own, inside, grad_k * scale, width, C, BLOCK_C)
    store_windows(grad_value, grad_v_strides, value_winner, v_strides, own, inside, grad_v, width, CV, BLOCK_V)


def double_backward(
    outputs: tuple[Tensor, Tensor, Tensor, Tensor], grad_grad_query: Tensor, grad_grad_key: Tensor,
    grad_grad_value: Tensor, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, _out: Tensor, lse: Tensor,
    *rest: Any,
) -> None:  # fmt: skip
    """Fill ``(grad_grad_out, grad_query, grad_key, grad_value)``. Two launches, four where it pools."""
    call = Call(query, value, *rest)
    keys, values = call.walked(key, grad_grad_key), call.walked(value, grad_grad_value)
    grad_g, grad_q, grad_k, grad_v = map(as_map, outputs)
    given = (
        as_map(query), keys.pooled, values.pooled, as_map(grad_out), as_map(grad_grad_query), keys.picked,
        values.picked,
    )  # fmt: skip
    tensors, strides = [m.tensor for m in given], [m.strides for m in given]
    terms = lse.contiguous(), *call.rows(3)
    call.launch(
        "double_rows", _double_rows, *tensors, *terms, grad_q.tensor, grad_g.tensor,
        *strides, grad_q.strides, grad_g.strides,
    )  # fmt: skip
    call.launch(
        "double_columns", _double_columns, *tensors, *terms, grad_k.tensor, grad_v.tensor, keys.winner, values.winner,
        *strides, grad_k.strides, grad_v.strides, call.width,
    )  # fmt: skip
