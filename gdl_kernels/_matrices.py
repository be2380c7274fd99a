"""Lists of weights as matrices that are computed together.

A weight ``(out, *rest)`` is the matrix ``(out, prod(rest))``. Matrices are turned so that they are at least as wide as
high: then the smaller of the two Gram matrices is that of the rows. Small ones are stacked, those of nearly the same
shape padded with zeros, and go through one batched product; large ones fill the machine by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Matrices of more elements are not copied into a stack: their products keep all cores busy without.
STACKED = 2**18

#: Matrices of at most so many elements are padded to powers of two, so that more of them share a stack.
PADDED = 2**13

#: Symmetric products of more rows are taken apart, down to squares of so many on the diagonal. Two threads of an AMD
#: EPYC, AVX2, float32, times as fast as the full product: 384 x 3456 1.40, 768 x 6912 1.55, 1536 x 13824 1.70.
UNDIVIDED = 96

#: Those of fewer rows are left whole: the products that they would be taken apart into are too small to gain by it.
DIVIDED = 384


def _memory_order(weight: Tensor) -> list[int]:
    """The dimensions after the first, from the farthest apart in memory to the nearest."""
    return sorted(range(1, weight.dim()), key=lambda d: weight.stride(d), reverse=True)


def empty_like(weight: Tensor) -> Tensor:
    """Memory for an output like ``weight``: dense, its dimensions after the first in the order in which they lie."""
    if weight.is_contiguous():
        return torch.empty_like(weight)
    strides, step = [1] * weight.dim(), 1
    for d in [*reversed(_memory_order(weight)), 0]:
        strides[d], step = step, step * weight.shape[d]
    return weight.new_empty_strided(weight.shape, strides)  # no view, which nobody could change in place


def flattened(weight: Tensor, like: Tensor | None = None) -> Tensor:
    """The matrix of a weight, its columns in the order in which they lie in memory: channels last needs no copy.

    None of what is computed here depends on the order of columns, as long as what belongs together has the same:
    ``like`` is the weight whose order is taken. For what :func:`empty_like` returned for ``like`` this is a view.
    """
    order = _memory_order(weight if like is None else like)
    return weight.permute(0, *order).reshape(weight.shape[0], math.prod(weight.shape[1:]))


@dataclass(frozen=True)
class Group:
    """Matrices of a list that are computed together.

    Attributes:
        indices: where they are in the list.
        shape: rows and columns that they are padded to.
        padded: whether any is smaller.
    """

    indices: list[int]
    shape: tuple[int, int]
    padded: bool

    def load(self, matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """``(rows, columns)`` for a single matrix, itself where its dtype allows; else ``(count, rows, columns)``."""
        if len(self.indices) == 1 and not self.padded:
            return matrices[self.indices[0]].to(dtype)
        if not self.padded:
            return torch.stack([matrices[i] for i in self.indices]).to(dtype)
        stack = torch.zeros(len(self.indices), *self.shape, dtype=dtype, device=matrices[0].device)
        for place, i in zip(stack, self.indices):
            rows, columns = matrices[i].shape
            place[:rows, :columns] = matrices[i]
        return stack

    def store(self, values: Tensor, matrices: Sequence[Tensor]) -> None:
        """Write what was computed for each into its own of ``matrices``, without what was padded."""
        for value, i in zip(values if values.dim() == 3 else values[None], self.indices):
            rows, columns = matrices[i].shape
            matrices[i].copy_(value[:rows, :columns])


def groups(matrices: Sequence[Tensor], keys: Sequence[Hashable] | None = None) -> list[Group]:
    """Sort matrices into groups. Those of different keys stay apart, and those without elements are left out."""
    found: dict[Hashable, list[int]] = {}
    for i, matrix in enumerate(matrices):
        if matrix.numel() == 0:
            continue
        shape = rows, columns = tuple(matrix.shape)
        if matrix.numel() <= PADDED:
            shape = _power_of_two(rows), _power_of_two(columns)
        alone = i if matrix.numel() > STACKED else -1
        found.setdefault((shape, alone, None if keys is None else keys[i]), []).append(i)
    result = []
    for indices in found.values():
        rows, columns = (max(matrices[i].shape[d] for i in indices) for d in (0, 1))
        padded = any(tuple(matrices[i].shape) != (rows, columns) for i in indices)
        result.append(Group(indices, (rows, columns), padded))
    return result


def _power_of_two(size: int) -> int:
    return 2 ** math.ceil(math.log2(size))


def symmetric_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` where that is known to be symmetric: the upper half of a large one is copied from the lower."""
    rows = left.shape[-2]
    if left.dim() != 2 or rows < DIVIDED or left.device.type != "cpu":
        return left @ right
    product = left.new_empty(rows, rows)
    _fill_symmetric(product, left, right)
    return product


def _fill_symmetric(product: Tensor, left: Tensor, right: Tensor) -> None:
    rows = left.shape[0]
    if rows <= UNDIVIDED:
        torch.mm(left, right, out=product)
        return
    half = math.ceil(rows / 16) * 8
    above, below = slice(half), slice(half, rows)
    _fill_symmetric(product[above, above], left[above], right[:, above])
    _fill_symmetric(product[below, below], left[below], right[:, below])
    torch.mm(left[below], right[:, above], out=product[below, above])
    product[above, below] = product[below, above].T


def name_not_finite(weights: Sequence[Tensor], indices: Sequence[int]) -> None:
    """Raise for the first of some weights that is not finite, if one is."""
    for i in indices:
        if not weights[i].isfinite().all():
            raise ValueError(
                f"weights[{i}] must be finite, got infinite values or NaN in its {tuple(weights[i].shape)}"
            )


def listed(weights: object) -> Sequence[Any]:
    """What an op was given for its weights, to be looked at more than once.

    Raises:
        TypeError: if it is no sequence of anything.
    """
    if isinstance(weights, (list, tuple)):
        return weights
    if isinstance(weights, Tensor) or not isinstance(weights, Iterable):
        raise TypeError(f"weights must be a sequence of tensors, got {type(weights).__name__}")
    return list(weights)


def check_weights(weights: Sequence[Any], dtypes: Sequence[torch.dtype]) -> None:
    """Check the list of weights that an op was given.

    Raises:
        TypeError: if they are not floating-point tensors of one dtype.
        ValueError: if there are none, or one has fewer than two dimensions, or is on another device than the first.
    """
    if not weights:
        raise ValueError("weights must hold at least one tensor, got none")
    for i, weight in enumerate(weights):
        if not isinstance(weight, Tensor):
            raise TypeError(f"weights[{i}] must be a tensor, got {type(weight).__name__}")
        if weight.dtype not in dtypes:
            raise TypeError(f"weights[{i}] must be float32, float16, bfloat16 or float64, got {weight.dtype}")
        if weight.dim() < 2:
            raise ValueError(f"weights[{i}] must have two dimensions or more, got shape {tuple(weight.shape)}")
        if weight.dtype != weights[0].dtype:
            raise TypeError(f"weights[{i}] must have the dtype of weights[0], {weights[0].dtype}, got {weight.dtype}")
        if weight.device != weights[0].device:
            raise ValueError(
                f"weights[{i}] must be on the device of weights[0], {weights[0].device}, got {weight.device}"
            )
