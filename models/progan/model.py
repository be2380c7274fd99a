"""ProGAN's generator and discriminator (arXiv 1710.10196, table 2)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdl_kernels import minibatch_stddev, pixel_norm

from ..gans.blur import Blur
from ..gans.equalized import HE, EqualizedConv2d, EqualizedLinear
from ..gans.growing import (
    channels,
    check_alpha,
    check_resolution,
    downsample,
    image_resolution,
    resolutions,
    upsample,
)  # fmt: skip

SLOPE = 0.2
PIXEL_NORM_EPS = 1e-8


@dataclass(frozen=True)
class Config:
    """The shape of both networks; the defaults are the published ones.

    Attributes:
        resolution: of the images once all layers have grown: a power of two from 4 on.
        latent: numbers in a latent vector.
        capacity, widest: a layer at resolution R has ``min(widest, capacity / R)`` channels.
        group_size: samples that the minibatch standard deviation compares.
    """

    resolution: int = 1024
    image_channels: int = 3
    latent: int = 512
    capacity: int = 16384
    widest: int = 512
    group_size: int = 4

    #: The lowest resolution of which there are layers.
    LEAST = 4

    def __post_init__(self) -> None:
        check_resolution("resolution", self.resolution, least=self.LEAST)
        for name in ("image_channels", "latent", "widest", "group_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if not isinstance(self.capacity, int) or self.capacity < self.resolution:
            raise ValueError(f"capacity must be at least the resolution, {self.resolution}, got {self.capacity!r}")

    @property
    def resolutions(self) -> list[int]:
        return resolutions(4, self.resolution)

    def channels(self, resolution: int) -> int:
        return channels(resolution, capacity=self.capacity, widest=self.widest)


def normalized(convolution: EqualizedConv2d, x: Tensor) -> Tensor:
    """``pixel_norm(leaky_relu(convolution(x)))``.

    Both are linear in a positive factor. So the scale of the convolution may be left out if pixel_norm's eps is divided
    by its square, and no pass over weights or images applies it.
    """
    h = F.leaky_relu(convolution.unscaled(x), SLOPE)
    return pixel_norm(h, eps=PIXEL_NORM_EPS / convolution.scale**2)


class GeneratorBlock(nn.Module):
    """Doubles the resolution: upsampling and two convolutions."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv0 = EqualizedConv2d(inputs, outputs, 3)
        self.conv1 = EqualizedConv2d(outputs, outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        return normalized(self.conv1, normalized(self.conv0, upsample(x)))


class Generator(nn.Module):
    """Latent vectors to images.

    All layers are there from the beginning; those beyond the resolution that is asked for are not run, and get no
    gradient.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        widths = [config.channels(resolution) for resolution in config.resolutions]
        self.dense = EqualizedLinear(config.latent, 16 * widths[0], gain=HE / 4, bias=False)
        self.bias = nn.Parameter(torch.zeros(widths[0]))
        self.conv = EqualizedConv2d(widths[0], widths[0], 3)
        self.blocks = nn.ModuleList(GeneratorBlock(*pair) for pair in pairwise(widths))
        self.to_image = nn.ModuleList(EqualizedConv2d(width, config.image_channels, 1, gain=1.0) for width in widths)

    def forward(self, latent: Tensor, resolution: int | None = None, alpha: float = 1.0) -> Tensor:
        """Images of one resolution.

        Args:
            latent: ``(N, config.latent)``, standard normal; its length is normalised here.
            resolution: that of the configuration by default.
            alpha: share of the newest layers; the rest is what the ones before them make, upsampled.

        Returns:
            ``(N, image_channels, resolution, resolution)``; of trained networks about -1 to 1.

        Raises:
            ValueError: if ``latent`` has another shape, the network has no such resolution, or alpha is not in 0 to 1.
        """
        resolution = check_call(self.config, latent, resolution, alpha)
        x = self.dense(pixel_norm(latent, eps=PIXEL_NORM_EPS)).unflatten(1, (-1, 4, 4))
        x = pixel_norm(F.leaky_relu(x + self.bias[:, None, None], SLOPE), eps=PIXEL_NORM_EPS)
        x = normalized(self.conv, x)
        return grown(x, list(self.blocks), list(self.to_image), resolution, alpha)


def check_call(config: Config, latent: Tensor, resolution: int | None, alpha: float) -> int:
    """The resolution, if the arguments of a generator are right; else a ValueError."""
    if latent.dim() != 2 or latent.shape[1] != config.latent:
        raise ValueError(f"latent must be (N, {config.latent}), got shape {tuple(latent.shape)}")
    check_alpha(alpha)
    if resolution is None:
        return config.resolution
    check_resolution("resolution", resolution, least=config.LEAST, most=config.resolution)
    return resolution


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
        self.blur = Blur() if blur else nn.Identity()
        self.conv1 = EqualizedConv2d(inputs, outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blur(F.leaky_relu(self.conv0(x), SLOPE))
        return F.leaky_relu(downsample(self.conv1(x)), SLOPE)


class Discriminator(nn.Module):
    """Images of any resolution that there are layers for, to a score each: the higher, the more real.

    Args:
        blur: before every downsampling, as StyleGAN has it.
    """

    def __init__(self, config: Config, *, blur: bool = False) -> None:
        super().__init__()
        self.config = config
        widths = [config.channels(resolution) for resolution in config.resolutions]
        self.from_image = nn.ModuleList(EqualizedConv2d(config.image_channels, width, 1) for width in widths)
        self.blocks = nn.ModuleList(DiscriminatorBlock(b, a, blur=blur) for a, b in pairwise(widths))
        self.conv = EqualizedConv2d(widths[0] + 1, widths[0], 3)
        self.dense = EqualizedLinear(16 * widths[0], widths[0])
        self.score = EqualizedLinear(widths[0], 1, gain=1.0)

    def forward(self, images: Tensor, alpha: float = 1.0) -> Tensor:
        """Scores ``(N,)`` of ``(N, image_channels, R, R)``.

        Args:
            alpha: share of the layers at R; the rest is what those at R / 2 see of the images, downsampled.

        Raises:
            ValueError: if there are no layers for such images, alpha is not in 0 to 1, or N is more than the group size
                and no multiple of it.
        """
        config = self.config
        side = image_resolution(
            images, image_channels=config.image_channels, least=config.LEAST, most=config.resolution
        )
        check_alpha(alpha)
        newest = side.bit_length() - 3
        x = self._features(images, newest)
        for index in range(newest - 1, -1, -1):
            x = self.blocks[index](x)
            if index == newest - 1 and alpha != 1:
                x = self._features(downsample(images), index).lerp(x, alpha)
        x = minibatch_stddev(x, group_size=config.group_size)
        x = F.leaky_relu(self.conv(x), SLOPE)
        x = F.leaky_relu(self.dense(x.flatten(1)), SLOPE)
        return self.score(x).squeeze(1)

    def _features(self, images: Tensor, index: int) -> Tensor:
        return F.leaky_relu(self.from_image[index](images), SLOPE)
