"""Minibatch standard deviation."""

from __future__ import annotations

import math

from torch import Tensor

from ..._arguments import check_floating, check_positive
from . import op, reference


def minibatch_stddev(
    x: Tensor, *, group_size: int = 4, num_features: int = 1, eps: float = 1e-8, backend: str | None = None
) -> Tensor:
    """Append channels that tell how much the samples of a minibatch differ (ProGAN, arXiv 1710.10196, section 3).

    With ``G = min(group_size, N)``, ``M = N / G``, ``F = num_features`` and ``x`` seen as
    ``[G, M, F, C / F, *spatial]``:

    ``y[g M + m, C + f, h, w] = mean_{k, i, j}(sqrt(var_g(x[g, m, f, k, i, j]) + eps))``, with the biased variance

    and the first ``C`` channels of ``y`` are ``x``. So the members of group ``m`` are the samples ``m``, ``M + m``,
    ``2 M + m`` ..., as in ProGAN's published code.

    Args:
        x: ``(N, C, *spatial)``, floating point, any strides.
        group_size: samples in a group. A smaller batch is one group; a larger one must be a multiple of it.
        num_features: channels to append, each of its own ``C / num_features`` neighbouring channels of ``x``.
        eps: added under the root; must be positive.
        backend: overrides the backend of this call.

    Returns:
        ``(N, C + num_features, *spatial)`` in ``x``'s dtype, contiguous or, where ``x`` is, channels last. Autocast
        leaves its dtype alone. Accumulates in float32, in float64 for float64. Differentiable without limit, under
        ``torch.compile`` once.

    Raises:
        ValueError: if ``x`` has fewer than two dimensions, no channel or no pixel; if the group size does not divide
            the batch, with one that does in the message; if ``num_features`` does not divide the channels; or if
            ``eps`` is not positive and finite.
        TypeError: if ``x`` is not floating point, or ``group_size`` or ``num_features`` is not an integer.
        RuntimeError: if ``backend`` was given and can't serve the call.
    """
    chosen = _serving(backend, x, group_size, num_features, eps)
    if chosen == "reference":
        return reference.minibatch_stddev(x, group_size, num_features, eps)
    return op.forward(x, group_size, num_features, eps, chosen)


@op.choices.serving
def _serving(backend: str | None, x: Tensor, group_size: int, num_features: int, eps: float) -> str:
    check_floating("x", x)
    if x.dim() < 2:
        raise ValueError(f"x must be (N, C, *spatial), got shape {tuple(x.shape)}")
    if x.numel() == 0 and math.prod(x.shape[1:]) == 0:
        raise ValueError(f"x must have a channel and a pixel at least, got shape {tuple(x.shape)}")
    for name, value in (("group_size", group_size), ("num_features", num_features)):
        if not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    batch, channels, *_ = x.shape
    if batch > group_size and batch % group_size:
        fits = next(size for size in range(group_size, 0, -1) if batch % size == 0)
        raise ValueError(
            f"group_size must divide the batch of {batch} samples, got {group_size}: of the sizes up to that, "
            f"{fits} is the largest that fits"
        )
    if channels % num_features:
        raise ValueError(f"num_features must divide x's {channels} channels, got {num_features}")
    check_positive("eps", eps)
    return op.choices.pick(x.device, backend, x, group_size=group_size, num_features=num_features, eps=eps)
