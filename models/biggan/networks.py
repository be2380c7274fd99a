"""BigGAN's generator and discriminator, of both variants."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gdl_kernels
from gdl_kernels.nn import ConditionalBatchNorm2d, MinibatchSelfAttention2d

from .blocks import DeepDiscriminatorBlock, DeepGeneratorBlock, DiscriminatorBlock, GeneratorBlock
from .conditioning import Affine, BatchNorm2d, affines, check_classes
from .config import BOTTOM, Config


class Generator(nn.Module):
    """Noise and classes to images from -1 to 1.

    Every weight has a spectral norm but the shared embedding, and begins orthogonal. The embedding of the class, beside
    a chunk of the noise, or all of it in the deep variant, gives each conditional batch norm its gain and bias: in one
    product for each block, in the deep variant in one product in all.

    Shapes: noise ``(N, z_dim)`` and classes ``(N,)``, or embedded classes ``(N, embedding_dim)``, as they are between
    two classes, to ``(N, image_channels, resolution, resolution)``.

    Args:
        config: what it is.
        spectral_norm: False is for weights that are normalised already: they stay as torch makes them.

    Raises:
        ValueError: when called, if noise is of another shape, or on the CPU a class is out of range.
    """

    def __init__(self, config: Config, *, spectral_norm: bool = True) -> None:
        super().__init__()
        self.config = config
        sizes, channels = config.sizes, config.channels
        self.shared = nn.Embedding(config.classes, config.embedding_dim)
        self.linear = nn.Linear(
            config.condition_dim if config.deep else config.z_dim // config.chunks, channels[0] * BOTTOM**2
        )
        blocks = list(_generator_blocks(config))
        self.blocks = nn.ModuleList(block for block, _ in blocks)
        self.attention: MinibatchSelfAttention2d | None = None
        if config.attention is not None:
            self.attention = MinibatchSelfAttention2d(channels[sizes.index(config.attention)])
            #: The first block that ends at the size that is attended to.
            self.attended = [size for _, size in blocks].index(config.attention)
        self.norm = BatchNorm2d(channels[-1], eps=config.eps)
        self.to_image = nn.Conv2d(channels[-1], config.image_channels, 3, padding=1)
        if spectral_norm:
            gdl_kernels.init_orthogonal_(self)
            gdl_kernels.spectral_norm_all(self, skip=[self.shared])

    def forward(self, z: Tensor, classes: Tensor) -> Tensor:
        if z.dim() != 2 or z.shape[1] != self.config.z_dim:
            raise ValueError(f"z must be (N, {self.config.z_dim}), got shape {tuple(z.shape)}")
        first, norms = self._conditioned(z, self.embedded(classes))
        x = self.linear(first).unflatten(1, (-1, BOTTOM, BOTTOM))
        for place, (block, of_block) in enumerate(zip(self.blocks, norms)):
            x = block(x, of_block)
            if self.attention is not None and place == self.attended:
                x = self.attention(x)
        return torch.tanh(self.to_image(F.relu(self.norm(x))))

    def embedded(self, classes: Tensor) -> Tensor:
        if classes.is_floating_point():
            return classes
        check_classes(classes, self.config.classes)
        return self.shared(classes)

    def _conditioned(self, z: Tensor, embedded: Tensor) -> tuple[Tensor, list[list[Affine]]]:
        """What the first layer takes, and for each block the gains and biases of its norms."""
        if self.config.deep:
            condition = torch.cat([z, embedded], 1)
            found = iter(affines([norm for block in self.blocks for norm in _norms(block)], condition))
            return condition, [[next(found) for _ in _norms(block)] for block in self.blocks]
        first, *chunks = z.chunk(self.config.chunks, dim=1)
        conditions = [torch.cat([chunk, embedded], 1) for chunk in chunks]
        return first, [affines(_norms(block), condition) for block, condition in zip(self.blocks, conditions)]

    def regularized(self) -> list[Tensor]:
        """What orthogonal regularisation is of: all weights, before their spectral norm, but the shared embedding."""
        return [p for p in self.parameters() if p.dim() > 1 and p is not self.shared.weight]


class Discriminator(nn.Module):
    """Images with their classes to ``(N,)`` scores: a linear one, and the projection of features on the class's vector.

    ``score = w h + b + v[class] h``, ``h`` being the sum of the last features over pixels. Every weight has a spectral
    norm.

    Raises:
        ValueError: when called, if images are of another shape, or on the CPU a class is out of range.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        channels = config.channels[::-1]
        self.from_image = nn.Conv2d(config.image_channels, channels[0], 3, padding=1) if config.deep else nn.Identity()
        blocks = list(_discriminator_blocks(config))
        self.blocks = nn.ModuleList(block for block, _, _ in blocks)
        self.attention: MinibatchSelfAttention2d | None = None
        #: The last block that ends at the size that is attended to, and its channels.
        ends = {size: (place, outputs) for place, (_, size, outputs) in enumerate(blocks)}
        if config.attention in ends:
            self.attended, features = ends[config.attention]
            self.attention = MinibatchSelfAttention2d(features)
        self.linear = nn.Linear(channels[-1], 1)
        self.projection = nn.Embedding(config.classes, channels[-1])
        gdl_kernels.init_orthogonal_(self)
        gdl_kernels.spectral_norm_all(self)

    def forward(self, images: Tensor, classes: Tensor) -> Tensor:
        shape = (self.config.image_channels, self.config.resolution, self.config.resolution)
        if tuple(images.shape[1:]) != shape:
            raise ValueError(f"images must be (N, {', '.join(map(str, shape))}), got shape {tuple(images.shape)}")
        check_classes(classes, self.config.classes)
        x = self.from_image(images)
        for place, block in enumerate(self.blocks):
            x = block(x)
            if self.attention is not None and place == self.attended:
                x = self.attention(x)
        features = F.relu(x).sum((2, 3))
        return self.linear(features).squeeze(1) + (self.projection(classes) * features).sum(1)


def _norms(block: nn.Module) -> list[ConditionalBatchNorm2d]:
    return [module for module in block.modules() if isinstance(module, ConditionalBatchNorm2d)]


def _generator_blocks(config: Config) -> Iterator[tuple[nn.Module, int]]:
    """Blocks, and the size that each ends at."""
    dim, eps = config.condition_dim, config.eps
    for size, (inputs, outputs) in zip(config.sizes, pairwise(config.channels)):
        if config.deep:
            yield DeepGeneratorBlock(inputs, inputs, dim, eps, up=False), size
            yield DeepGeneratorBlock(inputs, outputs, dim, eps, up=True), 2 * size
        else:
            yield GeneratorBlock(inputs, outputs, dim, eps), 2 * size


def _discriminator_blocks(config: Config) -> Iterator[tuple[nn.Module, int, int]]:
    """Blocks, and the size and channels that each ends at.

    The regular variant has the generator's channels of a size at half that size, and ends with a block that halves
    nothing.
    """
    channels = config.channels[::-1]
    halves = [size // 2 for size in config.sizes[:0:-1]]
    if config.deep:
        for half, (inputs, outputs) in zip(halves, pairwise(channels)):
            yield DeepDiscriminatorBlock(inputs, outputs, down=True), half, outputs
            yield DeepDiscriminatorBlock(outputs, outputs, down=False), half, outputs
    else:
        for place, (half, (inputs, outputs)) in enumerate(zip(halves, pairwise((config.image_channels, *channels)))):
            yield DiscriminatorBlock(inputs, outputs, first=place == 0, down=True), half, outputs
        yield DiscriminatorBlock(*channels[-2:], first=False, down=False), BOTTOM, channels[-1]
