"""Runs on the matrix products that PyTorch carries: the smaller Gram matrix, half of its tiles, then one product.

``V`` is a weight turned so that it is at least as wide as high, ``G = V V^T`` its smaller Gram matrix. Where the
penalty is asked of G, it is the sum of squares off the diagonal. Where it is asked of ``V^T V``, it is
``||G||^2 - ||c||^2`` with ``c_j = |v_j|^2`` for the columns of V: the sum of squares of both Gram matrices is the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ... import _matrices
from ..._arguments import sum_dtype
from ..._matrices import Group, symmetric_product

#: Where the difference is a smaller share of what is subtracted, too few of float32's digits are left.
CANCELS = 0.5

#: Rows that are squared at a time.
BAND = 64


def orientation(rows: int, columns: int, of_columns: bool) -> tuple[bool, bool]:
    """Whether a matrix is turned to be V, and whether the penalty is then asked of the rows of V."""
    if rows > columns or (rows == columns and of_columns):
        return True, of_columns
    return False, not of_columns


def turned(weight: Tensor, columns: bool, like: Tensor | None = None) -> tuple[Tensor, bool]:
    """V, and whether the penalty is asked of its rows."""
    matrix = _matrices.flattened(weight, like)
    turn, of_rows = orientation(matrix.shape[0], matrix.shape[1], columns)
    return matrix.mT if turn else matrix, of_rows


def forward(
    outputs: tuple[Tensor, list[Tensor]], weights: list[Tensor], beta: float, columns: bool, keep: bool, backend: str
) -> None:
    """Fill the penalty and, where they are kept, the Gram matrices, those that are asked for without their diagonal."""
    penalty, kept = outputs
    total = 0.0
    for group, values, of_rows in _stacks(weights, columns):
        gram = symmetric_product(values, values.mT)
        if of_rows:
            gram.diagonal(dim1=-2, dim2=-1).zero_()
            value: float | None = gram.square().sum().item()
        else:
            value = _difference(gram, _squared_norms(values)[1])
            if value is None:
                wide = values.double()
                value = _difference(symmetric_product(wide, wide.mT), _squared_norms(wide)[1])
        assert value is not None  # in float64
        if not value < torch.inf:
            _matrices.name_not_finite(weights, group.indices)
        total += value
        if keep:
            group.store(gram, kept)
    penalty.fill_(beta * total)


def backward(
    grads: list[Tensor],
    grad: Tensor,
    weights: list[Tensor],
    kept: list[Tensor],
    beta: float,
    columns: bool,
    backend: str,
) -> None:
    scale = 4 * beta * grad.item()
    outputs = [turned(g, columns, weight)[0] for g, weight in zip(grads, weights)]
    for group, values, of_rows in _stacks(weights, columns):
        gram = group.load(kept, values.dtype) if not group.padded else _padded(group, kept)
        norms = None
        if not of_rows:
            norms = _squared_norms(values)
            if _difference(gram, norms[1]) is None:
                values = values.double()
                gram, norms = symmetric_product(values, values.mT), _squared_norms(values)
        alone = outputs[group.indices[0]]
        in_place = values.dim() == 2 and alone.dtype == values.dtype
        out = alone if in_place else torch.empty_like(values)
        _product(out, gram, values, norms, scale)
        if not in_place:
            group.store(out, outputs)


def _stacks(weights: Sequence[Tensor], columns: bool) -> Iterator[tuple[Group, Tensor, bool]]:
    """Each group, its V, and whether the penalty is asked of the rows of V."""
    dtype = sum_dtype(weights[0])
    matrices, of_rows = zip(*(turned(weight, columns) for weight in weights))
    for group in _matrices.groups(matrices, of_rows):
        yield group, group.load(matrices, dtype), of_rows[group.indices[0]]


def _padded(group: Group, kept: Sequence[Tensor]) -> Tensor:
    return Group(group.indices, (group.shape[0], group.shape[0]), True).load(kept, kept[0].dtype)


def _squared_norms(values: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows, ``[..., rows, 1]``, and columns, ``[..., 1, columns]``. In bands: their squares stay in the cache."""
    of_rows, of_columns = [], []
    for band in values.split(BAND, -2):
        squares = band.square()
        of_rows.append(squares.sum(-1, keepdim=True))
        of_columns.append(squares.sum(-2, keepdim=True))
    return torch.cat(of_rows, -2), torch.cat(of_columns, -2).sum(-2, keepdim=True)


def _difference(gram: Tensor, norms: Tensor) -> float | None:
    """The penalty of the larger Gram matrix, or None where float32 has too few digits, or too small ones, for it.

    A stack of matrices may have one that cancels among others that do not: the worst decides.
    """
    subtracted = norms.square().sum((-2, -1))
    difference = gram.square().sum((-2, -1)) - subtracted
    if gram.dtype == torch.float32 and not ((difference >= CANCELS * subtracted) & difference.isfinite()).all():
        return None
    return difference.clamp(min=0).sum().item()


def _product(out: Tensor, gram: Tensor, values: Tensor, norms: tuple[Tensor, Tensor] | None, scale: float) -> None:
    """``out = scale * (gram @ values)``, less ``scale * values * norms of columns`` where norms are given."""
    product = torch.addmm if out.dim() == 2 else torch.baddbmm
    if norms is None:
        product(out, gram, values, beta=0, alpha=scale, out=out)
        return
    # The diagonal of G, the norms of rows, is by far its largest part. Its product is put together with what is
    # subtracted, and not into a sum whose other terms are small.
    of_rows, of_columns = norms
    torch.sub(of_rows, of_columns, out=out).mul_(values).mul_(scale)
    gram = gram.clone()
    gram.diagonal(dim1=-2, dim2=-1).zero_()
    product(out, gram, values, alpha=scale, out=out)
