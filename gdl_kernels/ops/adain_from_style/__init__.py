"""Adaptive instance normalisation with another image's statistics."""

from __future__ import annotations

from torch import Tensor

from ..._arguments import check_planes, check_positive
from . import op, reference


def adain_from_style(content: Tensor, style: Tensor, *, eps: float = 1e-5, backend: str | None = None) -> Tensor:
    """Give every plane of ``content`` the mean and deviation of that of ``style`` (arXiv 1703.06868, equation 8).

    ``y[n, c] = std(style[n, c]) (content[n, c] - mean(content[n, c])) / std(content[n, c]) + mean(style[n, c])`` with
    ``std = sqrt(var + eps)`` and the biased variance over the pixels of the plane.

    Args:
        content: ``(N, C, *spatial)``, floating point, any strides.
        style: ``(N, C, *spatial)`` in the dtype of ``content``; its spatial sizes are its own.
        eps: added to both variances; must be positive.
        backend: overrides the backend of this call.

    Returns:
        A tensor like ``content``, as :func:`adain` gives it. For its gradient it keeps both images and four numbers a
        plane. Twice differentiable by kernels in ``content`` and ``style``, and from the reference beyond; under
        ``torch.compile`` once.

    Raises:
        ValueError: if images or channels differ in number, a plane is empty, or ``eps`` is not positive and finite.
        TypeError: if a tensor is not floating point, or the dtypes differ.
        RuntimeError: if ``backend`` was given and can't serve the call.
    """
    chosen = _serving(backend, content, style, eps)
    if chosen == "reference":
        return reference.adain_from_style(content, style, eps)
    return op.forward(content, style, eps, chosen)[0]


@op.choices.serving
def _serving(backend: str | None, content: Tensor, style: Tensor, eps: float) -> str:
    check_planes("content", content)
    check_planes("style", style)
    if style.dtype != content.dtype:
        raise TypeError(f"style must have the dtype of content, {content.dtype}, got {style.dtype}")
    if style.shape[:2] != content.shape[:2]:
        raise ValueError(
            f"style must have the images and channels of content, {tuple(content.shape[:2])}, "
            f"got {tuple(style.shape[:2])}"
        )
    if style.device != content.device:
        raise ValueError(f"style must be on the device of content, {content.device}, got {style.device}")
    check_positive("eps", eps)
    return op.choices.pick(content.device, backend, content, style, eps=eps)
