"""The residual blocks of BigGAN and BigGAN-deep.

Where a shortcut has a 1x1 convolution and changes the number of pixels, the convolution is done where there are fewer
of them: it commutes with nearest upsampling and with average pooling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdl_kernels.nn import ConditionalBatchNorm2d

from ..gans.resampling import conv_of_upsampled, downsample, downsampled_conv, upsample
from .conditioning import Affine
from .config import REDUCTION


class ConditionedConvolution(nn.Module):
    """``conv(up(relu(norm(x))))``, the norm with a gain and a bias of each sample.

    Args:
        condition: the length of what gain and bias are made of, by two layers of the norm's.
        up: twice the pixels a side; else none are added.
    """

    def __init__(
        self, inputs: int, outputs: int, condition: int, eps: float, *, kernel: int = 3, up: bool = False
    ) -> None:
        super().__init__()
        self.up = up
        self.norm = ConditionalBatchNorm2d(inputs, condition, eps=eps)
        self.convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)

    def forward(self, x: Tensor, affine: Affine) -> Tensor:
        x = F.relu_(self.norm.normalize(x, *affine))
        if self.up:
            return conv_of_upsampled(x, self.convolution.weight, self.convolution.bias)
        return self.convolution(x)


class GeneratorBlock(nn.Module):
    """Two 3x3 :class:`ConditionedConvolution`, twice the pixels a side, and a 1x1 convolution as the shortcut."""

    def __init__(self, inputs: int, outputs: int, condition: int, eps: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                ConditionedConvolution(inputs, outputs, condition, eps, up=True),
                ConditionedConvolution(outputs, outputs, condition, eps),
            ]
        )
        self.shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, affines: Sequence[Affine]) -> Tensor:
        h = x
        for layer, affine in zip(self.layers, affines):
            h = layer(h, affine)
        return h + upsample(self.shortcut(x))


class DeepGeneratorBlock(nn.Module):
    """BigGAN-deep's: a bottleneck, and a shortcut without weights.

    Four :class:`ConditionedConvolution`, of 1x1, 3x3, 3x3 and 1x1 pixels, with a quarter of the channels in between.
    The shortcut drops the last channels where there are to be fewer.

    Args:
        up: twice the pixels a side, before the first 3x3 convolution.
    """

    def __init__(self, inputs: int, outputs: int, condition: int, eps: float, *, up: bool) -> None:
        super().__init__()
        self.outputs, self.up = outputs, up
        self.layers = nn.ModuleList(
            ConditionedConvolution(a, b, condition, eps, kernel=kernel, up=up and place == 1)
            for place, (a, b, kernel) in enumerate(_bottleneck(inputs, inputs // REDUCTION, outputs))
        )

    def forward(self, x: Tensor, affines: Sequence[Affine]) -> Tensor:
        h = x
        for layer, affine in zip(self.layers, affines):
            h = layer(h, affine)
        x = x[:, : self.outputs]
        return h + (upsample(x) if self.up else x)


class DiscriminatorBlock(nn.Module):
    """``shortcut(x) + pool(conv(relu(conv(relu(x)))))``.

    Args:
        first: ``x`` are images, which no relu may cut.
        down: half the pixels a side.
    """

    def __init__(self, inputs: int, outputs: int, *, first: bool, down: bool) -> None:
        super().__init__()
        self.first, self.down = first, down
        self.convolutions = nn.ModuleList(nn.Conv2d(c, outputs, 3, padding=1) for c in (inputs, outputs))
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if down or inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu_(self.convolutions[0](x if self.first else F.relu(x)))
        second: Any = self.convolutions[1]
        if self.down:
            return downsampled_conv(h, second.weight, second.bias) + self.shortcut(downsample(x))
        return second(h) + self.shortcut(x)


class DeepDiscriminatorBlock(nn.Module):
    """BigGAN-deep's: a bottleneck, and a shortcut that keeps its channels and has new ones appended by a convolution.

    Args:
        down: half the pixels a side, before the last convolution.
    """

    def __init__(self, inputs: int, outputs: int, *, down: bool) -> None:
        super().__init__()
        self.down = down
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, kernel, padding=kernel // 2)
            for a, b, kernel in _bottleneck(inputs, outputs // REDUCTION, outputs)
        )
        self.appended = nn.Conv2d(inputs, outputs - inputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for place, convolution in enumerate(self.convolutions):
            h = F.relu(h)
            h = convolution(downsample(h) if self.down and place == 3 else h)
        if self.down:
            x = downsample(x)
        return h + (x if self.appended is None else torch.cat([x, self.appended(x)], 1))


def _bottleneck(inputs: int, middle: int, outputs: int) -> list[tuple[int, int, int]]:
    """Inputs, outputs and kernel of four convolutions."""
    return [(inputs, middle, 1), (middle, middle, 3), (middle, middle, 3), (middle, outputs, 1)]
