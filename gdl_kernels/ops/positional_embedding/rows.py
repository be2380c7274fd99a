"""Matrices as the kernels read them."""

from __future__ import annotations

from torch import Tensor


def contiguous_rows(matrix: Tensor) -> Tensor:
    """The matrix itself where its rows are contiguous, whatever lies between them; else a copy."""
    return matrix if matrix.stride()[1] == 1 or matrix.shape[1] == 1 else matrix.contiguous()
