"""Dropout inside a kernel: the numbers of ``reference.dropout_multiplier``, drawn where a pair is."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...._philox import ROUNDS


class Dropout(NamedTuple):
    """Of one head of one sample.

    Attributes:
        seed: int64, or None where nothing is dropped; then no kernel has code for it.
        threshold: a pair is dropped where the upper 31 bits of its word are below.
        scale: what the kept weights are multiplied by.
        line: ``batch * heads + head``.
    """

    seed: Any
    threshold: Any
    scale: Any
    line: Any


_ROUNDS = tl.constexpr(ROUNDS)


@triton.jit
def load_seed(seed):
    value = seed
    if seed is not None:
        value = tl.load(seed)
    return value


@triton.jit
def survives(dropout, queries, keys, ALIGNED: tl.constexpr):
    # Whether dropout keeps the pairs of some query and some key positions: [queries, keys]. ALIGNED: every fourth query
    # is at a multiple of 4 and the three after it follow. A counter's four words then serve four queries.
    if ALIGNED:
        QUARTER: tl.constexpr = queries.shape[0] // 4
        fours = tl.min(tl.reshape(queries, [QUARTER, 4]), 1) // 4
        w0, w1, w2, w3 = tl.philox(dropout.seed, keys[None, :], fours[:, None], dropout.line, 0, _ROUNDS)
        words = tl.permute(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (0, 2, 3, 1))  # [QUARTER, 2, 2, keys]
        word = tl.reshape(words, [queries.shape[0], keys.shape[0]])
    else:
        fours, which = (queries // 4)[:, None], (queries % 4)[:, None]
        w0, w1, w2, w3 = tl.philox(dropout.seed, keys[None, :], fours, dropout.line, 0, _ROUNDS)
        word = tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))
    return (word >> 1).to(tl.int32) >= dropout.threshold
