"""What a measured table may set of the Triton kernels of spectral_normalize."""

from __future__ import annotations

from ..._tuned import Tunable

_KEYS = ("itemsize",)

#: ``piece``: elements that a program takes in all; ``values``: that a thread takes at a time.
_PIECE = {"values": (4, 8, 16), "piece": (8192, 16384, 32768), "num_warps": (4, 8)}

KERNELS = {
    # ``rows``: that are multiplied at a time; ``values``: of them in a thread.
    "wide_products": Tunable(_KEYS, {"rows": (2, 4, 8), "values": (8, 16, 32), "num_warps": (4, 8)}),
    "narrow_products": Tunable(_KEYS, {"rows": (16, 32, 64), "values": (8, 16), "num_warps": (4, 8)}),
    # ``strip``: columns whose sums a program adds up; ``values``: of a thread at a time.
    "merge": Tunable(_KEYS, {"strip": (64, 128, 256), "values": (8, 16), "num_warps": (4, 8)}),
    "finish": Tunable(_KEYS, {"values": (4, 8), "num_warps": (4, 8, 16, 32)}),
    "divide": Tunable(_KEYS, _PIECE),
    # Of both kernels, which share pieces.
    "gradients": Tunable(_KEYS, _PIECE),
}
