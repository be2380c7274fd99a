"""Sparsity layouts: which keys each query may see, stored per block.

A layout is exact at the level of single positions and is built in time and memory O(kept blocks)::

    layout = layouts.local(65_536, 1024) | layouts.fixed(65_536, 128, 32)
    layout.density      # the share of all (query, key) pairs that it keeps
    layout.plot()       # a picture
"""

from ._layout import BlockLists, Layout
from ._patterns import from_mask

__all__ = ["BlockLists", "Layout", "from_mask"]
