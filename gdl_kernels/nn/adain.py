"""Adaptive instance normalisation as modules."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.adain import adain
from ..ops.adain_from_style import adain_from_style


class AdaIN(nn.Module):
    """:func:`gdl_kernels.adain` with a scale and a bias from a style vector, as StyleGAN has it (arXiv 1812.04948).

    ``affine`` gives ``(N, 2 C)``: the scale less one, and the bias. It may be replaced, by a layer with equalised
    learning rate for one.

    Args:
        style_features: of the style vectors.
        channels: of the images.
    """

    def __init__(self, style_features: int, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.affine: nn.Module = nn.Linear(style_features, 2 * channels)
        self.eps = eps

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """``x`` is ``(N, C, *spatial)``, ``style`` ``(N, style_features)``."""
        scale, bias = self.affine(style).chunk(2, 1)
        return adain(x, 1 + scale, bias, eps=self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


class AdaINFromStyle(nn.Module):
    """:func:`gdl_kernels.adain_from_style` as a layer: the style is an image, as in style transfer. No parameters."""

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, content: Tensor, style: Tensor) -> Tensor:
        """Both ``(N, C, *spatial)``."""
        return adain_from_style(content, style, eps=self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"
