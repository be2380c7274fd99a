"""StyleGAN's epilogue in plain PyTorch: the specification."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..._arguments import sum_dtype
from ..._philox import philox
from ..adain.reference import adain, planes

#: The last counter: what keeps these numbers apart from others that are drawn with the same seed.
_STREAM = 0x6E6F6973


def style_epilogue(
    x: Tensor, scale: Tensor, bias: Tensor, noise: Tensor | None, noise_weight: Tensor | None,
    channel_bias: Tensor | None, negative_slope: float, eps: float,
) -> Tensor:  # fmt: skip
    """``noise_weight`` and ``channel_bias`` are ``(C,)``, or ``(N, C)`` for one of each plane."""
    u = x.to(sum_dtype(x))
    if noise is not None and noise_weight is not None:
        u = u + planes(noise_weight, u) * noise.to(u.dtype)
    if channel_bias is not None:
        u = u + planes(channel_bias, u)
    return adain(F.leaky_relu(u, negative_slope), scale, bias, eps).to(x.dtype)


def drawn_noise(seed: Tensor, x: Tensor) -> Tensor:
    """Standard normal ``(N, 1, *spatial)`` in the dtype of the sums, by Philox and the transform of Box and Muller.

    Counter ``(q, n)`` gives the normals of the pixels ``q``, ``Q + q``, ``2 Q + q`` and ``3 Q + q`` of image ``n``,
    where ``Q`` is a quarter of the pixels, rounded up.
    """
    images, pixels = x.shape[0], math.prod(x.shape[2:])
    quarter = torch.arange((pixels + 3) // 4, device=x.device)
    image = torch.arange(images, device=x.device)[:, None]
    words = [(word >> 9).double() for word in philox(seed.to(x.device), (quarter, image, 0, _STREAM))]
    normals = []
    for a, b in (words[:2], words[2:]):
        radius, angle = (-2 * ((a + 0.5) * 2.0**-23).log()).sqrt(), 2 * math.pi * b * 2.0**-23
        normals += [radius * angle.cos(), radius * angle.sin()]
    return torch.cat(normals, 1)[:, :pixels].to(sum_dtype(x)).reshape(images, 1, *x.shape[2:])
