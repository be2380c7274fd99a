"""Orthogonalisation in plain PyTorch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from .schedule import MARGIN, Step, cycle, finish, fixed, most_cycles


def orthogonalize(weight: Tensor, steps: int | None, method: str) -> Tensor:
    matrix = weight.flatten(1)
    if matrix.numel() == 0:
        return weight.clone()
    high = matrix.shape[0] > matrix.shape[1]
    x = _orthogonal_rows(matrix.mT if high else matrix, steps, method)
    return (x.mT if high else x).reshape(weight.shape).to(weight.dtype)


def _orthogonal_rows(matrix: Tensor, steps: int | None, method: str) -> Tensor:
    x = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    # The largest element to 1: then no square leaves what a float holds. The result does not change with it.
    largest = x.detach().abs().max()
    x = x / torch.where(largest > 0, largest, 1)
    bound = (x @ x.mT).abs().sum(1).max()  # of the largest singular value's square
    x = x / (MARGIN[method] * torch.where(bound > 0, bound, 1).sqrt())
    if steps is not None:
        return _after(x, fixed(method, steps))
    identity = torch.eye(x.shape[0], dtype=x.dtype, device=x.device)
    for _ in range(most_cycles(method, x.dtype)):
        x = _after(x, cycle(method))
        left = finish(method, (x.detach() @ x.detach().mT - identity).norm().item(), x.dtype)
        if left is not None:
            return _after(x, left)
    return x


def _after(x: Tensor, steps: list[Step]) -> Tensor:
    for a, b, c in steps:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x
