"""SAGAN's generator and discriminator (arXiv 1805.08318), at any power of two.

Residual blocks as in the paper's code, spectral norm on every layer of both networks, self-attention at one resolution.
With classes: conditional batch norm in the generator, a projection in the discriminator (arXiv 1802.05637).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer import Option

from gdl_kernels import spectral_norm_all
from gdl_kernels.nn import ConditionalBatchNorm2d, MinibatchSelfAttention2d

from ..gans.losses import Hinge
from ..gans.model import Config, Gan, check_images, check_labels, check_latents
from ..gans.resampling import conv_of_upsampled, downsample, downsampled_conv, upsample
from ..gans.training import Recipe

#: Height and width at which the generator begins and the discriminator ends.
BASE = 4

#: No layer is wider than this many times ``width``.
WIDEST = 16


@dataclass(frozen=True)
class SaganConfig(Config):
    """A SAGAN's shape; ``size=128, width=64, attention_at=32`` is the paper's.

    Attributes:
        width: channels of the generator's last block and of the discriminator's first.
        attention_at: height and width of the images that self-attention sees in both networks; 0 leaves it out.
    """

    width: Annotated[int, Option(help="Channels at full size.")] = 64
    attention_at: Annotated[int, Option(help="Resolution of self-attention; 0 for none.")] = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 2 * BASE:
            raise ValueError(f"size must be at least {2 * BASE}, got {self.size}")
        if self.width < 1:
            raise ValueError(f"width must be at least 1, got {self.width}")
        seen_by_both = [BASE * 2**i for i in range(1, self.blocks)]
        if self.attention_at and self.attention_at not in seen_by_both:
            allowed = ", ".join(map(str, [0, *seen_by_both]))
            raise ValueError(f"attention_at must be one of {allowed} at size {self.size}, got {self.attention_at}")
        if self.attention_at and self.width < 2:
            raise ValueError(f"width must be at least 2 with self-attention, got {self.width}")

    @property
    def blocks(self) -> int:
        """How many times the generator doubles the resolution, and the discriminator halves it."""
        return int(math.log2(self.size // BASE))


class Generator(nn.Module):
    """Latents ``(N, latent)`` and classes ``(N,)`` to images ``(N, channels, size, size)`` in [-1, 1]."""

    def __init__(self, config: SaganConfig) -> None:
        super().__init__()
        self.config = config
        wide = [config.width * min(WIDEST, config.size // (BASE * 2**i)) for i in range(config.blocks + 1)]
        self.first = nn.Linear(config.latent, wide[0] * BASE * BASE)
        self.blocks = nn.ModuleList(UpBlock(*pair, config.classes) for pair in pairwise(wide))
        self.attention = nn.ModuleDict()
        if config.attention_at:
            place = int(math.log2(config.attention_at // BASE))
            self.attention[str(place - 1)] = MinibatchSelfAttention2d(wide[place])
        self.norm = nn.BatchNorm2d(wide[-1])
        self.last = nn.Conv2d(wide[-1], config.channels, 3, padding=1)
        _initialise(self)
        spectral_norm_all(self, skip=[m for m in self.modules() if isinstance(m, ConditionalBatchNorm2d)])

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        check_latents(latents, self.config.latent)
        check_labels(labels, len(latents), self.config.classes)
        # Channels last: every layer after keeps it, and convolutions need not sort pixels on their way in and out.
        x = self.first(latents).unflatten(1, (-1, BASE, BASE)).contiguous(memory_format=torch.channels_last)
        for place, block in enumerate(self.blocks):
            x = block(x, labels)
            if str(place) in self.attention:
                x = self.attention[str(place)](x)
        return self.last(F.relu_(self.norm(x))).tanh()


class Discriminator(nn.Module):
    """Images ``(N, channels, size, size)`` and classes ``(N,)`` to scores ``(N,)``."""

    def __init__(self, config: SaganConfig) -> None:
        super().__init__()
        self.config = config
        wide = [config.width * min(WIDEST, 2**i) for i in range(config.blocks)]
        self.blocks = nn.ModuleList([DownBlock(config.channels, wide[0], first=True)])
        self.blocks.extend(DownBlock(*pair) for pair in pairwise(wide))
        top = config.width * min(WIDEST, 2**config.blocks)
        self.blocks.append(DownBlock(wide[-1], top, halve=False))
        self.attention = nn.ModuleDict()
        if config.attention_at:
            place = int(math.log2(config.size // config.attention_at)) - 1
            self.attention[str(place)] = MinibatchSelfAttention2d(wide[place])
        self.linear = nn.Linear(top, 1)
        self.projection = nn.Embedding(config.classes, top) if config.classes else None
        _initialise(self)
        spectral_norm_all(self)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        check_images(images, self.config.channels, self.config.size)
        check_labels(labels, len(images), self.config.classes)
        x = images.contiguous(memory_format=torch.channels_last)
        for place, block in enumerate(self.blocks):
            x = block(x)
            if str(place) in self.attention:
                x = self.attention[str(place)](x)
        features = F.relu(x).sum((2, 3))
        scores = self.linear(features)[:, 0]
        return scores if self.projection is None else scores + (features * self.projection(labels)).sum(1)


class UpBlock(nn.Module):
    """``(N, inputs, H, W)`` to ``(N, outputs, 2H, 2W)``: twice norm, ReLU and 3×3 convolution, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, classes: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(_norm(channels, classes) for channels in (inputs, outputs))
        self.convolutions = nn.ModuleList(nn.Conv2d(i, outputs, 3, padding=1) for i in (inputs, outputs))
        self.shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        condition = () if labels is None else (labels,)
        first: Any = self.convolutions[0]
        h = conv_of_upsampled(F.relu_(self.norms[0](x, *condition)), first.weight, first.bias)
        h = F.relu_(self.norms[1](h, *condition))
        # A 1×1 convolution before the repetition of pixels is that after it, at a quarter of the cost.
        return self.convolutions[1](h) + upsample(self.shortcut(x))


class DownBlock(nn.Module):
    """``(N, inputs, H, W)`` to ``(N, outputs, H/2, W/2)``: twice ReLU and 3×3 convolution, and a shortcut.

    The ``first`` of them sees an image, which no ReLU may cut. ``halve=False`` keeps the resolution.
    """

    def __init__(self, inputs: int, outputs: int, *, first: bool = False, halve: bool = True) -> None:
        super().__init__()
        self.first, self.halve = first, halve
        self.convolutions = nn.ModuleList(nn.Conv2d(i, outputs, 3, padding=1) for i in (inputs, outputs))
        self.shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.convolutions[0](x if self.first else F.relu(x))
        h = F.relu_(h)
        second: Any = self.convolutions[1]
        if not self.halve:
            return second(h) + self.shortcut(x)
        # Means of pixels before a 1×1 convolution are those after it, at a quarter of the cost.
        return downsampled_conv(h, second.weight, second.bias) + self.shortcut(downsample(x))


class Sagan(Gan):
    """SAGAN with the hinge loss and two learning rates."""

    name = "sagan"
    title = "SAGAN"
    config_type = SaganConfig
    recipe = Recipe(generator_rate=1e-4, discriminator_rate=4e-4, beta1=0.0, beta2=0.9)

    def __init__(self, config: SaganConfig) -> None:
        super().__init__(config)
        self.generator, self.discriminator, self.loss = Generator(config), Discriminator(config), Hinge()


def _norm(channels: int, classes: int) -> nn.Module:
    return ConditionalBatchNorm2d(channels, num_classes=classes) if classes else nn.BatchNorm2d(channels)


def _initialise(network: nn.Module) -> None:
    """Glorot's weights and no biases, as the paper's code has it."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
