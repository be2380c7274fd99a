"""Orthogonal regularisation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..._matrices import check_weights, listed
from . import op, reference


def orthogonal_regularization(
    weights: Iterable[Tensor],
    *,
    beta: float = 1e-4,
    gram: Literal["columns", "rows"] = "columns",
    backend: str | None = None,
) -> Tensor:
    """The penalty that keeps vectors of a weight at right angles and lets their lengths be (BigGAN, arXiv 1809.11096).

    ``beta * sum over W of ||G o (1 - I)||_F^2`` with ``W`` the weight as an ``(out, prod(rest))`` matrix and

    - ``G = W^T W`` for ``gram="columns"``, the formula as the paper prints it: between inputs of a layer;
    - ``G = W W^T`` for ``gram="rows"``: between filters, as the paper's text says, whose filters are columns.

    The gradient is the true one: ``4 beta W (W^T W o (1 - I))``, ``4 beta (W W^T o (1 - I)) W``. The smaller of the two
    Gram matrices serves both, by ``||W^T W o (1 - I)||^2 = ||W W^T||^2 - sum over columns of |w_j|^4``: a weight of
    ``m x n`` takes ``min(m, n)^2 max(m, n)`` multiplications, three times that with its gradient.

    Args:
        weights: tensors ``(out, *rest)`` of one dtype on one device, of two dimensions or more, any strides.
        beta: the penalty's weight.
        gram: which vectors of ``W`` are to be orthogonal. For a transposed convolution, ``(in, out, *kernel)``, the
            filters' are the columns, one for each place in the kernel.
        backend: overrides the backend of this call.

    Returns:
        A scalar; float32, or float64 for float64. Accumulates in that dtype. Differentiable without limit, under
        ``torch.compile`` once. Where a gradient will be asked for, the smaller Gram matrix of each weight is kept for
        it, on the GPU its lower half.

    Raises:
        ValueError: if ``weights`` is empty, a weight has fewer than two dimensions or is on another device than the
            first, or ``beta`` or ``gram`` is out of its range. On the CPU, also if a weight is not finite.
        TypeError: if ``weights`` is no sequence of floating-point tensors of one dtype.
        RuntimeError: if ``backend`` was given and can't serve the call.

    On the side of the larger Gram matrix the penalty is a difference. On the CPU it is computed in float64 where it
    cancels; otherwise its error is some units in the last place of ``beta ||G||_F^2`` with the diagonal.
    """
    weights = listed(weights)
    chosen = _serving(backend, weights, beta, gram)
    columns = gram == "columns"
    if chosen == "reference":
        return reference.orthogonal_regularization(weights, beta, columns)
    keep = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
    return op.forward(weights, beta, columns, keep, chosen)[0]


@op.choices.serving
def _serving(backend: str | None, weights: Sequence[Tensor], beta: float, gram: str) -> str:
    check_weights(weights, op.DTYPES)
    if not isinstance(beta, (int, float)):
        raise TypeError(f"beta must be a number, got {type(beta).__name__}")
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta must be finite and not negative, got {beta}")
    if gram not in ("columns", "rows"):
        raise ValueError(f"gram must be 'columns' or 'rows', got {gram!r}")
    return op.choices.pick(weights[0].device, backend, weights, beta=beta, gram=gram)
