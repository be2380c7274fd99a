"""The weights of BigGAN-128 (width 96) that are regularised and normalised: matrices (out, in * kernel)."""

from __future__ import annotations

#: Gains and biases of the class-conditional batch norms are linear layers from 148 numbers.
_GAINS = [size for size in (1536, 1536, 1536, 768, 768, 384, 384, 192, 192, 96) for _ in range(2)]

#: Of the generator.
GENERATOR = [
    (24576, 20),
    (1536, 13824), (1536, 13824), (768, 13824), (768, 6912), (384, 6912), (384, 3456), (192, 3456), (192, 1728),
    (96, 1728), (96, 864),
    (1536, 1536), (768, 1536), (384, 768), (192, 384), (96, 192),
    *[(size, 148) for size in _GAINS],
    (24, 192), (24, 192), (96, 192), (192, 96),
    (3, 864),
]  # fmt: skip

#: Of the discriminator.
DISCRIMINATOR = [
    (96, 27), (96, 864), (192, 864), (192, 1728), (384, 1728), (384, 3456), (768, 3456), (768, 6912), (1536, 6912),
    (1536, 13824), (1536, 13824), (1536, 13824),
    (96, 3), (192, 96), (384, 192), (768, 384), (1536, 768),
    (12, 96), (12, 96), (48, 96), (96, 48),
    (1, 1536), (1000, 1536),
]  # fmt: skip


def elements(shapes: list[tuple[int, int]]) -> int:
    return sum(rows * columns for rows, columns in shapes)
