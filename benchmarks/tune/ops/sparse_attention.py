"""Block-sparse attention, at the benchmarks' layouts and sizes, and one token over a cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

import gdl_kernels
from gdl_kernels.layouts import Layout

from ...cases import short
from ...ops.sparse_attention import GPU_SIZE, WINDOW
from ...ops.sparse_attention.decode import CACHED
from ...ops.sparse_attention.patterns import local, local_and_every_fourth_block
from ..passes import Pass

#: Batch, heads, queries, features.
Shape = tuple[int, int, int, int]

#: A quarter of the benchmarks' pairs: plain PyTorch, in float64 too, has to hold them all.
SIZE = replace(GPU_SIZE, positions=GPU_SIZE.positions // 2)


def passes(device: torch.device) -> Iterator[Pass]:
    sizes = 64, 128
    layouts = [local_and_every_fourth_block(WINDOW, size).layout(SIZE.positions, size).to(device) for size in sizes]
    cached = [local(2 * WINDOW).layout(CACHED, size).to(device) for size in sizes]
    for dtype in (torch.bfloat16, torch.float32):
        for orders in ((0, 1), (2,)):
            for head_dim in (64, 128):
                shape = SIZE.batch, SIZE.heads, SIZE.positions, head_dim
                for layout in layouts:
                    for order in orders:
                        yield attention(order, shape, layout, dtype, device)
                if 0 in orders:
                    for layout in cached:
                        yield attention(0, (SIZE.batch, SIZE.heads, 1, head_dim), layout, dtype, device)


def attention(order: int, shape: Shape, layout: Layout, dtype: torch.dtype, device: torch.device) -> Pass:
    """The layout's last queries, which are all or one."""
    batch, heads, n_q, features = shape
    n_k = layout.n_k
    return Pass(
        "sparse_attention",
        order,
        f"B{batch} H{heads} n{n_q} of {n_k}, d{features}, {layout.density:.0%} kept, blocks of {layout.block_size}, "
        f"{short(dtype)}",
        lambda q, k, v, backend: gdl_kernels.sparse_attention(q, k, v, layout, query_start=n_k - n_q, backend=backend),
        lambda: [torch.randn(batch, heads, n, features, device=device, dtype=dtype) for n in (n_q, n_k, n_k)],
    )
