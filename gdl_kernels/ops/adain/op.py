"""Adaptive instance normalisation as torch knows it, with what StyleGAN's epilogue does to x before.

``u = x + noise_weight[c] noise[n] + channel_bias[c]``, ``h = u if u > 0 else negative_slope u``, then AdaIN of ``h``.
Noise is given, or drawn from a seed wherever it is needed. Parameters have the dtype of the sums. Beside its output the
op gives statistics, ``(2, N, C)``: the mean and ``1 / sqrt(var + eps)`` of every plane. With ``x``, that is what its
gradients start from.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ... import _backends, _images
from ..._arguments import sum_dtype
from ..._registration import register
from . import cpu, cuda


def _examples() -> Iterator[_backends.Example]:
    """Both ways to lay out an image, planes of one piece and of several, and a mean far from zero."""
    for name, shape in (("a tile", (2, 32, 32, 32)), ("odd sizes", (3, 19, 7, 9)), ("large planes", (1, 3, 80, 70))):
        x, scale, bias = torch.randn(shape) + 3, torch.randn(shape[:2]), torch.randn(shape[:2])
        yield _backends.Example(name, tuple(t.clone().requires_grad_() for t in (x, scale, bias)))
        last = x.clone(memory_format=torch.channels_last)
        yield _backends.Example(f"{name}, channels last", tuple(t.requires_grad_() for t in (last, scale, bias)))


choices = _backends.add_op("adain", {"cpu": _images.cpu_reasons, "cuda": _images.cuda_reasons}, _examples)


def _planes(x: Tensor, count: int) -> tuple[Tensor, ...]:
    """Numbers of every plane, ``(N, C)``."""
    images, channels, *_ = x.shape
    wide = sum_dtype(x)
    return tuple([x.new_empty(images, channels, dtype=wide) for _ in range(count)])


def _outputs(x: Tensor, scale: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return _images.empty_like(x), scale.new_empty(2, *scale.shape)


def _gradients(_grad: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return _images.empty_like(x), *_planes(x, 4)


def _second_gradients(*args: Any) -> tuple[Tensor, ...]:
    x = args[6]
    return _images.empty_like(x), _images.empty_like(x), *_planes(x, 3)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, scale, _bias, noise, seed, noise_weight, channel_bias, *ctx.call = inputs
    _y, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.save_for_backward(x, scale, statistics, noise, seed, noise_weight, channel_bias)


def _gradient(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    x, scale, statistics, noise, seed, noise_weight, channel_bias = ctx.saved_tensors
    dtype = x.dtype
    if ctx.needs_input_grad[3]:  # its gradient is a sum over dx, which must not have been rounded
        grad, x = grad.to(noise.dtype), x.to(noise.dtype)
    dx, dscale, dbias, dweight, dchannel = backward(
        grad, x, scale, statistics, noise, seed, noise_weight, channel_bias, *ctx.call
    )
    dnoise = _noise_gradient(noise, noise_weight, dx) if ctx.needs_input_grad[3] else None
    dx = dx.to(dtype)
    dweight = dweight.sum(0) if ctx.needs_input_grad[5] else None
    dchannel = dchannel.sum(0) if ctx.needs_input_grad[6] else None
    return dx, dscale, dbias, dnoise, None, dweight, dchannel, None, None, None


#: Channels that a product adds up; what they come to is added after that, so that rounding stays that of a sum.
ADDED = 32


def _noise_gradient(noise: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
    """From the gradient of x: noise reaches every channel of its image, with a weight ``(C,)`` or ``(N, C)``."""
    channels = gradient.shape[1]
    added = next(size for size in range(ADDED, 0, -1) if channels % size == 0)
    groups = channels // added
    by_group, flat = weight.unflatten(-1, (groups, added)).unsqueeze(-2), gradient.flatten(2)
    if flat.stride(2) == 1:
        sums = (by_group @ flat.unflatten(1, (groups, added))).squeeze(-2)  # [N, groups, pixels]
    else:
        # Channels last: a group alone would be copied. Every group's product has zeros for the others' channels.
        own = torch.eye(groups, dtype=weight.dtype, device=weight.device).unsqueeze(2)
        sums = (by_group * own).flatten(-2) @ flat
    return sums.sum((0, 1) if noise.shape[0] == 1 else 1).reshape(noise.shape)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, slope, eps, backend = inputs
    ctx.call = slope, eps, backend
    ctx.save_for_backward(*tensors)


def _gradient_of_backward(ctx: Any, v: Tensor, *v_planes: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    noise, noise_weight, dtype = tensors[4], tensors[6], tensors[1].dtype
    if ctx.needs_input_grad[4]:
        v, grad, x = (t.to(noise.dtype) for t in (v, *tensors[:2]))
        tensors = grad, x, *tensors[2:]
    grad_grad, grad_x, grad_scale, grad_weight, grad_channel = double_backward(v, *v_planes, *tensors, *ctx.call)
    grad_noise = None
    if ctx.needs_input_grad[4]:
        # It is in u, and in dnoise_weight, the sum of dx noise.
        dx = backward(*tensors, *ctx.call)[0]
        grad_noise = _noise_gradient(noise, noise_weight, grad_x) + _noise_gradient(noise, v_planes[2], dx)
    grad_weight = grad_weight.sum(0) if ctx.needs_input_grad[6] else None
    grad_channel = grad_channel.sum(0) if ctx.needs_input_grad[7] else None
    grad_grad, grad_x = grad_grad.to(dtype), grad_x.to(dtype)
    return grad_grad, grad_x, grad_scale, None, grad_noise, None, grad_weight, grad_channel, None, None, None


def _save_double_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, slope, eps, _backend = inputs
    ctx.call = slope, eps
    ctx.save_for_backward(*tensors)


def _gradient_of_double_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    """Differentiate the reference three times. Where a graph is asked for, its own goes on, to any order."""
    from ..style_epilogue import reference

    _backends.warn_once("adain", "takes third derivatives from the reference")
    slope, eps = ctx.call
    *tensors, _statistics, noise, seed, noise_weight, channel_bias = ctx.saved_tensors
    x = tensors[6]
    higher = torch.is_grad_enabled()
    with torch.enable_grad():
        # Each an object of its own, with a partial derivative of its own, still in the caller's graph.
        own: list[Any] = [
            t if t is None else t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
            for t in (*tensors, noise, noise_weight, channel_bias)
        ]
        *cotangents, grad, x, scale, noise, noise_weight, channel_bias = own
        bias = torch.zeros_like(scale, requires_grad=True)
        # One of every plane, because the op gives their gradients by plane.
        weights, biases = (
            torch.zeros_like(bias, requires_grad=True) if t is None else t.expand(bias.shape)
            for t in (noise_weight, channel_bias)
        )
        if seed is not None:
            given = reference.drawn_noise(seed, x)
        elif noise is not None:
            given = noise
        else:
            given = x.new_zeros(1, 1, *x.shape[2:], dtype=scale.dtype)
        y = reference.style_epilogue(x, scale, bias, given, weights, biases, slope, eps)
        first = torch.autograd.grad(y, [x, scale, bias, weights, biases], grad, create_graph=True)
        second = torch.autograd.grad(first, [grad, x, scale, weights, biases], cotangents, create_graph=True)
        wanted = [t for t in own if t is not None]
        third = iter(torch.autograd.grad(second, wanted, grads, allow_unused=True, create_graph=higher))
    found = [None if t is None else next(third) for t in own]
    *of_tensors, of_noise, of_weight, of_channel = found
    return *of_tensors, None, of_noise, None, of_weight, of_channel, None, None, None


# Noise is given, or drawn from the seed, int64 () on the device; noise_weight comes with either.
_PROLOGUE = "Tensor? noise, Tensor? seed, Tensor? noise_weight, Tensor? channel_bias, float negative_slope"
_CALL = f"{_PROLOGUE}, float eps, str backend"

# Of noise_weight and channel_bias it gives what every plane adds to their gradients, (N, C).
double_backward = register(
    "adain_double_backward",
    "(Tensor v, Tensor v_scale, Tensor v_bias, Tensor v_noise_weight, Tensor v_channel_bias, Tensor grad, Tensor x, "
    f"Tensor scale, Tensor statistics, {_CALL}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    outputs=_second_gradients,
    kernels={"cpu": cpu.double_backward, "cuda": cuda.double_backward},
    save=_save_double_backward,
    gradient=_gradient_of_double_backward,
)

# As above: x, scale, bias, noise_weight by plane, channel_bias by plane.
backward = register(
    "adain_backward",
    f"(Tensor grad, Tensor x, Tensor scale, Tensor statistics, {_CALL}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    outputs=_gradients,
    kernels={"cpu": cpu.backward, "cuda": cuda.backward},
    save=_save_backward,
    gradient=_gradient_of_backward,
)

forward = register(
    "adain",
    f"(Tensor x, Tensor scale, Tensor bias, {_CALL}) -> (Tensor, Tensor)",
    outputs=_outputs,
    kernels={"cpu": cpu.forward, "cuda": cuda.forward},
    save=_save,
    gradient=_gradient,
)
