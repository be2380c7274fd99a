"""The attention of BigGAN's generator and SAGAN's discriminator, planar and channels last."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import gdl_kernels

from ...cases import short
from ...ops.minibatch_self_attention import SIZES
from ..passes import Pass

#: Batch, channels of query and of value, side of the map.
Size = tuple[int, int, int, int]


def passes(device: torch.device) -> Iterator[Pass]:
    for dtype in (torch.bfloat16, torch.float32):
        for orders in ((0, 1), (2,)):
            for name in ("BigGAN-128 G", "SAGAN D"):
                for order in orders:
                    yield attention(order, SIZES[name], dtype, device)
        # Pooling alone goes by how images lie.
        yield attention(0, SIZES["BigGAN-128 G"], dtype, device, channels_last=True)


def attention(order: int, size: Size, dtype: torch.dtype, device: torch.device, *, channels_last: bool = False) -> Pass:
    batch, channels, value_channels, side = size
    shapes = [(batch, c, side, side) for c in (channels, channels, value_channels)]
    lying = torch.channels_last if channels_last else torch.contiguous_format
    return Pass(
        "minibatch_self_attention",
        order,
        f"{batch} maps of {side}×{side}, {channels} and {value_channels} channels, pooled, {short(dtype)}"
        f"{', channels last' * channels_last}",
        lambda q, k, v, backend: gdl_kernels.minibatch_self_attention(q, k, v, pool=2, backend=backend),
        lambda: [torch.randn(shape, device=device, dtype=dtype).to(memory_format=lying) for shape in shapes],
    )
