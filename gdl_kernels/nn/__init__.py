"""The ops as modules."""

from .pixel_norm import PixelNorm

__all__ = ["PixelNorm"]
