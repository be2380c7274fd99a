"""StyleGAN's epilogue of a layer: noise, bias, leaky ReLU and adaptive instance normalisation."""

from __future__ import annotations

from torch import Tensor

from ..._arguments import check_finite, check_parameter, check_planes, check_positive
from ..._philox import draw_seed
from . import op, reference


def style_epilogue(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    noise: Tensor | None = None,
    noise_weight: Tensor | None = None,
    channel_bias: Tensor | None = None,
    negative_slope: float = 0.2,
    eps: float = 1e-8,
    backend: str | None = None,
) -> Tensor:
    """What follows a convolution of StyleGAN's generator, in one pass (arXiv 1812.04948, section 2 and its code).

    ``u = x + noise_weight[c] noise[n] + channel_bias[c]``, ``h = u if u > 0 else negative_slope u``, and
    ``y = scale[n, c] (h - mean) / sqrt(var + eps) + bias[n, c]`` with the mean and the biased variance of ``h`` over
    the pixels of each plane, as :func:`adain` has it. StyleGAN's style gives ``scale - 1`` and ``bias``.

    Args:
        x: ``(N, C, *spatial)``, floating point, any strides.
        scale, bias: ``(N, C)``, in the dtype of ``x`` or another that is no wider than the sums.
        noise: ``(N, 1, *spatial)``, or ``(1, 1, *spatial)`` for the same in every image. Without it, and with
            ``noise_weight``, standard normal noise is drawn, anew at every call: from a counter and a seed of torch's
            generator of the CPU, so that after one ``torch.manual_seed`` all backends draw the same, to rounding.
        noise_weight: ``(C,)``; without it there is no noise.
        channel_bias: ``(C,)``.
        negative_slope: 0.2 in StyleGAN; 1 leaves ``u`` as it is.
        eps: added to the variance; must be positive.
        backend: overrides the backend of this call.

    Returns:
        A tensor like ``x``, contiguous or, where ``x`` is, channels last. Autocast leaves its dtype alone.
        Sums are kept in float32, in float64 for float64, and don't cancel where the mean is large beside the deviation.
        What is not finite stays in its plane. For its gradient it keeps ``x`` and two numbers a plane; drawn noise is
        drawn again. Twice differentiable by kernels, in everything but ``seed``, and from the reference beyond; under
        ``torch.compile`` once.

    Raises:
        ValueError: if shapes don't fit, a plane is empty, ``noise`` comes without ``noise_weight``, or ``eps`` is not
            positive and finite.
        TypeError: if a tensor is not floating point, or wider than the sums.
        RuntimeError: if ``backend`` was given and can't serve the call.
    """
    chosen = _serving(backend, x, scale, bias, noise, noise_weight, channel_bias, negative_slope, eps)
    seed = draw_seed(x.device) if noise is None and noise_weight is not None else None
    if chosen == "reference":
        if seed is not None:
            noise = reference.drawn_noise(seed, x)
        return reference.style_epilogue(x, scale, bias, noise, noise_weight, channel_bias, negative_slope, eps)
    given = op.parameters(x, chosen, scale, bias, noise, noise_weight, channel_bias)
    return op.forward(x, *given[:3], seed, *given[3:], negative_slope, eps, chosen)[0]


@op.choices.serving
def _serving(
    backend: str | None, x: Tensor, scale: Tensor, bias: Tensor, noise: Tensor | None, noise_weight: Tensor | None,
    channel_bias: Tensor | None, negative_slope: float, eps: float,
) -> str:  # fmt: skip
    check_planes("x", x)
    images, channels, *pixels = x.shape
    planes, per_channel = [(images, channels)], [(channels,)]
    check_parameter("scale", scale, planes, x)
    check_parameter("bias", bias, planes, x)
    if noise is not None:
        check_parameter("noise", noise, [(images, 1, *pixels), (1, 1, *pixels)], x)
        if noise_weight is None:
            raise ValueError("noise needs noise_weight, the weight of every channel, got None")
    for name, parameter in (("noise_weight", noise_weight), ("channel_bias", channel_bias)):
        if parameter is not None:
            check_parameter(name, parameter, per_channel, x)
    check_finite("negative_slope", negative_slope)
    check_positive("eps", eps)
    return op.choices.pick(
        x.device, backend, x, scale, bias, noise=noise, noise_weight=noise_weight, channel_bias=channel_bias,
        negative_slope=negative_slope, eps=eps,
    )  # fmt: skip
