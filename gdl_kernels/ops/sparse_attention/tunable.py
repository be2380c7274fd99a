"""What a measured table may set of the Triton kernels of sparse_attention."""

from __future__ import annotations

from ..._tuned import Tunable, at_most

#: ``head_dim``: the larger of the padded head sizes. ``dropout``: whether random numbers are drawn.
_KEYS = ("head_dim", "block_size", "itemsize", "dropout")

#: Of an attention's kernels: positions that a program owns (queries, or keys in the kernels of their gradients), and
#: positions that it takes at a time from those it walks. Of these many don't fit any GPU: tuning finds out which.
TILES = {"own": (16, 32, 64, 128), "step": (16, 32, 64, 128), "num_stages": tuple(range(1, 8)), "num_warps": (2, 4, 8)}

ATTENTIONS = ("forward", "grad_query", "grad_key_value", "double_rows", "double_columns")

KERNELS = {
    **{
        kernel: Tunable(_KEYS, TILES, lambda key, config: at_most("own", key["block_size"], config))
        for kernel in ATTENTIONS
    },
    # ``programs``: for each multiprocessor, before rows are split no further. A key or value has 128 bytes at a time.
    "decode": Tunable(
        _KEYS,
        {"step": (16, 32, 64), "programs": (2, 4, 8, 16), "num_stages": (1, 2, 3, 4), "num_warps": (4, 8)},
        lambda key, config: at_most("step", 128 // key["itemsize"], config),
    ),
    "merge": Tunable(("head_dim",), {"num_warps": (2, 4, 8)}),
    "row_terms": Tunable(("head_dim", "itemsize"), {"own": (16, 32, 64), "num_warps": (4, 8)}),
}
