"""Orthogonal regularisation in plain PyTorch: the specification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def orthogonal_regularization(weights: Sequence[Tensor], beta: float, columns: bool) -> Tensor:
    dtype = torch.promote_types(weights[0].dtype, torch.float32)
    total = torch.zeros((), dtype=dtype, device=weights[0].device)
    for weight in weights:
        matrix = weight.flatten(1).to(dtype)
        gram = matrix.mT @ matrix if columns else matrix @ matrix.mT
        total = total + (gram - gram.diagonal().diag()).square().sum()
    return beta * total
