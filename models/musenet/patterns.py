"""The Sparse Transformer's "fixed" pattern (arXiv 1904.10509, section 4.3), whole and in its two parts.

With stride l and summary c, query i sees, of the keys j up to its own:

- A1, its block: the j with ``j // l == i // l``;
- A2, the summaries: the j in c columns of every block. The heads take the c columns in turn, from the block's end back.
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
    """The layout of each layer. Layers with the same pattern share one.

    Where a part stands alone, the queries before the first summary see nothing in A2: such a layer adds nothing there.
    """
    position = torch.arange(context)
    query, key = position[:, None], position
    causal = key <= query
    if attention == "dense":
        return [layouts.from_mask(causal)] * layers
    size = min(stride, 64)
    block = causal & (key // stride == query // stride)
    turn = torch.arange(heads)[:, None, None] % (stride // summary)
    summaries = causal & ((stride - 1 - key % stride) // summary == turn)  # (heads, n, n)
    if attention == "merged":
        return [layouts.from_mask(block | summaries, block_size=size)] * layers
    if attention == "per_head":
        odd = torch.arange(heads)[:, None, None] % 2 == 1
        return [layouts.from_mask(torch.where(odd, summaries, block), block_size=size)] * layers
    parts = [layouts.from_mask(block, block_size=size), layouts.from_mask(summaries, block_size=size)]
    return [parts[layer % 2] for layer in range(layers)]
