"""Minibatch standard deviation as torch knows it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ... import _backends, _images
from ..._registration import launchers, register
from . import reference

#: The largest group that the Triton kernels hold at once; the C++ kernels take any.
MAX_GROUP = 1024


def _triton_reasons(x: Tensor, *, group_size: int = 4, **_: Any) -> list[str]:
    reasons = _images.triton_reasons(x)
    if min(group_size, x.shape[0]) > MAX_GROUP:
        reasons.append(f"a group has more than {MAX_GROUP} samples")
    return reasons


def _examples() -> Iterator[_backends.Example]:
    """Both ways to lay out an image, where ProGAN has it and larger, and sizes that fill no vector."""
    for name, shape, call in (
        ("4x4", (8, 512, 4, 4), {}),
        ("wide", (4, 24, 40, 24), {"group_size": 2, "num_features": 2}),
        ("odd sizes", (6, 15, 7, 9), {"group_size": 3, "num_features": 5}),
    ):
        x = torch.randn(shape)
        yield _backends.Example(name, (x.requires_grad_(),), call)
        last = x.detach().clone(memory_format=torch.channels_last)
        yield _backends.Example(f"{name}, channels last", (last.requires_grad_(),), call)


choices = _backends.add_op("minibatch_stddev", {"cpu": _images.cpu_reasons, "triton": _triton_reasons}, _examples)


def _output(x: Tensor, group_size: int, num_features: int, *_: Any) -> Tensor:
    return _images.empty_like(x, x.shape[1] + num_features)


def _grad_input(grad: Tensor, x: Tensor, *_: Any) -> Tensor:
    return _images.empty_like(x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.call = inputs
    ctx.save_for_backward(x)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (x,) = ctx.saved_tensors
    return backward(grad, x, *ctx.call), None, None, None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, x, *ctx.call = inputs
    ctx.save_for_backward(grad, x)


def _gradient_of_backward(ctx: Any, v: Tensor) -> tuple[Any, ...]:
    """The gradient of ``<v, grad_copied> + sum_{m, f} share(m, f) sum_{k, pixels, g} v u``, with ``u`` the deviations
    from the mean over ``g`` in standard deviations, and ``share`` what each of them gets of the statistic's gradient.
    """
    grad, x = ctx.saved_tensors
    group_size, num_features, eps, _backend = ctx.call
    if x.shape[0] == 0:
        return torch.zeros_like(grad), torch.zeros_like(x), None, None, None, None
    group = min(group_size, x.shape[0])
    wide = torch.promote_types(x.dtype, torch.float32)
    v_wide, x_wide = (reference.grouped(t.to(wide), group, num_features) for t in (v, x))
    count = group * math.prod(x_wide.shape[3:])
    centred = x_wide - x_wide.mean(0)
    centred = centred - centred.mean(0)  # beside small deviations the rounding of the mean is not small
    r = (centred.square().mean(0) + eps).rsqrt()
    u = centred * r  # [G, N/G, F, C/F, *spatial]
    projected = (v_wide * u).mean(0)
    grad_grad = grad_x = None
    if ctx.needs_input_grad[0]:
        of_statistic = projected.flatten(2).sum(2) * (group / count)
        grad_grad = torch.cat([v, reference.tiled(of_statistic, group, x).to(v.dtype)], 1)
    if ctx.needs_input_grad[1]:
        of_statistic = reference.grouped(grad[:, x.shape[1] :].to(wide), group, num_features)
        share = of_statistic.sum(0).flatten(2).sum(2) / count  # [N/G, F]
        share = share.view(*share.shape, *[1] * (x.dim() - 1))
        grad_x = (share * r * (v_wide - v_wide.mean(0) - u * projected)).reshape(x.shape).to(x.dtype)
    return grad_grad, grad_x, None, None, None, None


_KERNELS = ("cpu", "triton")

backward = register(
    "minibatch_stddev_backward",
    "(Tensor grad, Tensor x, int group_size, int num_features, float eps, str backend) -> Tensor",
    outputs=_grad_input,
    kernels=launchers(__package__, "backward", _KERNELS),
    save=_save_backward,
    gradient=_gradient_of_backward,
)

forward = register(
    "minibatch_stddev",
    "(Tensor x, int group_size, int num_features, float eps, str backend) -> Tensor",
    outputs=_output,
    kernels=launchers(__package__, "forward", _KERNELS),
    save=_save,
    gradient=_gradient,
)
