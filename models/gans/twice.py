"""A convolution and a leaky ReLU that are cheap to differentiate twice, as gradient penalties do.

A convolution is linear in its images and in its weights, so all that its gradients are made of, to any order, is of
three kinds: itself, its gradient by the images, and that by the weights. Torch computes the weights' part of a second
gradient as a convolution of images with images as large, which takes several times as long as the third kind, and
copies both.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class _Region:
    """What is inside one ``with towards_images()``. Gradients may be taken by threads of autograd's, so it is asked."""

    open = True


class _Here(threading.local):
    region: _Region | None = None


_here = _Here()


@contextmanager
def towards_images() -> Iterator[None]:
    """Inside, what :func:`conv2d` makes is differentiated by images alone: its weights' gradients are left out.

    Only first gradients: those that are taken of a penalty, afterwards, have all their parts.
    """
    before, region = _here.region, _Region()
    _here.region = region
    try:
        yield
    finally:
        _here.region = before
        region.open = False


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, padding: int = 0) -> Tensor:
    """``F.conv2d``, differentiable without limit; within :func:`towards_images` by products of its own."""
    x = _sorted(x, weight)
    if _here.region is not None:
        return _Convolution.apply(x, weight, bias, stride, padding, _here.region)
    return F.conv2d(x, weight, bias, stride, padding)


def _sorted(x: Tensor, weight: Tensor) -> Tensor:
    """Nobody can tell how images of one channel lie, nor 1×1 weights of one; then torch makes no channels last."""
    if x.is_cpu and weight[0].numel() == 1:
        return x.to(memory_format=torch.channels_last)
    return x


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, region: _Region | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.call = stride, padding
        ctx.biased = bias is not None
        ctx.region = region
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = _ByImages.apply(grad, weight, x, *ctx.call) if ctx.needs_input_grad[0] else None
        if ctx.region is not None and ctx.region.open:
            return grad_x, *[None] * 5
        grad_weight = _ByWeights.apply(grad, x, weight, *ctx.call)
        return grad_x, grad_weight, grad.sum((0, 2, 3)) if ctx.biased else None, *[None] * 3


class _ByImages(torch.autograd.Function):
    """The gradient by the images, of which only the shape is read: linear in ``grad`` and in ``weight``."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, weight: Tensor, x: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(grad, weight)
        ctx.call = stride, padding
        return _gradient(grad, x, weight, stride, padding, 0)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        grad, weight = ctx.saved_tensors
        of_grad = _Convolution.apply(_sorted(v, weight), weight, None, *ctx.call, None)
        return of_grad, _ByWeights.apply(grad, v, weight, *ctx.call), *[None] * 3


class _ByWeights(torch.autograd.Function):
    """The gradient by the weights, of which only the shape is read: linear in ``grad`` and in ``x``."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(grad, x)
        ctx.call = stride, padding
        return _gradient(grad, x, weight, stride, padding, 1)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        grad, x = ctx.saved_tensors
        return _Convolution.apply(x, v, None, *ctx.call, None), _ByImages.apply(grad, v, x, *ctx.call), *[None] * 3


def _gradient(grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, which: int) -> Tensor:
    wanted = [which == 0, which == 1, False]
    pair = [stride, stride], [padding, padding], [1, 1]
    return torch.ops.aten.convolution_backward(grad, x, weight, None, *pair, False, [0, 0], 1, wanted)[which]


def leaky_relu_(x: Tensor, slope: float) -> Tensor:
    """``F.leaky_relu`` in the memory of ``x``. The slope, which must be positive, is a constant to second gradients."""
    return _LeakyRelu.apply(x, slope)


class _LeakyRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float) -> Tensor:
        ctx.slope = slope
        ctx.mark_dirty(x)
        F.leaky_relu_(x, slope)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return _LeakyGradient.apply(grad, y, ctx.slope), None


class _LeakyGradient(torch.autograd.Function):
    """Torch's own has zeros for a gradient by ``y``, which it adds to others."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, y: Tensor, slope: float) -> Tensor:
        ctx.save_for_backward(y)
        ctx.slope = slope
        return torch.ops.aten.leaky_relu_backward(grad, y, slope, True)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None, None]:
        (y,) = ctx.saved_tensors
        return _LeakyGradient.apply(v, y, ctx.slope), None, None
