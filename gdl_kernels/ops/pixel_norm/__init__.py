"""Pixelwise feature vector normalisation."""

from __future__ import annotations

from torch import Tensor

from ..._arguments import check_floating, check_positive
from . import op, reference


def pixel_norm(x: Tensor, *, eps: float = 1e-8, backend: str | None = None) -> Tensor:
    """Scale every pixel's feature vector to unit root mean square (ProGAN, arXiv 1710.10196, section 4.2).

    ``y[n, c, h, w] = x[n, c, h, w] / sqrt(mean_c(x[n, c, h, w] ** 2) + eps)``

    Args:
        x: ``(N, C, *spatial)``, floating point, any strides.
        eps: added under the root; must be positive.
        backend: overrides the backend of this call.

    Returns:
        A tensor like ``x``, contiguous or, where ``x`` is, channels last. Autocast leaves its dtype alone.
        Accumulates in float32, in float64 for float64. Differentiable without limit, under ``torch.compile`` once.

    Raises:
        ValueError: if ``x`` has fewer than two dimensions, or ``eps`` is not positive and finite.
        TypeError: if ``x`` is not floating point.
        RuntimeError: if ``backend`` was given and can't serve the call.
    """
    chosen = _serving(backend, x, eps)
    if chosen == "reference":
        return reference.pixel_norm(x, eps)
    return op.forward(x, eps, chosen)


@op.choices.serving
def _serving(backend: str | None, x: Tensor, eps: float) -> str:
    check_floating("x", x)
    if x.dim() < 2:
        raise ValueError(f"x must be (N, C, *spatial), got shape {tuple(x.shape)}")
    check_positive("eps", eps)
    return op.choices.pick(x.device, backend, x, eps=eps)
