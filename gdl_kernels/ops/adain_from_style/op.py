"""Adaptive instance normalisation with another image's statistics as torch knows it.

Beside its output the op gives statistics, ``(2, N, C)``: of the style the mean and ``sqrt(var + eps)`` of every plane,
which are the content's new ones, and of the content the mean and ``1 / sqrt(var + eps)``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ... import _backends, _images
from ..._arguments import sum_dtype
from ..._registration import register
from ..adain import op as adain
from . import cpu, cuda


def _examples() -> Iterator[_backends.Example]:
    """Both ways to lay out an image, and styles of another size."""
    for name, shape, size in (("a tile", (2, 32, 32, 32), (16, 16)), ("odd sizes", (3, 19, 7, 9), (80, 90))):
        content, style = torch.randn(shape), torch.randn(*shape[:2], *size)
        yield _backends.Example(name, (content.clone().requires_grad_(), style.clone().requires_grad_()))
        last = [t.clone(memory_format=torch.channels_last).requires_grad_() for t in (content, style)]
        yield _backends.Example(f"{name}, channels last", tuple(last))


choices = _backends.add_op("adain_from_style", {"cpu": _images.cpu_reasons, "cuda": _images.cuda_reasons}, _examples)


def _outputs(content: Tensor, *_: Any) -> tuple[Tensor, ...]:
    of_style = content.new_empty(2, *content.shape[:2], dtype=sum_dtype(content))
    return _images.empty_like(content), of_style, torch.empty_like(of_style)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    content, style, *ctx.call = inputs
    _y, of_style, of_content = output
    ctx.mark_non_differentiable(of_content)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(content, style, of_style, of_content)


def _gradient(ctx: Any, grad: Tensor | None, grad_of_style: Tensor | None, _: None) -> tuple[Any, ...]:
    """Those of adain, whose bias and scale pass theirs on to the style.

    ``(grad_mean + grad_deviation (style - mean) / deviation) / pixels`` is AdaIN of the style itself. ``of_style`` gets
    a gradient when this function is differentiated in turn, because the gradients of adain take the deviation from it.
    """
    content, style, of_style, of_content = ctx.saved_tensors
    no_prologue = None, None, None, None, 1.0
    dcontent = dstyle = None
    of_planes: list[Tensor] = []
    if grad is not None:
        _mean, deviation = of_style
        dcontent, dscale, dbias, *_ = adain.backward(grad, content, deviation, of_content, *no_prologue, *ctx.call)
        of_planes = [dbias, dscale]
        if grad_of_style is not None:
            of_planes = [a + b for a, b in zip(of_planes, grad_of_style)]
    elif grad_of_style is not None:
        of_planes = list(grad_of_style)
    if of_planes and ctx.needs_input_grad[1]:
        bias, scale = torch._foreach_div(of_planes, math.prod(style.shape[2:]))  # in one launch
        dstyle, _statistics = adain.forward(style, scale, bias, *no_prologue, *ctx.call)
    return dcontent, dstyle, None, None


forward = register(
    "adain_from_style",
    "(Tensor content, Tensor style, float eps, str backend) -> (Tensor, Tensor, Tensor)",
    outputs=_outputs,
    kernels={"cpu": cpu.forward, "cuda": cuda.forward},
    save=_save,
    gradient=_gradient,
)
