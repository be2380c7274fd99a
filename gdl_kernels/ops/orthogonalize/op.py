"""Orthogonalisation as torch knows it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _backends, _matrices
from ..._registration import register
from . import blas, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _reasons(device: str) -> _backends.Reasons:
    # The products are PyTorch's own: nothing has to be built.
    def reasons(weights: Sequence[Tensor], **_: Any) -> list[str]:
        found = weights[0].device
        return [] if found.type == device else [f"weights are on {found}"]

    return reasons


def _examples() -> Iterator[_backends.Example]:
    """Wide, high and nearly square: steps one by one and in rounds; small ones in one stack, one that is tiled."""
    small = [(24, 8, 3, 3), (100, 20), (1, 40), (40, 1), (20, 70), (31, 66), (70, 100)]
    for method, steps, shapes in (("polar", None, small), ("polar", 5, [(384, 800)]), ("bjorck", None, small)):
        weights = [torch.randn(shape).requires_grad_() for shape in shapes]
        call = {"method": method, "steps": steps}
        # The tuned steps lift small errors as they lift small singular values.
        yield _backends.Example(f"{method}, steps={steps}", (weights,), call, 32 if method == "polar" else 1)


choices = _backends.add_op("orthogonalize", {"cpu": _reasons("cpu"), "cuda": _reasons("cuda")}, _examples)


def _outputs(weights: list[Tensor], *_: Any) -> list[Tensor]:
    return [_matrices.empty_like(weight) for weight in weights]


def _gradients(grads: list[Tensor], weights: list[Tensor], *_: Any) -> list[Tensor]:
    return [_matrices.empty_like(weight) for weight in weights]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    weights, *ctx.call = inputs
    ctx.save_for_backward(*weights)


def _gradient(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    wanted = [i for i, needed in enumerate(ctx.needs_input_grad[0]) if needed]
    weights = ctx.saved_tensors
    found = backward([grads[i] for i in wanted], [weights[i] for i in wanted], *ctx.call)
    of_weights: list[Tensor | None] = [None] * len(weights)
    for i, grad in zip(wanted, found):
        of_weights[i] = grad
    return of_weights, None, None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    grads, weights, *ctx.call = inputs
    ctx.save_for_backward(*grads, *weights)


def _gradient_of_backward(ctx: Any, cotangents: list[Tensor]) -> tuple[Any, ...]:
    """Differentiate the reference twice. Where a graph is asked for, its own goes on, to any order."""
    steps, method, _backend = ctx.call
    saved = ctx.saved_tensors
    higher = torch.is_grad_enabled()
    found: list[Tensor] = []
    with torch.enable_grad():
        # Each an object of its own, with a partial derivative of its own, still in the caller's graph.
        own = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in saved]
        grads, weights = own[: len(cotangents)], own[len(cotangents) :]
        for grad, weight, cotangent in zip(grads, weights, cotangents):
            out = reference.orthogonalize(weight, steps, method)
            (first,) = torch.autograd.grad(out, weight, grad, create_graph=True)
            found += torch.autograd.grad(first, (grad, weight), cotangent, create_graph=higher, materialize_grads=True)
    return found[::2], found[1::2], None, None, None


_KERNELS = ("cpu", "cuda")

backward = register(
    "orthogonalize_backward",
    "(Tensor[] grads, Tensor[] weights, int? steps, str method, str backend) -> Tensor[]",
    outputs=_gradients,
    kernels=dict.fromkeys(_KERNELS, blas.backward),
    save=_save_backward,
    gradient=_gradient_of_backward,
)

forward = register(
    "orthogonalize",
    "(Tensor[] weights, int? steps, str method, str backend) -> Tensor[]",
    outputs=_outputs,
    kernels=dict.fromkeys(_KERNELS, blas.forward),
    save=_save,
    gradient=_gradient,
)
