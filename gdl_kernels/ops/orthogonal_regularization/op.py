"""Orthogonal regularisation as torch knows it."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _backends, _matrices, _native
from ..._arguments import sum_dtype
from ..._registration import launchers, register
from .cpu import orientation

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _cpu_reasons(weights: Sequence[Tensor], **_: Any) -> list[str]:
    # The products are PyTorch's own: nothing has to be built.
    device = weights[0].device
    return [] if device.type == "cpu" else [f"weights are on {device}"]


def _triton_reasons(weights: Sequence[Tensor], **_: Any) -> list[str]:
    reasons, device = _native.missing("triton"), weights[0].device
    if device.type != "cuda" and not (_native.interpreting() and device.type == "cpu"):
        reasons.append(f"weights are on {device}")
    if weights[0].dtype == torch.float64:
        reasons.append("weights are float64")
    return reasons


def _examples() -> Iterator[_backends.Example]:
    """Both sides of matrices that are wide, high, square and thin; small ones in one stack, one that is tiled."""
    shapes = [(48, 5, 3, 3), (100, 20), (33, 33), (1, 40), (40, 1), (30, 70), (31, 66), (200, 300)]
    for gram in ("columns", "rows"):
        weights = [torch.randn(shape).requires_grad_() for shape in shapes]
        yield _backends.Example(gram, (weights,), {"beta": 1e-2, "gram": gram})


choices = _backends.add_op("orthogonal_regularization", {"cpu": _cpu_reasons, "triton": _triton_reasons}, _examples)


def _outputs(
    weights: list[Tensor], beta: float, columns: bool, keep: bool, backend: str
) -> tuple[Tensor, list[Tensor]]:
    dtype = sum_dtype(weights[0])
    penalty = weights[0].new_empty((), dtype=dtype)
    if not keep:
        return penalty, []
    if backend == "triton":
        sizes = importlib.import_module(".triton", __package__).kept_sizes(weights, columns)
        return penalty, [penalty.new_empty(size) for size in sizes]
    sides = (min(w.shape[0], math.prod(w.shape[1:])) for w in weights)
    return penalty, [w.new_empty(side, side, dtype=dtype) for w, side in zip(weights, sides)]


def _gradients(grad: Tensor, weights: list[Tensor], *_: Any) -> list[Tensor]:
    return [_matrices.empty_like(weight) for weight in weights]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    weights, ctx.beta, ctx.columns, _keep, ctx.backend = inputs
    kept = output[1]
    ctx.count = len(weights)
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(*weights, *kept)


def _gradient(ctx: Any, grad: Tensor, _grads_of_kept: list[Tensor]) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    weights, kept = list(saved[: ctx.count]), list(saved[ctx.count :])
    return backward(grad, weights, kept, ctx.beta, ctx.columns, ctx.backend), None, None, None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    grad, weights, kept, ctx.beta, ctx.columns, _backend = inputs
    ctx.kept = len(kept)
    ctx.save_for_backward(grad, *weights)


def _gradient_of_backward(ctx: Any, cotangents: list[Tensor]) -> tuple[Any, ...]:
    """What was kept is a function of the weights: what it would pass on is in their gradients."""
    grad, *weights = ctx.saved_tensors
    grad_grad, grads = grad.new_zeros(()), []
    for weight, cotangent in zip(weights, cotangents):
        gradient, along = _second(weight, cotangent, ctx.columns)
        grad_grad = grad_grad + 4 * ctx.beta * gradient
        grads.append((4 * ctx.beta * grad * along).to(weight.dtype))
    return grad_grad, grads, [None] * ctx.kept, None, None, None


def _second(weight: Tensor, cotangent: Tensor, columns: bool) -> tuple[Tensor, Tensor]:
    """``<v, D>`` and its derivative by W, with ``D`` the penalty's gradient over ``4 beta``; by the smaller side."""
    w, v = (t.flatten(1).to(sum_dtype(weight)) for t in (weight, cotangent))
    turn, of_rows = orientation(w.shape[0], w.shape[1], columns)
    if turn:
        w, v = w.mT, v.mT
    gram, mixed = w @ w.mT, v @ w.mT
    mixed = mixed + mixed.mT
    if of_rows:
        gram, mixed = (t - t.diagonal().diag() for t in (gram, mixed))
        towards, along = gram @ w, gram @ v + mixed @ w
    else:
        norms, inner = w.square().sum(0), 2 * (v * w).sum(0)
        towards, along = gram @ w - w * norms, gram @ v + mixed @ w - v * norms - w * inner
    return (v * towards).sum(), (along.mT if turn else along).reshape(weight.shape)


_KERNELS = ("cpu", "triton")

backward = register(
    "orthogonal_regularization_backward",
    "(Tensor grad, Tensor[] weights, Tensor[] kept, float beta, bool columns, str backend) -> Tensor[]",
    outputs=_gradients,
    kernels=launchers(__package__, "backward", _KERNELS),
    save=_save_backward,
    gradient=_gradient_of_backward,
)

# keep: whether the second output has what the gradient needs; it has no gradient of its own.
forward = register(
    "orthogonal_regularization",
    "(Tensor[] weights, float beta, bool columns, bool keep, str backend) -> (Tensor, Tensor[])",
    outputs=_outputs,
    kernels=launchers(__package__, "forward", _KERNELS),
    save=_save,
    gradient=_gradient,
)
