"""Which polynomials of the Gram matrix a weight is multiplied by, one after the other.

A step is ``X <- (a I + b A + c A^2) X`` with ``A = X X^T``: every singular value s becomes ``a s + b s^3 + c s^5``.
"""

from __future__ import annotations

import torch

Step = tuple[float, float, float]

#: "Polar Express" (arXiv 2505.16932): each step is the best of its degree for what the ones before make of singular
#: values from 0.001 to 1. The five lift what is small by up to 990.
TUNED: tuple[Step, ...] = (
    (8.157, -22.483, 15.879),
    (4.043, -2.809, 0.500),
    (3.892, -2.772, 0.506),
    (3.286, -2.368, 0.464),
    (2.347, -1.710, 0.423),
)

#: Newton-Schulz of degree 5: near 1 an error e becomes 2.5 e^3.
QUINTIC: Step = (1.875, -1.25, 0.375)

#: Bjorck's step of degree 3: near 1 an error e becomes -1.5 e^2.
BJORCK: Step = (1.5, -0.5, 0.0)

METHODS = ("polar", "bjorck")

#: By how much the tuned steps want singular values below 1.
MARGIN = {"polar": 1.02, "bjorck": 1.0}

#: From this distance of the Gram matrix to the identity (in Frobenius norm) plain steps alone finish.
NEAR = 0.3


def fixed(method: str, steps: int) -> list[Step]:
    """As many steps as were asked for."""
    if method == "bjorck":
        return [BJORCK] * steps
    return [*TUNED[:steps], *[QUINTIC] * (steps - len(TUNED))]


def cycle(method: str) -> list[Step]:
    """Steps after which to look how far they got."""
    return [BJORCK] * 8 if method == "bjorck" else [*TUNED, QUINTIC, QUINTIC]


def most_cycles(method: str, dtype: torch.dtype) -> int:
    """As many as lift a singular value of eps, beside the largest, to 1: what is smaller is rounding error."""
    per_cycle = 25.0 if method == "bjorck" else 3400.0
    cycles, lifted = 1, per_cycle
    while lifted * torch.finfo(dtype).eps < 1:
        cycles, lifted = cycles + 1, lifted * per_cycle
    return cycles + 1  # and one for values that come near 1 to get there


def finish(method: str, distance: float, dtype: torch.dtype) -> list[Step] | None:
    """The plain steps that are left at a distance of the Gram matrix from the identity; None where it is too far."""
    if not distance < NEAR:
        return None
    steps: list[Step] = []
    while distance > torch.finfo(dtype).eps:
        steps.append(BJORCK if method == "bjorck" else QUINTIC)
        distance = 0.75 * distance**2 if method == "bjorck" else 0.625 * distance**3
    return steps
