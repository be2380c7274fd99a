"""What a measured table may set of the Triton kernels of minibatch_stddev."""

from __future__ import annotations

from ..._tuned import Tunable

#: ``group``: members of a group, padded. ``run``: numbers of a feature that lie next to each other, as a power of two,
#: up to 4096. ``pixels`` likewise.
_KEYS = ("group", "run", "itemsize")
_PLANE_KEYS = ("pixels", "channels_last", "itemsize")

#: ``values``: that a thread holds at a time. ``programs``: for each multiprocessor, before features are split no
#: further.
_FEATURE = {"values": (4, 8, 16), "programs": (4, 8, 16), "num_warps": (2, 4, 8)}
_PLANE = {"values": (4, 8, 16), "num_warps": (2, 4, 8)}

KERNELS = {
    "copy_and_sum": Tunable(_KEYS, _FEATURE),
    "grad_input": Tunable(_KEYS, _FEATURE),
    "fill": Tunable(_PLANE_KEYS, _PLANE),
    "sum_of_statistic": Tunable(_PLANE_KEYS, _PLANE),
}
