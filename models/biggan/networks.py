"""BigGAN's generator and discriminator, of both variants."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gdl_kernels
from gdl_kernels.nn import ConditionalBatchNorm2d, MinibatchSelfAttention2d

from ..gans.model import check_images, check_labels, check_latents
from .blocks import DeepDiscriminatorBlock, DeepGeneratorBlock, DiscriminatorBlock, GeneratorBlock
from .conditioning import Affine, BatchNorm2d, affines
from .config import BASE, BigganConfig


class Generator(nn.Module):
    """Noise and classes to images from -1 to 1.

    Every weight has a spectral norm but the shared embedding, and begins orthogonal. The embedding of the class, beside
    a chunk of the noise, or all of it in the deep variant, gives each conditional batch norm its gain and bias: in one
    product for each block, in the deep variant in one product in all.

    Shapes: noise ``(N, latent)`` and classes ``(N,)``, or embedded classes ``(N, embedding)``, as they are between two
    classes, to ``(N, channels, size, size)``.

    Args:
        config: what it is.
        spectral_norm: False is for weights to come that are normalised already; until then they are torch's.

    Raises:
        ValueError: when called, if noise is of another shape, or on the CPU a class is out of range.
    """

    def __init__(self, config: BigganConfig, *, spectral_norm: bool = True) -> None:
        super().__init__()
        self.config = config
        sizes, channels = config.sizes, config.widths
        self.shared = nn.Embedding(config.classes, config.embedding)
        self.linear = nn.Linear(
            config.condition if config.deep else config.latent // config.chunks, channels[0] * BASE**2
        )
        blocks = list(_generator_blocks(config))
        self.blocks = nn.ModuleList(block for block, _ in blocks)
        self.attention: MinibatchSelfAttention2d | None = None
        if config.attention_at:
            self.attention = MinibatchSelfAttention2d(channels[sizes.index(config.attention_at)])
            #: The first block that ends at the size that is attended to.
            self.attended = [size for _, size in blocks].index(config.attention_at)
        self.norm = BatchNorm2d(channels[-1], eps=config.eps)
        self.to_image = nn.Conv2d(channels[-1], config.channels, 3, padding=1)
        if spectral_norm:
            gdl_kernels.init_orthogonal_(self)
            gdl_kernels.spectral_norm_all(self, skip=[self.shared])

    def forward(self, latents: Tensor, classes: Tensor) -> Tensor:
        check_latents(latents, self.config.latent)
        first, affines_of_blocks = self._conditioned(latents, self._embedded(classes, len(latents)))
        x = self.linear(first).unflatten(1, (-1, BASE, BASE))
        for place, (block, of_block) in enumerate(zip(self.blocks, affines_of_blocks)):
            x = block(x, of_block)
            if self.attention is not None and place == self.attended:
                x = self.attention(x)
        return torch.tanh(self.to_image(F.relu_(self.norm(x))))

    def _embedded(self, classes: Tensor, count: int) -> Tensor:
        if not classes.is_floating_point():
            check_labels(classes, count, self.config.classes)
            return self.shared(classes)
        if tuple(classes.shape) != (count, self.config.embedding):
            wanted, got = (count, self.config.embedding), tuple(classes.shape)
            raise ValueError(f"embedded classes must be {wanted}, got shape {got}")
        return classes

    def _conditioned(self, latents: Tensor, embedded: Tensor) -> tuple[Tensor, list[list[Affine]]]:
        """What the first layer takes, and for each block the gains and biases of its norms."""
        if self.config.deep:
            condition = torch.cat([latents, embedded], 1)
            found = iter(affines([norm for block in self.blocks for norm in _norms(block)], condition))
            return condition, [[next(found) for _ in _norms(block)] for block in self.blocks]
        first, *chunks = latents.chunk(self.config.chunks, dim=1)
        conditions = [torch.cat([chunk, embedded], 1) for chunk in chunks]
        return first, [affines(_norms(block), condition) for block, condition in zip(self.blocks, conditions)]

    def regularized(self) -> list[Tensor]:
        """What orthogonal regularisation is of: all weights, before their spectral norm, but the shared embedding."""
        return [p for p in self.parameters() if p.dim() > 1 and p is not self.shared.weight]


class Discriminator(nn.Module):
    """Images with their classes to ``(N,)`` scores: a linear one, and the projection of features on the class's vector.

    ``score = w h + b + v[class] h``, ``h`` being the sum of the last features over pixels. Every weight has a spectral
    norm.

    Args:
        config: what it is.
        spectral_norm: as for the generator.

    Raises:
        ValueError: when called, if images are of another shape, or on the CPU a class is out of range.
    """

    def __init__(self, config: BigganConfig, *, spectral_norm: bool = True) -> None:
        super().__init__()
        self.config = config
        channels = config.widths[::-1]
        self.from_image = nn.Conv2d(config.channels, channels[0], 3, padding=1) if config.deep else nn.Identity()
        blocks = list(_discriminator_blocks(config))
        self.blocks = nn.ModuleList(block for block, _, _ in blocks)
        self.attention: MinibatchSelfAttention2d | None = None
        #: The last block that ends at the size that is attended to, and its channels.
        ends = {size: (place, outputs) for place, (_, size, outputs) in enumerate(blocks)}
        if config.attention_at in ends:
            self.attended, features = ends[config.attention_at]
            self.attention = MinibatchSelfAttention2d(features)
        self.linear = nn.Linear(channels[-1], 1)
        self.projection = nn.Embedding(config.classes, channels[-1])
        if spectral_norm:
            gdl_kernels.init_orthogonal_(self)
            gdl_kernels.spectral_norm_all(self)

    def forward(self, images: Tensor, classes: Tensor) -> Tensor:
        check_images(images, self.config.channels, self.config.size)
        check_labels(classes, len(images), self.config.classes)
        x = self.from_image(images)
        for place, block in enumerate(self.blocks):
            x = block(x)
            if self.attention is not None and place == self.attended:
                x = self.attention(x)
        features = F.relu(x).sum((2, 3))
        return self.linear(features).squeeze(1) + (self.projection(classes) * features).sum(1)


def _norms(block: Any) -> list[ConditionalBatchNorm2d]:
    return [layer.norm for layer in block.layers]


def _generator_blocks(config: BigganConfig) -> Iterator[tuple[nn.Module, int]]:
    """Blocks, and the size that each ends at."""
    dim, eps = config.condition, config.eps
    for size, (inputs, outputs) in zip(config.sizes, pairwise(config.widths)):
        if config.deep:
            yield DeepGeneratorBlock(inputs, inputs, dim, eps, up=False), size
            yield DeepGeneratorBlock(inputs, outputs, dim, eps, up=True), 2 * size
        else:
            yield GeneratorBlock(inputs, outputs, dim, eps), 2 * size


def _discriminator_blocks(config: BigganConfig) -> Iterator[tuple[nn.Module, int, int]]:
    """Blocks, and the size and channels that each ends at.

    The regular variant has the generator's channels of a size at half that size, and ends with a block that halves
    nothing.
    """
    channels = config.widths[::-1]
    halves = [size // 2 for size in config.sizes[:0:-1]]
    if config.deep:
        for half, (inputs, outputs) in zip(halves, pairwise(channels)):
            yield DeepDiscriminatorBlock(inputs, outputs, down=True), half, outputs
            yield DeepDiscriminatorBlock(outputs, outputs, down=False), half, outputs
    else:
        for place, (half, (inputs, outputs)) in enumerate(zip(halves, pairwise((config.channels, *channels)))):
            yield DiscriminatorBlock(inputs, outputs, first=place == 0, down=True), half, outputs
        yield DiscriminatorBlock(*channels[-2:], first=False, down=False), BASE, channels[-1]
