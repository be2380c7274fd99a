"""Draws ``layouts.png``: ``python docs/layouts_picture.py`` in a checkout."""

from __future__ import annotations

from pathlib import Path

from gdl_kernels import layouts

N, SIZE = 512, 16
layouts.per_head(
    [
        layouts.local(N, 96, block_size=SIZE),
        layouts.strided(N, 8, block_size=SIZE),
        layouts.fixed(N, 64, 16, block_size=SIZE),
        layouts.sliding_with_sinks(N, 96, 20, block_size=SIZE),
    ]
).plot(Path(__file__).with_name("layouts.png"))
