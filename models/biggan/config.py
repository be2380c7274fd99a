"""The shapes of BigGAN's networks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

#: Of each resolution, the generator's channels over ``width`` from 4x4 pixels on. From 64 on they are the paper's,
#: below they are BigGAN-PyTorch's for 32. The discriminator's are these from behind.
CHANNELS = {
    16: (4, 4, 4),
    32: (4, 4, 4, 4),
    64: (16, 16, 8, 4, 2),
    128: (16, 16, 8, 4, 2, 1),
    256: (16, 16, 8, 8, 4, 2, 1),
    512: (16, 16, 8, 8, 4, 2, 1, 1),
}

#: Pixels a side where a generator begins and a discriminator ends.
BOTTOM = 4


@dataclass(frozen=True)
class Config:
    """What a generator and its discriminator are.

    Attributes:
        resolution: pixels a side; a power of two from 16 to 512.
        width: channels of the generator's last layer from 128 pixels on; all others are multiples of it.
        classes: how many there are.
        z_dim: length of the noise vector. It is cut in a chunk for each block and one for the first layer, of the same
            length; the deep variant gives all of it to every layer.
        embedding_dim: length of the shared class embedding.
        attention: at how many pixels a side self-attention is, in the generator, and in the discriminator where that
            has features of this size; None is nowhere.
        image_channels: 3 for colour, 1 for grey.
        deep: BigGAN-deep: bottleneck blocks, two of them at each resolution.
        eps: of batch norm. BigGAN-deep as released has 1e-4.
    """

    resolution: int = 128
    width: int = 96
    classes: int = 1000
    z_dim: int = 120
    embedding_dim: int = 128
    attention: int | None = 64
    image_channels: int = 3
    deep: bool = False
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.resolution not in CHANNELS:
            known = ", ".join(map(str, CHANNELS))
            raise ValueError(f"resolution must be one of {known}, got {self.resolution!r}")
        for name in ("width", "classes", "z_dim", "embedding_dim", "image_channels"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if not self.deep and self.z_dim % self.chunks:
            raise ValueError(
                f"z_dim must be a multiple of {self.chunks}, the chunks at resolution {self.resolution}, "
                f"got {self.z_dim}"
            )
        if self.attention is not None and self.attention not in self.sizes[1:]:
            sizes = ", ".join(map(str, self.sizes[1:]))
            raise ValueError(
                f"attention must be None or one of {sizes}, the features' sizes at resolution {self.resolution}, "
                f"got {self.attention!r}"
            )
        if self.deep and self.width * min(self.multiples) < 4:
            raise ValueError(f"width must be at least 4 for bottleneck blocks, got {self.width}")
        if not self.eps > 0:
            raise ValueError(f"eps must be positive, got {self.eps}")

    @property
    def multiples(self) -> tuple[int, ...]:
        return CHANNELS[self.resolution]

    @property
    def channels(self) -> tuple[int, ...]:
        """Of the generator at each of :attr:`sizes`."""
        return tuple(self.width * multiple for multiple in self.multiples)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Pixels a side: 4, 8, ... ``resolution``."""
        return tuple(BOTTOM * 2**stage for stage in range(len(self.multiples)))

    @property
    def chunks(self) -> int:
        """Of the noise vector: one for the first layer, one for each block."""
        return len(self.multiples)

    @property
    def condition_dim(self) -> int:
        """Length of what a block is conditioned on: noise and embedding."""
        return (self.z_dim if self.deep else self.z_dim // self.chunks) + self.embedding_dim


PRESETS = {
    "digits": Config(16, width=16, classes=10, z_dim=48, embedding_dim=32, attention=8, image_channels=1),
    "digits-32": Config(32, width=16, classes=10, z_dim=64, embedding_dim=32, attention=16, image_channels=1),
    # z in chunks of 20, as published.
    "128": Config(128),
    "256": Config(256, z_dim=140),
    "deep-128": Config(128, width=128, z_dim=128, deep=True),
    "deep-256": Config(256, width=128, z_dim=128, deep=True),
    "deep-512": Config(512, width=128, z_dim=128, deep=True),
}


def preset(name: str, **changes: Any) -> Config:
    """One of ``PRESETS`` with other fields changed; a change that is None is none.

    Raises:
        ValueError: if there is no such preset, or a field does not fit.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return replace(PRESETS[name], **{field: value for field, value in changes.items() if value is not None})
