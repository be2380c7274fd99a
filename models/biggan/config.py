"""The shapes of BigGAN's networks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from typer import Option

from ..gans.model import Config

#: Of each size, the generator's channels over ``width``, from 4x4 pixels on. From 128 on they are the paper's; those of
#: 64 are their first ones, those of 32 BigGAN-PyTorch's. The discriminator's are the same from behind.
MULTIPLES = {
    16: (4, 4, 4),
    32: (4, 4, 4, 4),
    64: (16, 16, 8, 4, 2),
    128: (16, 16, 8, 4, 2, 1),
    256: (16, 16, 8, 8, 4, 2, 1),
    512: (16, 16, 8, 8, 4, 2, 1, 1),
}

#: Height and width at which the generator begins and the discriminator ends.
BASE = 4

#: Channels of a bottleneck block over those between its 1x1 convolutions.
REDUCTION = 4


@dataclass(frozen=True)
class BigganConfig(Config):
    """A BigGAN's shape, and the penalty on its weights.

    The defaults are the paper's for 128 pixels; ``size=256, latent=140`` its for 256. BigGAN-deep is ``deep=True,
    latent=128, width=128``, at 128, 256 and 512 pixels.

    Attributes:
        latent: of the regular variant a multiple of :attr:`chunks`: it is cut in equal chunks, one for the first layer
            and one for each block. The deep variant gives all of it to every layer.
        width: all channels are multiples of it.
        embedding: length of the shared class embedding.
        attention_at: height and width of the images that self-attention sees, in the generator, and in the
            discriminator where that has features of this size; 0 leaves it out.
        deep: bottleneck blocks, two of them at each size.
        penalty: the weight of orthogonal regularisation, beta.
        gram: ``"columns"``: it is of ``W^T W``, as the paper prints it; ``"rows"``: of ``W W^T``, between filters.
        eps: of batch norm. BigGAN-deep as released has 1e-4.
    """

    size: Annotated[int, Option(help="Height and width of the images: 16, 32, ... 512.")] = 128
    latent: Annotated[int, Option(help="Length of the noise vector, of which each block has a chunk.")] = 120
    channels: int = 3
    classes: int = 1000
    width: Annotated[int, Option(help="All channels are multiples of it.")] = 96
    embedding: Annotated[int, Option(help="Length of the shared class embedding.")] = 128
    attention_at: Annotated[int, Option(help="Resolution of self-attention; 0 for none.")] = 64
    deep: Annotated[bool, Option(help="BigGAN-deep: bottleneck blocks, all of the noise for every layer.")] = False
    penalty: Annotated[float, Option(help="Weight of orthogonal regularisation.")] = 1e-4
    gram: Annotated[str, Option(help="What shall be orthogonal: columns, as printed, or rows: filters.")] = "columns"
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.size not in MULTIPLES:
            raise ValueError(f"size must be one of {', '.join(map(str, MULTIPLES))}, got {self.size}")
        super().__post_init__()
        for name in ("classes", "width", "embedding"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.deep and self.latent % self.chunks:
            raise ValueError(
                f"latent must be a multiple of {self.chunks}, the chunks at size {self.size}, got {self.latent}"
            )
        if self.attention_at and self.attention_at not in self.sizes[1:]:
            sizes = ", ".join(map(str, (0, *self.sizes[1:])))
            raise ValueError(f"attention_at must be one of {sizes} at size {self.size}, got {self.attention_at}")
        if self.deep and self.widths[-1] < REDUCTION:
            raise ValueError(f"width must be at least {REDUCTION} for bottleneck blocks, got {self.width}")
        if not 0 <= self.penalty < math.inf:
            raise ValueError(f"penalty must be finite and not negative, got {self.penalty}")
        if self.gram not in ("columns", "rows"):
            raise ValueError(f"gram must be columns or rows, got {self.gram!r}")
        if not self.eps > 0:
            raise ValueError(f"eps must be positive, got {self.eps}")

    @property
    def widths(self) -> tuple[int, ...]:
        """The generator's channels at each of :attr:`sizes`."""
        return tuple(self.width * multiple for multiple in MULTIPLES[self.size])

    @property
    def sizes(self) -> tuple[int, ...]:
        """Heights and widths: 4, 8, ... ``size``."""
        return tuple(BASE * 2**stage for stage in range(self.chunks))

    @property
    def chunks(self) -> int:
        """Of the noise vector: one for the first layer, one for each doubling of the size."""
        return len(MULTIPLES[self.size])

    @property
    def condition(self) -> int:
        """The length of what a batch norm's gain and bias are made of: noise and class embedding."""
        return (self.latent if self.deep else self.latent // self.chunks) + self.embedding
