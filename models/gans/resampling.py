"""Twice and half the resolution, alone and with a convolution, and the blur of StyleGAN."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .twice import conv2d


def upsample(x: Tensor) -> Tensor:
    """Each pixel becomes four."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def downsample(x: Tensor) -> Tensor:
    """The mean of each four pixels."""
    return F.avg_pool2d(x, 2)


def conv_of_upsampled(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 3×3 convolution of :func:`upsample`.

    Four neighbours there are the same pixel, so the weights that meet it may be added first: one transposed convolution
    with 4 products for every pixel in place of 9, where the images are larger than the weights. It took 12.0 ms of
    one thread's time with its backward pass in place of 31.9, of 32 channels to 16 at 128×128, and 19 in place of 13
    of 256 to 128 at 16×16 (a Xeon with AVX-512, float32, 4 images).
    """
    if 4 * x.numel() < weight.numel():
        return conv2d(upsample(x), weight, bias, padding=1)
    return F.conv_transpose2d(x, _neighbours_added(weight.flip(2, 3)).transpose(0, 1), bias, stride=2, padding=1)


def downsampled_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`downsample` of a 3×3 convolution, in one with stride 2 where the images are larger than the weights.

    With R1's backward pass it took 28 ms in place of 120, of 16 channels to 32 at 128×128, and 30 in place of 32 of 128
    to 256 at 16×16 (as above).
    """
    if x.numel() < weight.numel():
        return downsample(conv2d(x, weight, bias, padding=1))
    return conv2d(x, _neighbours_added(weight) / 4, bias, stride=2, padding=1)


def _neighbours_added(weight: Tensor) -> Tensor:
    """``(..., 3, 3)`` to ``(..., 4, 4)``: the sum of the four ways to lay the one upon the other."""
    padded = F.pad(weight, (1, 1, 1, 1))
    rows = padded[..., 1:, :] + padded[..., :-1, :]
    return rows[..., 1:] + rows[..., :-1]


def blur(x: Tensor) -> Tensor:
    """``[1, 2, 1] / 4`` along both sides of every plane, with zeros around it; images keep their size.

    StyleGAN (arXiv 1812.04948, section 2) has it after upsampling, whose neighbours are equal in pairs, and before
    downsampling. Differentiable without limit.
    """
    return _Blur.apply(x)


class _Blur(torch.autograd.Function):
    """A depthwise convolution whose gradient is itself, for its kernel is symmetric.

    Torch's own would have gradients of gradients of the kernel too, a convolution for every channel, and none is used.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        line = torch.tensor([0.25, 0.5, 0.25], dtype=x.dtype, device=x.device)
        channels = x.shape[1]
        return F.conv2d(x, (line[:, None] * line).expand(channels, 1, 3, 3), padding=1, groups=channels)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Blur.apply(gradient)
