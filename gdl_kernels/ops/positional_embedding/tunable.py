"""What a measured table may set of the Triton kernels of positional_embedding."""

from __future__ import annotations

from ..._tuned import Tunable

#: ``columns``: of the table, as a power of two.
_KEYS = ("columns", "itemsize")

#: ``values``: of a tile that a thread holds; ``columns``: of a tile, at most.
_TILE = {"values": (8, 16), "columns": (128, 256, 512), "num_warps": (2, 4, 8)}

KERNELS = {
    # ``programs``: for each multiprocessor, before the batch is split no further.
    "forward": Tunable(_KEYS, {**_TILE, "programs": (4, 8, 16)}),
    # Of both kernels, which share chunks. ``chunk``: places of one.
    "backward": Tunable(_KEYS, {**_TILE, "chunk": (32, 64, 128)}),
}
