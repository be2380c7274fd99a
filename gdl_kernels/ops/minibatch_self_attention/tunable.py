"""What a measured table may set of the Triton kernels of minibatch_self_attention."""

from __future__ import annotations

from ..._tuned import Tunable
from ..sparse_attention.tunable import ATTENTIONS, TILES

KERNELS = {
    # ``channels``: the larger of the padded channel counts.
    **{kernel: Tunable(("channels", "itemsize"), TILES) for kernel in ATTENTIONS},
    # ``values``: that a thread writes; ``channels``: of a tile.
    "pool": Tunable(
        ("channels_last", "itemsize"),
        {"values": (4, 8, 16), "channels": (4, 8, 16, 32, 64), "num_warps": (2, 4, 8)},
    ),
}
