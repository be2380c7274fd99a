"""ProGAN's generator and discriminator (arXiv 1710.10196, table 2)."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from gdl_kernels import minibatch_stddev, pixel_norm

from ..gans.equalized import HE, EqualizedConv2d, EqualizedLinear
from ..gans.growing import (
    GrowingConfig,
    GrowingGan,
    GrowingRecipe,
    check_alpha,
    check_growth,
    side_of,
)
from ..gans.losses import Wasserstein
from ..gans.model import check_latents
from ..gans.resampling import blur, downsample, upsample
from ..gans.twice import leaky_relu_

SLOPE = 0.2
PIXEL_NORM_EPS = 1e-8


def normalized(convolution: EqualizedConv2d, x: Tensor, *, of_upsampled: bool = False) -> Tensor:
    """``pixel_norm(leaky_relu(convolution(x)))``.

    Both are linear in a positive factor. So the scale of the convolution may be left out if pixel_norm's eps is divided
    by its square, and no pass over weights or images applies it.
    """
    h = leaky_relu_(convolution.unscaled(x, of_upsampled=of_upsampled), SLOPE)
    return pixel_norm(h, eps=PIXEL_NORM_EPS / convolution.scale**2)


class GeneratorBlock(nn.Module):
    """Doubles the resolution: upsampling and two convolutions."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv0 = EqualizedConv2d(inputs, outputs, 3)
        self.conv1 = EqualizedConv2d(outputs, outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        return normalized(self.conv1, normalized(self.conv0, x, of_upsampled=True))


class Generator(nn.Module):
    """Latent vectors to images.

    All layers are there from the beginning; those beyond the resolution that is asked for are not run, and get no
    gradient.
    """

    def __init__(self, config: GrowingConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.widths
        self.dense = EqualizedLinear(config.latent, 16 * widths[0], gain=HE / 4, bias=False)
        self.bias = nn.Parameter(torch.zeros(widths[0]))
        self.conv = EqualizedConv2d(widths[0], widths[0], 3)
        self.blocks = nn.ModuleList(GeneratorBlock(*pair) for pair in pairwise(widths))
        self.to_image = nn.ModuleList(EqualizedConv2d(width, config.channels, 1, gain=1.0) for width in widths)

    def forward(self, latents: Tensor, resolution: int | None = None, alpha: float = 1.0) -> Tensor:
        """Images of one resolution.

        Args:
            latents: ``(N, config.latent)``, standard normal; its length is normalised here.
            resolution: that of the configuration by default.
            alpha: share of the newest layers; the rest is what the ones before them make, upsampled.

        Returns:
            ``(N, channels, resolution, resolution)``; of trained networks about -1 to 1.

        Raises:
            ValueError: if ``latents`` has another shape, the network has no such resolution, or alpha is not in 0 to 1.
        """
        check_latents(latents, self.config.latent)
        resolution = check_growth(self.config, resolution, alpha)
        x = self.dense(pixel_norm(latents, eps=PIXEL_NORM_EPS)).unflatten(1, (-1, 4, 4))
        x = pixel_norm(leaky_relu_(x + self.bias[:, None, None], SLOPE), eps=PIXEL_NORM_EPS)
        x = normalized(self.conv, x)
        return grown(x, list(self.blocks), list(self.to_image), resolution, alpha)


def grown(x: Tensor, blocks: list[nn.Module], to_image: list[nn.Module], resolution: int, alpha: float) -> Tensor:
    """Run the blocks from 4×4 up to a resolution, and fade its images in over those of the one before."""
    last = resolution.bit_length() - 3  # 4 is 0, 8 is 1
    before = x
    for block in blocks[:last]:
        before, x = x, block(x)
    images = to_image[last](x)
    if last == 0 or alpha == 1:
        return images
    return upsample(to_image[last - 1](before)).lerp(images, alpha)


class DiscriminatorBlock(nn.Module):
    """Halves the resolution: two convolutions and downsampling."""

    def __init__(self, inputs: int, outputs: int, *, blur: bool) -> None:
        super().__init__()
        self.conv0 = EqualizedConv2d(inputs, inputs, 3)
        self.blurs = blur
        self.conv1 = EqualizedConv2d(inputs, outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = leaky_relu_(self.conv0(x), SLOPE)
        return leaky_relu_(self.conv1(blur(x) if self.blurs else x, downsampled=True), SLOPE)


class Discriminator(nn.Module):
    """Images of any resolution that there are layers for, to a score each: the higher, the more real.

    Args:
        blur: before every downsampling, as StyleGAN has it.
    """

    def __init__(self, config: GrowingConfig, *, blur: bool = False) -> None:
        super().__init__()
        self.config = config
        widths = config.widths
        self.from_image = nn.ModuleList(EqualizedConv2d(config.channels, width, 1) for width in widths)
        self.blocks = nn.ModuleList(DiscriminatorBlock(b, a, blur=blur) for a, b in pairwise(widths))
        self.conv = EqualizedConv2d(widths[0] + 1, widths[0], 3)
        self.dense = EqualizedLinear(16 * widths[0], widths[0])
        self.score = EqualizedLinear(widths[0], 1, gain=1.0)

    def forward(self, images: Tensor, alpha: float = 1.0) -> Tensor:
        """Scores ``(N,)`` of ``(N, channels, R, R)``.

        Args:
            alpha: share of the layers at R; the rest is what those at R / 2 see of the images, downsampled.

        Raises:
            ValueError: if there are no layers for such images, alpha is not in 0 to 1, or N is more than the group size
                and no multiple of it.
        """
        newest = side_of(images, self.config).bit_length() - 3
        check_alpha(alpha)
        x = self._features(images, newest)
        for index in range(newest - 1, -1, -1):
            x = self.blocks[index](x)
            if index == newest - 1 and alpha != 1:
                x = self._features(downsample(images), index).lerp(x, alpha)
        x = minibatch_stddev(x, group_size=self.config.group_size)
        x = leaky_relu_(self.conv(x), SLOPE)
        x = leaky_relu_(self.dense(x.flatten(1)), SLOPE)
        return self.score(x).squeeze(1)

    def _features(self, images: Tensor, index: int) -> Tensor:
        return leaky_relu_(self.from_image[index](images), SLOPE)


class Progan(GrowingGan):
    """ProGAN with the loss of WGAN-GP and drift."""

    name = "progan"
    title = "ProGAN"
    config_type = GrowingConfig
    recipe = GrowingRecipe()
    rate_factors: ClassVar = {4: 1.0, 1024: 1.5}

    def __init__(self, config: GrowingConfig) -> None:
        super().__init__(config)
        self.generator, self.discriminator, self.loss = Generator(config), Discriminator(config), Wasserstein()
