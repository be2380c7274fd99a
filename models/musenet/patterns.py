"""The Sparse Transformer's "fixed" pattern (arXiv 1904.10509, section 4.2) among layers and heads.

Its two parts are, with stride l and summary c: the query's own run of l positions, and c columns of every run, which
the heads take in turn. Where the second stands alone, queries before the first summary see nothing, and get 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch

from gdl_kernels import layouts
from gdl_kernels.layouts import Layout

#: How the two parts are shared out: layers take them in turn; every head has both; heads take them in turn; or neither,
#: and every query sees every earlier key.
Attention = Literal["interleaved", "merged", "per_head", "dense"]
ATTENTION: tuple[Attention, ...] = get_args(Attention)


def layer_layouts(
    attention: Attention, *, layers: int, heads: int, context: int, stride: int, summary: int
) -> Sequence[Layout]:
    """The layout of each layer; layers with the same pattern share one.

    ``stride`` is a multiple of 16 and of ``summary``, and divides ``context``.
    """
    if attention == "dense":
        return [layouts.causal(context)] * layers
    # Blocks that end where runs end, and hold no other columns beside the summaries: on one thread of a busy Xeon at
    # l = 128 and c = 32, blocks of 64 take 1.7 times as long in training, and 2.7 times in decoding.
    size = next((size for size in (64, 32, 16) if stride % size == 0 and summary % size == 0), 16)
    if attention == "merged":
        return [layouts.fixed(context, stride, summary, heads=heads, block_size=size)] * layers
    run = layouts.fixed(context, stride, summary, part="local", block_size=size)
    columns = layouts.fixed(context, stride, summary, heads=heads, part="summary", block_size=size)
    if attention == "interleaved":
        return [(run, columns)[layer % 2] for layer in range(layers)]
    blocks = torch.ones(context // size, context // size, dtype=torch.bool)
    odd = (torch.arange(heads) % 2 == 1)[:, None, None]
    even_heads, odd_heads = (layouts.from_blocks(blocks & of, block_size=size, causal=True) for of in (~odd, odd))
    return [(run & even_heads) | (columns & odd_heads)] * layers
