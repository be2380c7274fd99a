"""Spectral normalisation as torch knows it: one op for all weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _backends, _native
from ..._registration import launchers, register
from . import reference, vectors

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

#: Which vector a step of the power method computes first: torch u, BigGAN v.
SEMANTICS = ("torch", "biggan")


def _cpu_reasons(weights: list[Tensor], us: list[Tensor], vs: list[Tensor], **_: Any) -> list[str]:
    reasons = _native.missing("cpu")
    if weights and not weights[0].is_cpu:
        reasons.append(f"weights are on {weights[0].device}")
    return reasons


def _triton_reasons(weights: list[Tensor], us: list[Tensor], vs: list[Tensor], **_: Any) -> list[str]:
    reasons = _native.missing("triton")
    if weights:
        device = weights[0].device
        if device.type != "cuda" and not (_native.interpreting() and device.type == "cpu"):
            reasons.append(f"weights are on {device}")
        if weights[0].dtype == torch.float64:
            reasons.append("weights are float64")
        if max(_columns(w.shape) for w in weights) >= 2**31:
            reasons.append("a weight has 2^31 columns or more")
    return reasons


def _examples() -> Iterator[_backends.Example]:
    """A list as a network has it: wide, tall, a single row, convolutions, and weights that lie transposed."""
    shapes = (64, 700), (500, 20), (1, 96), (40, 1), (24, 12, 3, 3), (33, 7, 3, 3)
    weights = [torch.randn(shape) for shape in shapes]
    weights += [torch.randn(12, 24, 4, 4).movedim(1, 0), torch.randn(30, 50).T]
    weights.append(torch.randn(24, 12, 3, 3).to(memory_format=torch.channels_last))
    for semantics in SEMANTICS:
        for n_power_iterations in (2, 0):
            us, vs = ([_unit(length(w.shape)) for w in weights] for length in (_rows, _columns))
            if n_power_iterations == 0:  # the sigma of random vectors is a sum that cancels
                _, us, vs, _ = reference.spectral_normalize(weights, us, vs, 5, 1e-12, semantics)
            yield _backends.Example(
                f"{len(weights)} weights, {semantics}, {n_power_iterations} steps",
                ([w.clone().requires_grad_() for w in weights], us, vs),
                {"semantics": semantics, "n_power_iterations": n_power_iterations},
            )


def _rows(shape: tuple[int, ...]) -> int:
    return shape[0]


def _columns(shape: tuple[int, ...]) -> int:
    return math.prod(shape[1:])


def _unit(length: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(length), dim=0)


choices = _backends.add_op("spectral_normalize", {"cpu": _cpu_reasons, "triton": _triton_reasons}, _examples)


def _outputs(
    weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor], *_: Any
) -> tuple[list[Tensor], Tensor]:
    """The normalised weights, and what was found on the way."""
    return [torch.empty_like(w) for w in weights], vectors.empty(weights, us, vs)


def _grad_weights(grads: list[Tensor], weights: list[Tensor], *_: Any) -> list[Tensor]:
    return [torch.empty_like(w) for w in weights]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], Tensor]) -> None:
    weights, ctx.backend = inputs[0], inputs[-1]
    found = output[1]
    ctx.mark_non_differentiable(found)
    ctx.set_materialize_grads(False)  # a weight that nobody used has no gradient, not one of zeros
    ctx.save_for_backward(*weights, found)


def _gradient(ctx: Any, grads: list[Tensor | None], _grad_of_found: None) -> tuple[Any, ...]:
    count = len(grads)
    *weights, found = ctx.saved_tensors
    wanted = [i for i, grad in enumerate(grads) if grad is not None and ctx.needs_input_grad[0][i]]
    grad_weights: list[Tensor | None] = [None] * count
    if wanted:
        if len(wanted) < count:
            found = vectors.of_some(found, weights, wanted)
        computed = backward([grads[i] for i in wanted], [weights[i] for i in wanted], found, ctx.backend)
        for i, grad_weight in zip(wanted, computed):
            grad_weights[i] = grad_weight
    return grad_weights, [None] * count, [None] * count, None, None, None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    grads, weights, found, _backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*grads, *weights, found)


def _gradient_of_backward(ctx: Any, cotangents: list[Tensor | None]) -> tuple[Any, ...]:
    """The gradient of <H, (G - <G, W> u v' / sigma) / sigma>, in which sigma is u' W v."""
    count = len(cotangents)
    *saved, found = ctx.saved_tensors  # once: torch.utils.checkpoint gives them no second time
    grads, weights = saved[:count], saved[count:]
    _sigmas, us, vs = vectors.parts(found, weights)
    pairs = [_second(*tensors) for tensors in zip(cotangents, grads, weights, us, vs)]
    grad_grads, grad_weights = map(list, zip(*pairs))
    return grad_grads, grad_weights, None, None


def _second(h: Tensor | None, grad: Tensor, weight: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor | None, ...]:
    if h is None:
        return None, None
    wide_h, wide_grad, wide_weight = (t.to(u.dtype).flatten(1) for t in (h, grad, weight))
    sigma = u @ (wide_weight @ v)
    along_h = u @ (wide_h @ v) / sigma
    along_grad = (wide_grad * wide_weight).sum() / sigma
    of_sigma = (2 * along_grad * along_h - (wide_grad * wide_h).sum() / sigma) / sigma
    grad_grad = (wide_h - along_h * wide_weight) / sigma
    grad_weight = of_sigma * torch.outer(u, v) - along_h / sigma * wide_grad
    return grad_grad.view(grad.shape).to(grad.dtype), grad_weight.view(weight.shape).to(weight.dtype)


_KERNELS = ("cpu", "triton")

backward = register(
    "spectral_normalize_backward",
    "(Tensor[] grads, Tensor[] weights, Tensor vectors, str backend) -> Tensor[]",
    outputs=_grad_weights,
    kernels=launchers(__package__, "backward", _KERNELS),
    save=_save_backward,
    gradient=_gradient_of_backward,
)

# The second output is what vectors.py says.
forward = register(
    "spectral_normalize",
    "(Tensor[] weights, Tensor[] us, Tensor[] vs, int n_power_iterations, float eps, str semantics, str backend)"
    " -> (Tensor[], Tensor)",
    outputs=_outputs,
    kernels=launchers(__package__, "forward", _KERNELS),
    save=_save,
    gradient=_gradient,
)
