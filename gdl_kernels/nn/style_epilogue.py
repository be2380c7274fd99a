"""StyleGAN's epilogue as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.style_epilogue import style_epilogue


class StyleEpilogue(nn.Module):
    """:func:`gdl_kernels.style_epilogue` with its parameters: what follows each convolution of StyleGAN's generator.

    ``affine`` gives ``(N, 2 C)`` from a style vector: the scale less one, and the bias. It may be replaced, by a layer
    with equalised learning rate for one. The weights of the noise and the biases of the channels start at zero.

    Args:
        style_features: of the style vectors.
        channels: of the images.
        noise: whether there is noise.
    """

    def __init__(
        self, style_features: int, channels: int, *, noise: bool = True, negative_slope: float = 0.2, eps: float = 1e-8
    ) -> None:
        super().__init__()
        self.affine: nn.Module = nn.Linear(style_features, 2 * channels)
        self.noise_weight = nn.Parameter(torch.zeros(channels)) if noise else None
        self.channel_bias = nn.Parameter(torch.zeros(channels))
        self.negative_slope = negative_slope
        self.eps = eps

    def forward(self, x: Tensor, style: Tensor, noise: Tensor | None = None) -> Tensor:
        """``x`` is ``(N, C, *spatial)``, ``style`` ``(N, style_features)``.

        ``noise`` is ``(N or 1, 1, *spatial)``; where it is not given it is drawn, in evaluation too.
        """
        if noise is not None and self.noise_weight is None:
            raise ValueError(f"noise must be None in a StyleEpilogue(noise=False), got shape {tuple(noise.shape)}")
        scale, bias = self.affine(style).chunk(2, 1)
        return style_epilogue(
            x, 1 + scale, bias, noise=noise, noise_weight=self.noise_weight, channel_bias=self.channel_bias,
            negative_slope=self.negative_slope, eps=self.eps,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"noise={self.noise_weight is not None}, negative_slope={self.negative_slope}, eps={self.eps}"
