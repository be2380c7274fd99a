"""StyleGAN's networks (arXiv 1812.04948, section 2 and appendices B and C; where its code differs, as the code)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typer import Option

from gdl_kernels import pixel_norm, style_epilogue

from ..gans.data import Batch
from ..gans.equalized import EqualizedConv2d, EqualizedLinear
from ..gans.growing import GrowingConfig, GrowingGan, GrowingRecipe, check_growth
from ..gans.losses import Logistic
from ..gans.model import check_latents
from ..gans.resampling import blur, upsample
from ..progan.model import Discriminator

if TYPE_CHECKING:
    from ..gans.pictures import Picture

SLOPE = 0.2
EPILOGUE_EPS = 1e-8

#: The layers that truncation reaches by default: those up to 32×32.
TRUNCATED_LAYERS = 8


@dataclass(frozen=True)
class StyleganConfig(GrowingConfig):
    """The shape of all three networks; the defaults are the published ones.

    Attributes:
        size: from 8 on, which growth begins with.
        style: numbers in a style vector, and in the hidden layers of the mapping network.
        mapping_layers: of the mapping network.
        mixing: how often a batch in training takes its styles from two latents.
        gamma: weight of R1.
        mean_decay: of the running average of style vectors.
    """

    style: Annotated[int, Option(help="Length of the style vectors.")] = 512
    mapping_layers: Annotated[int, Option(help="Layers of the mapping network.")] = 8
    mixing: Annotated[float, Option(help="Share of batches in training whose images mix two styles.")] = 0.9
    gamma: Annotated[float, Option(help="Weight of the R1 penalty.")] = 10.0
    mean_decay: float = 0.995

    FIRST: ClassVar[int] = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("style", "mapping_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.mixing <= 1:
            raise ValueError(f"mixing must be from 0 to 1, got {self.mixing}")
        if not (self.gamma >= 0 and math.isfinite(self.gamma)):
            raise ValueError(f"gamma must be finite and not negative, got {self.gamma}")
        if not 0 <= self.mean_decay < 1:
            raise ValueError(f"mean_decay must be from 0 to below 1, got {self.mean_decay}")


def layers_at(resolution: int) -> int:
    """How many layers, each with a style of its own, make images of a resolution: two for each doubling from 4×4."""
    return 2 * (resolution.bit_length() - 2)


class MappingNetwork(nn.Module):
    """Latent vectors, normalised to unit mean square, to style vectors: ``(N, latent)`` to ``(N, style)``.

    Learns at a hundredth of the other layers' rate.
    """

    def __init__(self, config: StyleganConfig) -> None:
        super().__init__()
        widths = [config.latent] + [config.style] * config.mapping_layers
        self.layers = nn.ModuleList(EqualizedLinear(a, b, rate=0.01) for a, b in pairwise(widths))

    def forward(self, latent: Tensor) -> Tensor:
        x = pixel_norm(latent)
        for layer in self.layers:
            x = F.leaky_relu(layer(x), SLOPE)
        return x


class Layer(nn.Module):
    """A convolution, and what a style makes of it: noise, bias, leaky ReLU, instance normalisation, scale and bias.

    The layer that starts from the learned constant has no convolution.
    """

    def __init__(self, config: StyleganConfig, inputs: int | None, outputs: int, *, doubles: bool = False) -> None:
        super().__init__()
        self.convolution = None if inputs is None else EqualizedConv2d(inputs, outputs, 3, bias=False)
        self.doubles = doubles
        self.affine = EqualizedLinear(config.style, 2 * outputs, gain=1.0)
        self.noise_weight = nn.Parameter(torch.zeros(outputs))
        self.channel_bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor, style: Tensor, noise: Tensor | None) -> Tensor:
        # The epilogue normalises, so it can undo the convolution's scale: with all that is added divided by it, and eps
        # by its square, its output is the same. No pass over weights or images applies the scale.
        divisor = 1.0
        if self.convolution is not None:
            divisor = self.convolution.scale
            x = self.convolution.unscaled(x, of_upsampled=self.doubles)
        if self.doubles:
            x = blur(x)
        scale, bias = self.affine(style).chunk(2, 1)
        return style_epilogue(
            x, 1 + scale, bias, noise=noise, noise_weight=self.noise_weight / divisor,
            channel_bias=self.channel_bias / divisor, negative_slope=SLOPE, eps=EPILOGUE_EPS / divisor**2,
        )  # fmt: skip


class Synthesis(nn.Module):
    """Style vectors, one for each layer, to images."""

    def __init__(self, config: StyleganConfig) -> None:
        super().__init__()
        widths = config.widths
        self.constant = nn.Parameter(torch.ones(1, widths[0], 4, 4))
        layers = [Layer(config, None, widths[0]), Layer(config, widths[0], widths[0])]
        for a, b in pairwise(widths):
            layers += [Layer(config, a, b, doubles=True), Layer(config, b, b)]
        self.layers = nn.ModuleList(layers)
        self.to_image = nn.ModuleList(EqualizedConv2d(width, config.channels, 1, gain=1.0) for width in widths)

    def forward(self, styles: Tensor, alpha: float = 1.0, noise: Sequence[Tensor] | None = None) -> Tensor:
        """``styles`` ``(N, layers, style)`` to ``(N, channels, R, R)``: two layers for each doubling up to R.

        ``noise`` has a tensor ``(N or 1, 1, H, W)`` for each layer; without it, it is drawn.
        """
        count = styles.shape[1]
        if noise is not None and len(noise) != count:
            raise ValueError(f"noise must have a tensor for each of {count} layers, got {len(noise)}")
        before = x = self.constant.expand(styles.shape[0], -1, -1, -1)
        for index in range(count):
            if index == count - 2:
                before = x
            x = self.layers[index](x, styles[:, index], None if noise is None else noise[index])
        images = self.to_image[count // 2 - 1](x)
        return images if alpha == 1 else upsample(self.to_image[count // 2 - 2](before)).lerp(images, alpha)


class Generator(nn.Module):
    """Latent vectors to images, by way of style vectors.

    All layers are there from the beginning; those beyond the resolution that is asked for are not run, and get no
    gradient. In training mode every call moves ``mean_style``, the running average of style vectors.
    """

    mean_style: Tensor

    def __init__(self, config: StyleganConfig) -> None:
        super().__init__()
        self.config = config
        self.mapping = MappingNetwork(config)
        self.synthesis = Synthesis(config)
        self.register_buffer("mean_style", torch.zeros(config.style))

    def styles(self, latents: Tensor, resolution: int | None = None) -> Tensor:
        """``(N, layers, style)``: the same style in all layers that make images of ``resolution``.

        Raises:
            ValueError: if ``latents`` are not ``(N, config.latent)``, or there is no such resolution.
        """
        check_latents(latents, self.config.latent)
        resolution = check_growth(self.config, resolution, 1.0)
        style = self.mapping(latents)
        if self.training:
            with torch.no_grad():
                self.mean_style.lerp_(style.mean(0).to(self.mean_style), 1 - self.config.mean_decay)
        return style[:, None].expand(-1, layers_at(resolution), -1)

    def truncated(self, styles: Tensor, psi: float = 0.7, layers: int = TRUNCATED_LAYERS) -> Tensor:
        """The truncation trick: ``mean + psi (style - mean)`` in the first ``layers`` layers.

        Smaller psi gives up variety for quality; 0 is the mean style, and 1 changes nothing.

        Raises:
            ValueError: if psi is not finite, or layers is negative.
        """
        check_psi(psi)
        if layers < 0:
            raise ValueError(f"layers must not be negative, got {layers}")
        near = self.mean_style.to(styles).lerp(styles[:, :layers], psi)
        return torch.cat([near, styles[:, layers:]], 1)

    def noise(
        self, count: int, resolution: int | None = None, *, generator: torch.Generator | None = None
    ) -> list[Tensor]:
        """Standard normal noise for every layer up to a resolution, to be given to several calls."""
        like = self.synthesis.constant
        sides = [4 << index // 2 for index in range(layers_at(resolution or self.config.size))]
        return [torch.randn(count, 1, side, side, generator=generator).to(like) for side in sides]

    def forward(
        self, latents: Tensor, resolution: int | None = None, alpha: float = 1.0, *,
        mixed: tuple[Tensor, int] | None = None, noise: Sequence[Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """Images of one resolution.

        Args:
            latents: ``(N, config.latent)``, standard normal; its length is normalised here.
            resolution: that of the configuration by default.
            alpha: share of the newest layers; the rest is what the ones before them make, upsampled.
            mixed: other latent vectors, and the first layer that takes its style from them.
            noise: of :meth:`noise`, for the same details at each call. Without it, it is drawn anew.

        Returns:
            ``(N, channels, resolution, resolution)``; of trained networks about -1 to 1.

        Raises:
            ValueError: if ``latents`` has another shape, the network has no such resolution, alpha is not in 0 to 1,
                there is no such layer, or noise is not for each layer.
        """
        check_growth(self.config, resolution, alpha)
        styles = self.styles(latents, resolution)
        if mixed is not None:
            others, first = mixed
            check_latents(others, self.config.latent)
            styles = mix(styles, self.mapping(others)[:, None].expand_as(styles), first, styles.shape[1])
        return self.synthesis(styles, alpha, noise)


def check_psi(psi: float) -> None:
    if not math.isfinite(psi):
        raise ValueError(f"psi must be finite, got {psi}")


def mix(styles: Tensor, others: Tensor, first: int, end: int) -> Tensor:
    """``styles`` with layers ``first`` up to, not including, ``end`` from ``others``; both ``(N, layers, style)``.

    Raises:
        ValueError: if there are no such layers.
    """
    layers = styles.shape[1]
    if not 0 <= first < end <= layers:
        raise ValueError(f"mixed layers must be from 0 to {layers}, the first before the end, got {first} to {end}")
    return torch.cat([styles[:, :first], others[:, first:end], styles[:, end:]], 1)


class Stylegan(GrowingGan):
    """StyleGAN with the non-saturating logistic loss and R1. Its truncation is psi, of the styles."""

    name = "stylegan"
    title = "StyleGAN"
    config_type = StyleganConfig
    recipe = GrowingRecipe()
    rate_factors: ClassVar = {8: 1.0, 128: 1.5, 256: 2.0, 512: 3.0}
    truncates = True

    config: StyleganConfig
    generator: Generator

    def __init__(self, config: StyleganConfig) -> None:
        super().__init__(config)
        self.generator = Generator(config)
        self.discriminator = Discriminator(config, blur=True)
        self.loss = Logistic(config.gamma)

    def generate(
        self, generator: nn.Module, latents: Tensor, labels: Tensor | None, *, truncation: float | None = None
    ) -> Tensor:
        assert isinstance(generator, Generator)
        styles = generator.styles(latents, self.stage.resolution)
        if truncation is not None:
            styles = generator.truncated(styles, truncation)
        return generator.synthesis(styles, self.stage.alpha)

    def fakes(self, latents: Tensor, labels: Tensor | None) -> Batch:
        """Most batches mix the styles of two latents, so that no layer relies on the style of the one before."""
        resolution, alpha = self.stage.resolution, self.stage.alpha
        mixed = None
        if torch.rand(()).item() < self.config.mixing:
            first = int(torch.randint(1, layers_at(resolution), ()))
            mixed = self.latents(len(latents)).to(latents), first
        return Batch(self.generator(latents, resolution, alpha, mixed=mixed), labels)

    @classmethod
    def check_truncation(cls, truncation: float) -> None:
        check_psi(truncation)

    @classmethod
    def pictures(cls) -> Mapping[str, Picture]:
        from .pictures import noise, style_mixing  # which know this module

        return {**super().pictures(), "mixing": style_mixing, "noise": noise}
