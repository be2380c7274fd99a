"""Sparsity layouts: which keys each query may see, stored per block.

A layout is exact at the level of single positions and is built in time and memory O(kept blocks)::

    layout = layouts.local(65_536, 1024) | layouts.fixed(65_536, 128, 32)
    layout.density      # the share of all (query, key) pairs that it keeps
    layout.plot()       # a picture
"""

from ._algebra import per_head
from ._layout import BlockLists, Layout
from ._named import check_entry, named, register_pattern
from ._patterns import causal, fixed, from_blocks, from_mask, full, local, sliding_with_sinks, strided

__all__ = [
    "BlockLists",
    "Layout",
    "causal",
    "check_entry",
    "fixed",
    "from_blocks",
    "from_mask",
    "full",
    "local",
    "named",
    "per_head",
    "register_pattern",
    "sliding_with_sinks",
    "strided",
]
