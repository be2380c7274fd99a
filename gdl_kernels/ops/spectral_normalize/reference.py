"""Spectral normalisation in plain PyTorch: the specification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def spectral_normalize(
    weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor], n_power_iterations: int, eps: float,
    semantics: str,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:  # fmt: skip
    """The normalised weights, new us, new vs and sigmas."""
    each = [_normalize(*one, n_power_iterations, eps, semantics) for one in zip(weights, us, vs)]
    out, new_us, new_vs, sigmas = (list(column) for column in zip(*each))
    return out, new_us, new_vs, torch.stack(sigmas).detach()


def _normalize(
    weight: Tensor, u: Tensor, v: Tensor, n_power_iterations: int, eps: float, semantics: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    matrix = wide.flatten(1)
    with torch.no_grad():
        u, v = u.to(matrix.dtype, copy=True), v.to(matrix.dtype, copy=True)
        for _ in range(n_power_iterations):
            if semantics == "torch":
                u = F.normalize(matrix @ v, dim=0, eps=eps)
                v = F.normalize(matrix.T @ u, dim=0, eps=eps)
            else:
                v = F.normalize(matrix.T @ u, dim=0, eps=eps)
                u = F.normalize(matrix @ v, dim=0, eps=eps)
    sigma = u @ (matrix @ v)
    return (wide / sigma).to(weight.dtype), u, v, sigma
