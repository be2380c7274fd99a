"""Adaptive instance normalisation as torch knows it, with what StyleGAN's epilogue does to x before.

``u = x + noise_weight[c] noise[n] + channel_bias[c]``, ``h = u if u > 0 else negative_slope u``, then AdaIN of ``h``.
Noise is given, or drawn from a seed wherever it is needed. Parameters have the dtype of the sums; CUDA's kernels read
others too, as long as ``scale`` and ``bias`` have the same. Gradients have the shapes and dtypes of what they are of.
Beside its output the op gives statistics, ``(2, N, C)``: the mean and ``1 / sqrt(var + eps)`` of every plane. With
``x``, that is what its gradients start from.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ... import _backends, _images
from ..._arguments import sum_dtype, to_dtype
from ..._registration import register
from . import cpu, cuda
from .reference import planes


def _examples() -> Iterator[_backends.Example]:
    """Both ways to lay out an image, planes of one piece and of several, and a mean far from zero."""
    for name, shape in (("a tile", (2, 32, 32, 32)), ("odd sizes", (3, 19, 7, 9)), ("large planes", (1, 3, 80, 70))):
        x, scale, bias = torch.randn(shape) + 3, torch.randn(shape[:2]), torch.randn(shape[:2])
        yield _backends.Example(name, tuple(t.clone().requires_grad_() for t in (x, scale, bias)))
        last = x.clone(memory_format=torch.channels_last)
        yield _backends.Example(f"{name}, channels last", tuple(t.requires_grad_() for t in (last, scale, bias)))


choices = _backends.add_op("adain", {"cpu": _images.cpu_reasons, "cuda": _images.cuda_reasons}, _examples)


def parameters(x: Tensor, backend: str, scale: Tensor, bias: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    """What is given beside the images, as the op takes it."""
    wide = sum_dtype(x)
    if backend == "cuda" and scale.dtype == bias.dtype:
        return [scale, bias, *others]
    return [None if t is None else to_dtype(t, wide) for t in (scale, bias, *others)]


def _like(parameter: Tensor | None, x: Tensor) -> Tensor:
    """Memory for a gradient; without a parameter, a tensor of nothing."""
    return x.new_empty(0) if parameter is None else parameter.new_empty(parameter.shape)


def _outputs(x: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return _images.empty_like(x), x.new_empty(2, *x.shape[:2], dtype=sum_dtype(x))


def _gradients(
    _grad: Tensor, x: Tensor, scale: Tensor, _statistics: Tensor, _noise: Tensor | None, _seed: Tensor | None,
    noise_weight: Tensor | None, channel_bias: Tensor | None, *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    numbers = [_like(t, x) for t in (scale, scale, noise_weight, channel_bias)]
    return _images.empty_like(x), *numbers


def _second_gradients(*args: Any) -> tuple[Tensor, ...]:
    dx, dscale, _dbias, *others = _gradients(*args[5:])
    return _images.empty_like(dx), dx, dscale, *others


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, scale, _bias, noise, seed, noise_weight, channel_bias, *ctx.call = inputs
    _y, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)  # a launch for each that is zero
    ctx.save_for_backward(x, scale, statistics, noise, seed, noise_weight, channel_bias)


def _gradient(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 10
    x, scale, statistics, noise, seed, noise_weight, channel_bias = ctx.saved_tensors
    dtype = x.dtype
    if ctx.needs_input_grad[3]:  # its gradient is a sum over dx, which must not have been rounded
        wide = sum_dtype(x)
        grad, x = to_dtype(grad, wide), to_dtype(x, wide)
    dx, dscale, dbias, dweight, dchannel = backward(
        grad, x, scale, statistics, noise, seed, noise_weight, channel_bias, *ctx.call
    )
    dnoise = _noise_gradient(noise, noise_weight, dx, ctx.call[-1]) if ctx.needs_input_grad[3] else None
    dweight = dweight if ctx.needs_input_grad[5] else None
    dchannel = dchannel if ctx.needs_input_grad[6] else None
    return to_dtype(dx, dtype), dscale, dbias, dnoise, None, dweight, dchannel, None, None, None


#: Channels that a product adds up; what they come to is added after that, so that rounding stays that of a sum.
ADDED = 32


def _noise_gradient(noise: Tensor, weight: Tensor, gradient: Tensor, backend: str) -> Tensor:
    """From the gradient of x, in the dtype of sums: noise reaches every channel of its image."""
    if backend == "cuda":
        return noise_gradient(gradient, weight, noise, backend)
    channels = gradient.shape[1]
    added = next(size for size in range(ADDED, 0, -1) if channels % size == 0)
    groups = channels // added
    weight = to_dtype(weight, gradient.dtype)
    by_group, flat = weight.unflatten(0, (groups, added)).unsqueeze(1), gradient.flatten(2)
    if flat.stride(2) == 1:
        sums = (by_group @ flat.unflatten(1, (groups, added))).squeeze(-2)  # [N, groups, pixels]
    else:
        # Channels last: a group alone would be copied. Every group's product has zeros for the others' channels.
        own = torch.eye(groups, dtype=weight.dtype, device=weight.device).unsqueeze(2)
        sums = (by_group * own).flatten(-2) @ flat
    return to_dtype(sums.sum((0, 1) if noise.shape[0] == 1 else 1).reshape(noise.shape), noise.dtype)


def _like_noise(_gradient: Tensor, _weight: Tensor, noise: Tensor, *_: Any) -> Tensor:
    return noise.new_empty(noise.shape)


def _save_noise_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _gradient_of_noise_gradient(ctx: Any, v: Tensor) -> tuple[Any, ...]:
    gradient, weight = ctx.saved_tensors
    v = to_dtype(v, gradient.dtype)
    of_gradient = (planes(weight, v) * v).expand_as(gradient)
    of_weight = to_dtype((gradient * v).flatten(2).sum((0, 2)), weight.dtype)
    return of_gradient, of_weight, None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, slope, eps, backend = inputs
    ctx.call = slope, eps, backend
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _gradient_of_backward(ctx: Any, v: Tensor | None, *v_numbers: Tensor | None) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    grad, x, _scale, _statistics, noise, _seed, noise_weight, channel_bias = tensors
    dtype = x.dtype
    v = torch.zeros_like(x) if v is None else v
    # Of what is not there the gradient is a tensor of nothing, and so is its direction.
    *v_planes, v_weight, v_channel = v_numbers
    v_weight = None if noise_weight is None else v_weight
    v_channel = None if channel_bias is None else v_channel
    if ctx.needs_input_grad[4]:
        wide = sum_dtype(x)
        v, grad, x = (to_dtype(t, wide) for t in (v, grad, x))
        tensors = grad, x, *tensors[2:]
    grad_grad, grad_x, grad_scale, grad_weight, grad_channel = double_backward(
        v, *v_planes, v_weight, v_channel, *tensors, *ctx.call
    )
    grad_noise = None
    if ctx.needs_input_grad[4]:
        grad_noise = _noise_gradient(noise, noise_weight, grad_x, ctx.call[-1])
        if v_weight is not None:  # the gradient of noise_weight is the sum of dx noise
            dx = backward(*tensors, *ctx.call)[0]
            grad_noise = grad_noise + _noise_gradient(noise, v_weight, dx, ctx.call[-1])
    grad_weight = grad_weight if ctx.needs_input_grad[6] else None
    grad_channel = grad_channel if ctx.needs_input_grad[7] else None
    grad_grad, grad_x = to_dtype(grad_grad, dtype), to_dtype(grad_x, dtype)
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
        given = noise if seed is None else reference.drawn_noise(seed, x)
        y = reference.style_epilogue(x, scale, bias, given, noise_weight, channel_bias, slope, eps)
        along = [(t, v) for t, v in zip((x, scale, bias, noise_weight, channel_bias), cotangents) if v is not None]
        first = torch.autograd.grad(y, [t for t, _ in along], grad, create_graph=True)
        of_first = [(t, g) for t, g in zip((grad, x, scale, noise_weight, channel_bias), grads) if t is not None]
        second = torch.autograd.grad(first, [t for t, _ in of_first], [v for _, v in along], create_graph=True)
        wanted = [t for t in own if t is not None]
        outward = [g for _, g in of_first]
        third = iter(torch.autograd.grad(second, wanted, outward, allow_unused=True, create_graph=higher))
    found = [None if t is None else next(third) for t in own]
    *of_tensors, of_noise, of_weight, of_channel = found
    return *of_tensors, None, of_noise, None, of_weight, of_channel, None, None, None


noise_gradient = register(
    "adain_noise_gradient",
    "(Tensor gradient, Tensor weight, Tensor noise, str backend) -> Tensor",
    outputs=_like_noise,
    kernels={"cuda": cuda.noise_gradient},
    save=_save_noise_gradient,
    gradient=_gradient_of_noise_gradient,
)

# Noise is given, or drawn from the seed, int64 () on the device or the CPU; noise_weight comes with either.
_PROLOGUE = "Tensor? noise, Tensor? seed, Tensor? noise_weight, Tensor? channel_bias, float negative_slope"
_CALL = f"{_PROLOGUE}, float eps, str backend"

# Of v, and of directions that are not None.
double_backward = register(
    "adain_double_backward",
    "(Tensor v, Tensor? v_scale, Tensor? v_bias, Tensor? v_noise_weight, Tensor? v_channel_bias, Tensor grad, "
    f"Tensor x, Tensor scale, Tensor statistics, {_CALL}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    outputs=_second_gradients,
    kernels={"cpu": cpu.double_backward, "cuda": cuda.double_backward},
    save=_save_double_backward,
    gradient=_gradient_of_double_backward,
)

# Of x, scale, bias, noise_weight and channel_bias.
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
