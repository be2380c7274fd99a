"""Orthogonalisation of weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from torch import Tensor

from ..._matrices import check_weights, listed
from . import op, reference
from .schedule import METHODS


def orthogonalize(
    weights: Iterable[Tensor],
    *,
    steps: int | None = None,
    method: Literal["polar", "bjorck"] = "polar",
    backend: str | None = None,
) -> list[Tensor]:
    """For each weight the nearest matrix whose rows, or columns where these are fewer, are orthonormal.

    With ``W = U S V^T`` that is ``U V^T``, the orthogonal factor of the polar decomposition, ``W`` being the weight as
    an ``(out, prod(rest))`` matrix. It is found by products alone. ``X`` is ``W``, turned to be at least as wide as
    high, divided by a bound of its largest singular value: the root of the largest row sum of ``|W W^T|``. Then, again
    and again,

    - ``method="polar"``: ``X <- (a I + b X X^T + c (X X^T)^2) X``, five times with coefficients that lift small
      singular values fastest ("Polar Express", arXiv 2505.16932), with 2 % kept between X and the bound; from then on
      with ``(15, -10, 3) / 8``;
    - ``method="bjorck"``: ``X <- (3/2 I - 1/2 X X^T) X``, which lifts the smallest by half at a time.

    Args:
        weights: tensors ``(out, *rest)`` of one dtype on one device, of two dimensions or more, any strides.
        steps: how many. ``None``: until ``||X X^T - I||_F`` is rounding error. Five steps of ``"polar"`` bring singular
            values from 0.001 to 1 times the bound to between 0.7 and 1.2, which is enough for many uses.
        method: which iteration.
        backend: overrides the backend of this call.

    Returns:
        A list of tensors like the weights. Computed in float32, in float64 for float64, and rounded once.
        Differentiable without limit, under ``torch.compile`` once; nothing but the weights is kept for the gradient.

    Raises:
        ValueError: if ``weights`` is empty, a weight has fewer than two dimensions or is on another device than the
            first, ``steps`` is not positive or ``method`` unknown. On the CPU, also if a weight is not finite.
        TypeError: if ``weights`` is no sequence of floating-point tensors of one dtype, or ``steps`` no integer.
        RuntimeError: if ``backend`` was given and can't serve the call.

    A zero matrix stays zero. Where a weight has no full rank no matrix is the nearest: directions that it lacks, or has
    at less than some units in the last place of its largest singular value, come out with singular values from 0 to 1.

    With ``steps=None`` a GPU is waited for, twice or more for each group of matrices; a number of steps is for CUDA
    graphs.
    """
    weights = listed(weights)
    chosen = _serving(backend, weights, steps, method)
    if chosen == "reference":
        return [reference.orthogonalize(weight, steps, method) for weight in weights]
    return op.forward(weights, steps, method, chosen)


@op.choices.serving
def _serving(backend: str | None, weights: Sequence[Tensor], steps: int | None, method: str) -> str:
    check_weights(weights, op.DTYPES)
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool)):
        raise TypeError(f"steps must be an integer or None, got {type(steps).__name__}")
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be positive, got {steps}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    return op.choices.pick(weights[0].device, backend, weights, steps=steps, method=method)
