"""Pixel norm as torch knows it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ... import _backends, _images
from ..._registration import register
from . import cpu, cuda


def _examples() -> Iterator[_backends.Example]:
    """Both ways to lay out an image, vectors that fit and that do not, and more channels than a kernel keeps."""
    for name, shape in (("a tile", (2, 64, 32, 32)), ("odd sizes", (3, 37, 7, 9)), ("many channels", (2, 1500, 4, 4))):
        x = torch.randn(shape)
        yield _backends.Example(name, (x.requires_grad_(),))
        last = x.detach().clone(memory_format=torch.channels_last)
        yield _backends.Example(f"{name}, channels last", (last.requires_grad_(),))


choices = _backends.add_op("pixel_norm", {"cpu": _images.cpu_reasons, "cuda": _images.cuda_reasons}, _examples)


def _output(x: Tensor, *_: Any) -> Tensor:
    return _images.empty_like(x)


def _grad_input(grad: Tensor, x: Tensor, *_: Any) -> Tensor:
    return _images.empty_like(x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(x)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (x,) = ctx.saved_tensors
    return backward(grad, x, ctx.eps, ctx.backend), None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, x, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(grad, x)


def _gradient_of_backward(ctx: Any, v: Tensor) -> tuple[Any, ...]:
    """The gradient of <v, r g - r^3 x mean_c(g x)>, which is symmetric in v and g: in g, backward transposes itself."""
    g, x = ctx.saved_tensors
    grad_g = backward(v, x, ctx.eps, ctx.backend) if ctx.needs_input_grad[0] else None
    grad_x = None
    if ctx.needs_input_grad[1]:
        wide = torch.promote_types(x.dtype, torch.float32)
        v, g, x_wide = v.to(wide), g.to(wide), x.to(wide)
        vg, vx, gx = ((a * b).mean(1, keepdim=True) for a, b in ((v, g), (v, x_wide), (g, x_wide)))
        r = (x_wide.square().mean(1, keepdim=True) + ctx.eps).rsqrt()
        # Powers of r go to the means one by one: r^5 of a dark pixel is more than float32 holds.
        vx, gx = r * vx, r * gx
        grad_x = (r * (r * x_wide * (3 * vx * gx - vg) - v * gx - g * vx) * r).to(x.dtype)
    return grad_g, grad_x, None, None


backward = register(
    "pixel_norm_backward",
    "(Tensor grad, Tensor x, float eps, str backend) -> Tensor",
    outputs=_grad_input,
    kernels={"cpu": cpu.backward, "cuda": cuda.backward},
    save=_save_backward,
    gradient=_gradient_of_backward,
)

forward = register(
    "pixel_norm",
    "(Tensor x, float eps, str backend) -> Tensor",
    outputs=_output,
    kernels={"cpu": cpu.forward, "cuda": cuda.forward},
    save=_save,
    gradient=_gradient,
)
