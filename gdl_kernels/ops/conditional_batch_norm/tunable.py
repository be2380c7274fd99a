"""What a measured table may set of the Triton kernels of conditional_batch_norm."""

from __future__ import annotations

from ..._tuned import Tunable

#: ``pixels``: of an image, as a power of two, up to 4096.
_KEYS = ("pixels", "channels_last", "itemsize")

#: ``channels``: of a tile at most, where they are last. ``programs``: for each multiprocessor, before images are split
#: no further.
_TILE = {"channels": (32, 64, 128), "num_warps": (2, 4, 8)}
_SPLIT = {"programs": (4, 8, 16), **_TILE}

KERNELS = {
    # ``values``: of each tensor that a thread holds at a time.
    "moments": Tunable(_KEYS, {"values": (8, 16), **_SPLIT}),
    "sums": Tunable(_KEYS, {"values": (4, 8, 16), **_SPLIT}),
    "double_sums": Tunable(_KEYS, {"values": (4, 8), **_SPLIT}),
    # ``terms``: tensors that are read.
    "combine": Tunable((*_KEYS, "terms"), {"values": (4, 8, 16), **_TILE}),
    # Of moments and of sums. ``parts``: how many, as a power of two up to 512; in a configuration, how many at a time.
    "merge": Tunable(("parts",), {"parts": (32, 64, 128), "channels": (8, 16), "num_warps": (4, 8)}),
}
