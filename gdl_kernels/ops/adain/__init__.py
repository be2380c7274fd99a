"""Adaptive instance normalisation."""

from __future__ import annotations

from torch import Tensor

from ..._arguments import check_parameter, check_planes, check_positive
from . import op, reference


def adain(x: Tensor, scale: Tensor, bias: Tensor, *, eps: float = 1e-5, backend: str | None = None) -> Tensor:
    """Normalise every plane, then give it a mean and a deviation (arXiv 1703.06868, equation 8).

    ``y[n, c] = scale[n, c] (x[n, c] - mean) / sqrt(var + eps) + bias[n, c]`` with the mean and the biased variance of
    ``x[n, c]`` over its pixels.

    Args:
        x: ``(N, C, *spatial)``, floating point, any strides.
        scale, bias: ``(N, C)``, in the dtype of ``x`` or another that is no wider than the sums.
        eps: added to the variance; must be positive.
        backend: overrides the backend of this call.

    Returns:
        A tensor like ``x``, contiguous or, where ``x`` is, channels last. Autocast leaves its dtype alone.
        Sums are kept in float32, in float64 for float64, and don't cancel where the mean is large beside the deviation.
        What is not finite stays in its plane. For its gradient it keeps ``x`` and two numbers a plane.
        Twice differentiable by kernels, and from the reference beyond; under ``torch.compile`` once.

    Raises:
        ValueError: if shapes don't fit, a plane is empty, or ``eps`` is not positive and finite.
        TypeError: if a tensor is not floating point, or ``scale`` or ``bias`` is wider than the sums.
        RuntimeError: if ``backend`` was given and can't serve the call.
    """
    chosen = _serving(backend, x, scale, bias, eps)
    if chosen == "reference":
        return reference.adain(x, scale, bias, eps)
    return op.forward(x, *op.parameters(x, chosen, scale, bias), None, None, None, None, 1.0, eps, chosen)[0]


@op.choices.serving
def _serving(backend: str | None, x: Tensor, scale: Tensor, bias: Tensor, eps: float) -> str:
    check_planes("x", x)
    planes = [x.shape[:2]]
    check_parameter("scale", scale, planes, x)
    check_parameter("bias", bias, planes, x)
    check_positive("eps", eps)
    return op.choices.pick(x.device, backend, x, scale, bias, eps=eps)
