"""Weights as the kernels read them: matrices (rows, outer * inner) that lie in memory as [outer][rows][inner].

A contiguous weight has an ``outer`` of 1. Every dense weight, its dimensions in memory in any order, has this form: the
dimensions before the rows are ``outer``, those after them ``inner``. Where that permutes the columns, v is permuted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Matrix(NamedTuple):
    """A dense weight.

    Attributes:
        order: the dimensions of a row, counted from 0, as they lie in memory; None where that is their own order.
    """

    tensor: Tensor
    outer: int
    rows: int
    inner: int
    order: tuple[int, ...] | None

    def to_memory(self, v: Tensor) -> Tensor:
        """A vector of columns, in the order in which they lie."""
        if self.order is None:
            return v.contiguous()
        return v.view(self.tensor.shape[1:]).permute(self.order).reshape(-1)

    def from_memory(self, v: Tensor, out: Tensor) -> None:
        if self.order is not None:
            sizes = [self.tensor.shape[1 + d] for d in self.order]
            out.view(self.tensor.shape[1:]).permute(self.order).copy_(v.view(sizes))


def matrix(weight: Tensor) -> Matrix:
    """The weight itself where it is dense, else a copy with the strides of ``torch.empty_like``."""
    rows, *rest = weight.shape
    columns = math.prod(rest)
    if weight.is_contiguous():
        return Matrix(weight, 1, rows, columns, None)
    # From the outermost in. Where one of size 1 comes makes no difference.
    dimensions = sorted(range(weight.dim()), key=lambda d: -weight.stride()[d])
    if not _is_dense(weight, dimensions):
        return matrix(torch.empty_like(weight).copy_(weight))
    rows_at = dimensions.index(0)
    order = tuple(d - 1 for d in dimensions if d != 0)
    inner = math.prod(weight.shape[d] for d in dimensions[rows_at + 1 :])
    return Matrix(weight, columns // inner, rows, inner, None if list(order) == sorted(order) else order)


def laid_out_like(x: Tensor, like: Tensor) -> Tensor:
    """``x``, in memory as the dense ``like`` is."""
    mine, its = x.stride(), like.stride()
    if mine == its or all(size == 1 or a == b for size, a, b in zip(x.shape, mine, its)):
        return x
    return torch.empty_like(like).copy_(x)


def _is_dense(weight: Tensor, dimensions: Sequence[int]) -> bool:
    size = 1
    for d in reversed(dimensions):
        if weight.shape[d] != 1 and weight.stride(d) != size:
            return False
        size *= weight.shape[d]
    return True
