"""Minibatch standard deviation, where ProGAN has it and on larger images."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import gdl_kernels

from ...cases import short
from ...ops.minibatch_stddev import SIZES
from ..passes import Pass


def passes(device: torch.device) -> Iterator[Pass]:
    for dtype in (torch.bfloat16, torch.float32):
        for size in SIZES:
            for channels_last in (False, True):
                for order in (0, 1):
                    yield deviation(order, size, dtype, device, channels_last=channels_last)


def deviation(
    order: int, size: tuple[int, int, int], dtype: torch.dtype, device: torch.device, *, channels_last: bool
) -> Pass:
    """Size: images, channels, side."""
    images, channels, side = size
    lying = torch.channels_last if channels_last else torch.contiguous_format
    shape = images, channels, side, side
    return Pass(
        "minibatch_stddev",
        order,
        f"{images}×{channels}×{side}×{side}, {short(dtype)}{', channels last' * channels_last}",
        lambda x, backend: gdl_kernels.minibatch_stddev(x, backend=backend),
        lambda: [torch.randn(shape, device=device, dtype=dtype).to(memory_format=lying)],
    )
