"""Layers with an equalised learning rate (ProGAN, arXiv 1710.10196, section 4.1).

Weights are drawn from a standard normal distribution, and multiplied by He's constant where they are used. So every
weight has the same size, and an optimiser that gives each the same step, as Adam does, teaches all layers equally fast.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .resampling import conv_of_upsampled, downsampled_conv
from .twice import conv2d

#: He's gain: of a layer that a (leaky) ReLU follows.
HE = math.sqrt(2)


class EqualizedLinear(nn.Module):
    """``y = scale x weight^T + rate bias`` with ``scale = rate gain / sqrt(inputs)``: the product applies both factors.

    Args:
        rate: multiplies the learning rate of the layer, and changes nothing else: weights start at 1 / ``rate``.
    """

    def __init__(self, inputs: int, outputs: int, *, gain: float = HE, rate: float = 1.0, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / rate)
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.scale = gain / math.sqrt(inputs) * rate
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """``(N, inputs)`` to ``(N, outputs)``."""
        if self.bias is None:
            return F.linear(x * self.scale, self.weight)
        return torch.addmm(self.bias, x, self.weight.t(), beta=self.rate, alpha=self.scale)

    def extra_repr(self) -> str:
        outputs, inputs = self.weight.shape
        return f"{inputs}, {outputs}, scale={self.scale:.4g}, rate={self.rate}, bias={self.bias is not None}"


class EqualizedConv2d(nn.Module):
    """``y = scale conv(x, weight) + bias`` with ``scale = gain / sqrt(inputs size^2)``; images keep their size.

    A layer that is followed by a normalisation can have that undo the scale: :meth:`unscaled` gives ``y / scale``.
    """

    def __init__(self, inputs: int, outputs: int, size: int, *, gain: float = HE, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, size, size))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.scale = gain / math.sqrt(inputs * size * size)

    def forward(self, x: Tensor, *, downsampled: bool = False) -> Tensor:
        """``(N, inputs, H, W)`` to ``(N, outputs, H, W)``, or half of these. ``downsampled`` is for 3×3."""
        weight: Tensor = self.weight
        if x.numel() < weight.numel():  # the smaller is multiplied
            x = x * self.scale
        else:
            weight = weight * self.scale
        if downsampled:
            return downsampled_conv(x, weight, self.bias)
        return conv2d(x, weight, self.bias, padding=self.weight.shape[-1] // 2)

    def unscaled(self, x: Tensor, *, of_upsampled: bool = False) -> Tensor:
        """``(N, inputs, H, W)`` to ``(N, outputs, H, W)``, or twice these. ``of_upsampled`` is for 3×3."""
        bias = None if self.bias is None else self.bias / self.scale
        if of_upsampled:
            return conv_of_upsampled(x, self.weight, bias)
        return conv2d(x, self.weight, bias, padding=self.weight.shape[-1] // 2)

    def extra_repr(self) -> str:
        outputs, inputs, size, _ = self.weight.shape
        return f"{inputs}, {outputs}, size={size}, scale={self.scale:.4g}, bias={self.bias is not None}"
