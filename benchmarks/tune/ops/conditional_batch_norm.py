"""Conditional batch norm in training, at the layers of BigGAN-128's generator, planar and channels last."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import gdl_kernels

from ...cases import short
from ...ops.conditional_batch_norm import SIZES
from ..passes import Pass


def passes(device: torch.device) -> Iterator[Pass]:
    for dtype in (torch.bfloat16, torch.float32):
        for order in (0, 1, 2):
            for size in SIZES:
                for channels_last in (False, True):
                    yield normalization(order, size, dtype, device, channels_last=channels_last)


def normalization(
    order: int, size: tuple[int, int, int], dtype: torch.dtype, device: torch.device, *, channels_last: bool
) -> Pass:
    """Size: images, channels, side."""
    images, channels, side = size
    lying = torch.channels_last if channels_last else torch.contiguous_format

    def inputs() -> list[torch.Tensor]:
        x, gain, bias = (
            torch.randn(shape, device=device, dtype=dtype)
            for shape in ((images, channels, side, side), (images, channels), (images, channels))
        )
        return [x.to(memory_format=lying), gain, bias]

    return Pass(
        "conditional_batch_norm",
        order,
        f"{images}×{channels}×{side}×{side}, {short(dtype)}{', channels last' * channels_last}",
        lambda x, gain, bias, backend: gdl_kernels.conditional_batch_norm(
            x, gain, bias, None, None, training=True, backend=backend
        ),
        inputs,
    )
