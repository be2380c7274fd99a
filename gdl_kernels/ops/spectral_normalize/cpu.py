"""Launches the C++ kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _native
from ..._arguments import to_dtype
from .matrices import laid_out_like, matrix


def forward(
    outputs: tuple[list[Tensor], list[Tensor], list[Tensor], Tensor], weights: list[Tensor], us: list[Tensor],
    vs: list[Tensor], n_power_iterations: int, eps: float, semantics: str, backend: str,
) -> None:  # fmt: skip
    out, new_us, new_vs, sigmas = outputs
    wide = sigmas.dtype
    given, held = [], []
    for weight, u, v, y, new_u, new_v in zip(weights, us, vs, out, new_us, new_vs):
        m = matrix(weight)
        u, v = to_dtype(u, wide).contiguous(), m.to_memory(to_dtype(v, wide))
        v_there = new_v if m.order is None else torch.empty_like(v)
        tensors = m.tensor, y, u, v, new_u, v_there
        given.append((m.outer, m.rows, m.inner, *(t.data_ptr() for t in tensors)))
        held.append((m, tensors))
    dtype = str(weights[0].dtype).removeprefix("torch.")
    _native.cpu_module().spectral_normalize_forward(
        dtype, given, n_power_iterations, semantics == "biggan", eps, sigmas.data_ptr(), _threads(weights)
    )
    for (m, tensors), new_v in zip(held, new_vs):
        m.from_memory(tensors[-1], new_v)


def backward(
    grad_weights: list[Tensor], grads: list[Tensor], weights: list[Tensor], us: list[Tensor], vs: list[Tensor],
    sigmas: Tensor, backend: str,
) -> None:  # fmt: skip
    given, held = [], []
    for grad_weight, grad, weight, u, v in zip(grad_weights, grads, weights, us, vs):
        m = matrix(weight)
        tensors = laid_out_like(grad, grad_weight), m.tensor, grad_weight, u.contiguous(), m.to_memory(v)
        given.append((m.outer, m.rows, m.inner, *(t.data_ptr() for t in tensors)))
        held.append(tensors)
    dtype = str(weights[0].dtype).removeprefix("torch.")
    sigmas = sigmas.contiguous()
    _native.cpu_module().spectral_normalize_backward(dtype, given, sigmas.data_ptr(), _threads(weights))


def _threads(weights: list[Tensor]) -> int:
    return _native.threads(sum(w.numel() for w in weights))
