"""Conditional batch norm as torch knows it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ... import _backends, _images
from ..._arguments import sum_dtype
from ..._registration import launchers, register
from . import reference


def _examples() -> Iterator[_backends.Example]:
    """Planes of less than a vector and of more than a tile, odd sizes, both ways to lay out an image, evaluation."""
    for name, shape in (("4 x 4", (8, 96, 4, 4)), ("odd sizes", (3, 37, 7, 9)), ("large planes", (2, 6, 90, 90))):
        batch, channels = shape[:2]
        x = torch.randn(shape) * torch.rand(channels, 1, 1).add(0.5) + torch.randn(channels, 1, 1)
        gain, bias = (torch.randn(batch, channels, requires_grad=True) for _ in range(2))
        running = torch.zeros(channels), torch.ones(channels)
        yield _backends.Example(name, (x.requires_grad_(), gain, bias, *running), {"training": True})
        last = x.detach().clone(memory_format=torch.channels_last).requires_grad_()
        yield _backends.Example(f"{name}, channels last", (last, gain, bias, *running), {"training": True})
        running = torch.randn(channels), torch.rand(channels).add(0.5)
        yield _backends.Example(f"{name}, evaluation", (x, gain, bias, *running), {"training": False})


choices = _backends.add_op(
    "conditional_batch_norm", {"cpu": _images.cpu_reasons, "triton": _images.triton_reasons}, _examples
)


def _outputs(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """The output, and ``(3, C)``: mean, 1 / sqrt(var + eps), unbiased variance, or the variance that was given."""
    return _images.empty_like(x), x.new_empty(3, x.shape[1], dtype=sum_dtype(x))


def _gradients(_grad: Tensor, x: Tensor, gain: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Of ``x``, ``gain`` and ``bias``."""
    return _images.empty_like(x), gain.new_empty(gain.shape), gain.new_empty(gain.shape)


def _second_gradients(
    _v: Tensor, _v_gain: Tensor, _v_bias: Tensor, _grad: Tensor, x: Tensor, gain: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Of ``grad``, ``x`` and ``gain``. The bias is in no gradient."""
    return _images.empty_like(x), _images.empty_like(x), gain.new_empty(gain.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, gain, _bias, mean, _var, *ctx.call = inputs
    ctx.training = mean is None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, gain, output[1])


def _gradient(ctx: Any, grad: Tensor | None, _grad_statistics: None) -> tuple[Any, ...]:
    """The statistics are a function of ``x``: what they pass on is in its gradient, and nobody else takes theirs.

    ``y`` has no gradient where the backward pass is differentiated, to which the statistics went, and not ``y``.
    """
    gradients: tuple[Tensor | None, ...] = (None, None, None)
    if grad is not None:
        gradients = backward(grad, *ctx.saved_tensors, ctx.training, *ctx.call)
    return *gradients, None, None, *[None] * len(ctx.call)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.training, ctx.eps, ctx.group, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _gradient_of_backward(ctx: Any, *v: Tensor) -> tuple[Any, ...]:
    call = ctx.training, ctx.eps, ctx.group, ctx.backend
    return *double_backward(*v, *ctx.saved_tensors, *call), None, *[None] * len(call)


def _gradient_of_double_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    """Differentiate the reference three times. Where a graph is asked for, its own goes on, to any order."""
    _backends.warn_once("conditional_batch_norm", "takes third derivatives from the reference")
    *tensors, statistics = ctx.saved_tensors
    higher = torch.is_grad_enabled()
    with torch.enable_grad():
        # Each an object of its own, with a partial derivative of its own, still in the caller's graph.
        own = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in tensors]
        *v, grad, x, gain = own
        bias = torch.zeros_like(gain, requires_grad=True)
        mean, _, var = statistics.detach()
        if ctx.training:
            mean = var = None
        y, _ = reference.conditional_batch_norm(x, gain, bias, mean, var, ctx.eps, ctx.group)
        first = torch.autograd.grad(y, [x, gain, bias], grad, create_graph=True)
        second = torch.autograd.grad(
            first, [grad, x, gain], v, create_graph=True, allow_unused=True, materialize_grads=True
        )
        # In evaluation some are linear, and have no further graph.
        pairs = [(s, g) for s, g in zip(second, grads) if s.requires_grad]
        third = torch.autograd.grad(
            [s for s, _ in pairs], own, [g for _, g in pairs], allow_unused=True, create_graph=higher
        )
    return *third, None, None, None, None, None


_STATISTICS = "Tensor statistics, bool training, float eps, str group, str backend"
_KERNELS = ("cpu", "triton")

double_backward = register(
    "conditional_batch_norm_double_backward",
    f"(Tensor v, Tensor v_gain, Tensor v_bias, Tensor grad, Tensor x, Tensor gain, {_STATISTICS}) "
    "-> (Tensor, Tensor, Tensor)",
    outputs=_second_gradients,
    kernels=launchers(__package__, "double_backward", _KERNELS),
    save=_save_backward,
    gradient=_gradient_of_double_backward,
)

backward = register(
    "conditional_batch_norm_backward",
    f"(Tensor grad, Tensor x, Tensor gain, {_STATISTICS}) -> (Tensor, Tensor, Tensor)",
    outputs=_gradients,
    kernels=launchers(__package__, "backward", _KERNELS),
    save=_save_backward,
    gradient=_gradient_of_backward,
)

# The statistics of the batch, or those that are given. group: a process group's name, or "" for this process alone.
forward = register(
    "conditional_batch_norm",
    "(Tensor x, Tensor gain, Tensor bias, Tensor? mean, Tensor? var, float eps, str group, str backend) "
    "-> (Tensor, Tensor)",
    outputs=_outputs,
    kernels=launchers(__package__, "forward", _KERNELS),
    save=_save,
    gradient=_gradient,
)
