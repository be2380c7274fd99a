"""What the power method finds of a list of weights, in one tensor: to allocate one costs as much as a small kernel.

Sigmas, then the left vectors u, then the right vectors v of all weights, one after the other, in what sums are kept in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..._arguments import sum_dtype


def empty(weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor]) -> Tensor:
    """Memory for them; ``us`` and ``vs`` are as long as theirs will be."""
    length = len(weights) + sum(map(Tensor.numel, us)) + sum(map(Tensor.numel, vs))
    return weights[0].new_empty(length, dtype=sum_dtype(weights[0]))


def parts(vectors: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Sigmas, us and vs: views."""
    count = len(weights)
    rows, columns = [w.shape[0] for w in weights], [math.prod(w.shape[1:]) for w in weights]
    sigmas, *each = vectors.split([count, *rows, *columns])
    return sigmas, each[:count], each[count:]


def of_some(vectors: Tensor, weights: Sequence[Tensor], chosen: Sequence[int]) -> Tensor:
    """Those of ``chosen`` weights alone."""
    sigmas, us, vs = parts(vectors, weights)
    return torch.cat([sigmas[i : i + 1] for i in chosen] + [side[i] for side in (us, vs) for i in chosen])
