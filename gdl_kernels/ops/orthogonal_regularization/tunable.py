"""What a measured table may set of the Triton kernels of orthogonal_regularization.

Not the side of the tiles of G, which the forward pass keeps for the gradient in the very form that both know.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..._tuned import Config, Tunable

#: ``aligned``: whether rows are 16 bytes apart.
_KEYS = ("aligned", "itemsize")


def _few_warps(key: Mapping[str, int], config: Config) -> str:
    # The accumulators of 16-bit tiles, which have four times as many numbers, would fill the registers of four.
    return "num_warps must be 8 for 16-bit weights, got 4" if config["num_warps"] * key["itemsize"] < 16 else ""


KERNELS = {
    # ``step``: columns that are multiplied at a time. Four warps have no registers for float32's sums of sums.
    "gram": Tunable(_KEYS, {"step": (16, 32, 64), "num_stages": (2, 3, 4), "num_warps": (8,)}),
    # ``summed``: rows or columns of a program; ``values``: of a thread at a time.
    "norms": Tunable(_KEYS, {"summed": (32, 64, 128), "values": (4, 8, 16), "num_warps": (4, 8)}),
    # ``columns``: of the gradient that a program owns; ``step``: rows that are multiplied at a time.
    "gradient": Tunable(
        _KEYS,
        {"columns": (32, 64, 128), "step": (16, 32, 64), "num_stages": (2, 3, 4), "num_warps": (4, 8)},
        _few_warps,
    ),
}
