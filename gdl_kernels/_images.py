"""Image tensors as the kernels read them: (N, C, pixels), in lines of numbers next to each other in memory.

A line is the pixels of a channel, or with channels last the channels of a pixel. Every slice and view with such lines
is read where it is.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _native


class Lines(NamedTuple):
    """A tensor's strides from image to image and from line to line, in elements."""

    tensor: Tensor
    image: int
    line: int


def channels_last(x: Tensor) -> bool:
    """Whether a pixel's channels are next to each other. Not so for one channel: then the pixels are."""
    return x.stride()[1] == 1 and x.shape[1] > 1


def empty_like(x: Tensor, channels: int | None = None) -> Tensor:
    """Memory for an output like ``x``, or with other channels: dense, channels last where ``x`` has them last."""
    if channels is None and x.is_contiguous():
        return torch.empty_like(x)
    sizes = list(x.shape)
    if channels is not None:
        sizes[1] = channels
    if not channels_last(x):
        return x.new_empty(sizes)
    strides, step = [1] * len(sizes), sizes[1]
    for d in [*range(len(sizes) - 1, 1, -1), 0]:
        strides[d], step = step, step * sizes[d]
    return x.new_empty_strided(sizes, strides)  # no view, which autograd would not let anybody change in place


def shape(x: Tensor) -> tuple[int, int, int]:
    """(N, C, pixels)."""
    images, channels, *pixels = x.shape
    return images, channels, math.prod(pixels)


def cpu_reasons(x: Tensor, *_: Any, **__: Any) -> list[str]:
    """Why the C++ kernels of an op on images can't serve a call; empty if they can."""
    return _native.missing("cpu") + ([] if x.is_cpu else [f"x is on {x.device}"])


def cuda_reasons(x: Tensor, *_: Any, **__: Any) -> list[str]:
    """Why the CUDA kernels can't."""
    reasons = _native.missing("cuda")
    if x.device.type != "cuda":
        reasons.append(f"x is on {x.device}")
    if x.dtype == torch.float64:
        reasons.append("x is float64")
    return reasons


def triton_reasons(x: Tensor, *_: Any, **__: Any) -> list[str]:
    """Why the Triton kernels can't."""
    reasons = _native.missing("triton")
    if x.device.type != "cuda" and not (_native.interpreting() and x.device.type == "cpu"):
        reasons.append(f"x is on {x.device}")
    if x.dtype == torch.float64:
        reasons.append("x is float64")
    return reasons


def lines(x: Tensor, last: bool) -> Lines:
    """The tensor itself where it has the lines that are asked for, else a copy that has."""
    strides = line_strides(x.shape, x.stride(), last)
    if strides is not None:
        return Lines(x, *strides)
    _, channels, pixels = shape(x)
    if last:
        return Lines(x.movedim(1, -1).contiguous().movedim(-1, 1), pixels * channels, channels)
    return Lines(x.contiguous(), channels * pixels, pixels)


@functools.lru_cache(maxsize=1024)
def line_strides(sizes: tuple[int, ...], strides: tuple[int, ...], last: bool) -> tuple[int, int] | None:
    """From image to image and from line to line, of a tensor that has the lines that are asked for."""
    pixel = _pixel_stride(sizes, strides)
    if pixel is not None:
        if last and (strides[1] == 1 or sizes[1] == 1):
            return strides[0], pixel
        if not last and (pixel == 1 or math.prod(sizes[2:]) == 1):
            return strides[0], strides[1]
    return None


def _pixel_stride(sizes: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
    """The stride from pixel to pixel, if one stride walks all spatial dimensions."""
    pixel = after = None
    for size, stride in zip(reversed(sizes[2:]), reversed(strides[2:])):
        if size == 1:
            continue
        if pixel is None:
            pixel = stride
        elif stride != after:
            return None
        after = stride * size
    return 1 if pixel is None else pixel
