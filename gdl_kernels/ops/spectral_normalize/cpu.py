"""Launches the C++ kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ... import _native


def forward(
    outputs: tuple[list[Tensor], Tensor], weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor],
    n_power_iterations: int, eps: float, semantics: str, _backend: str,
) -> None:  # fmt: skip
    _native.cpu_module().spectral_normalize_forward(
        *outputs, weights, us, vs, n_power_iterations, semantics == "biggan", eps, torch.get_num_threads()
    )


def backward(
    grad_weights: list[Tensor], grads: list[Tensor], weights: list[Tensor], vectors: Tensor, _backend: str
) -> None:
    _native.cpu_module().spectral_normalize_backward(grad_weights, grads, weights, vectors, torch.get_num_threads())


def first_not_finite(vectors: Tensor, count: int) -> int | None:
    """Which of the first ``count`` numbers, the sigmas, is the first that is infinite or NaN."""
    return _native.cpu_module().spectral_normalize_first_not_finite(vectors, count)


def replace(us: Sequence[Tensor], vs: Sequence[Tensor], vectors: Tensor) -> None:
    """Write the new vectors to the given ones, in place."""
    increment_version([*us, *vs])
    _native.cpu_module().spectral_normalize_replace(us, vs, vectors)
