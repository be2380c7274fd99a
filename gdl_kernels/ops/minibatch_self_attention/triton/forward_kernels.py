"""The output, and the logarithm of each query's softmax denominator."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .launch import Call, as_map
from .maps import half_squares, load_pixels, products, store_pixels


@triton.jit
def _forward(
    query, key, value, out, lse, q_strides, k_strides, v_strides, out_strides, n_q, n_k, scale,
    C: tl.constexpr, CV: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, OWN: tl.constexpr,
    STEP: tl.constexpr, DOT: tl.constexpr, L2: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(n_q, OWN)
    image = (tl.program_id(0) // n_tiles).to(tl.int64)
    rows = tl.program_id(0) % n_tiles * OWN + tl.arange(0, OWN)
    inside = rows < n_q  # [OWN]
    key += image * k_strides[0]
    value += image * v_strides[0]
    q = load_pixels(query + image * q_strides[0], q_strides, rows, inside, C, BLOCK_C).to(DOT)
    acc = tl.zeros([OWN, BLOCK_V], tl.float32)
    total = tl.zeros([OWN], tl.float32)
    peak = tl.full([OWN], float("-inf"), tl.float32)
    for start in range(0, n_k, STEP):
        columns = start + tl.arange(0, STEP)
        there = columns < n_k  # [STEP]
        k = load_pixels(key, k_strides, columns, there, C, BLOCK_C).to(DOT)
        scores = products(q, k)  # [OWN, STEP]
        if L2:
            scores -= half_squares(k)[None, :]
        scores = tl.where(there[None, :], scores * (scale * 1.4426950408889634), float("-inf"))  # log2(e)
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        # Where no key so far has a score above -inf: differences of infinities would be NaN.
        finite_peak = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores - finite_peak[:, None])
        decay = tl.exp2(peak - finite_peak)
        total = total * decay + tl.sum(weights, 1)
        v = load_pixels(value, v_strides, columns, there, CV, BLOCK_V).to(DOT)
        acc = tl.dot(weights.to(DOT), v, acc * decay[:, None], input_precision="ieee")
        peak = new_peak
    acc /= total[:, None]
    store_pixels(out + image * out_strides[0], out_strides, rows, inside, acc, CV, BLOCK_V)
    natural = (peak + tl.log2(total)) * 0.6931471805599453  # log(2)
    tl.store(lse + image * n_q + rows, natural, mask=inside)


def forward(outputs: tuple[Tensor, Tensor], query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> None:
    """Fill ``(out, lse)``. One launch, three where keys and values are pooled."""
    out, lse = outputs
    call = Call(query, value, *rest)
    q, k, v, o = as_map(query), call.walked(key).pooled, call.walked(value).pooled, as_map(out)
    call.launch(
        "forward", _forward, q.tensor, k.tensor, v.tensor, out, lse, q.strides, k.strides, v.strides, o.strides
    )  # fmt: skip
