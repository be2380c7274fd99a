"""The ops as modules."""

from .conditional_batch_norm import (
    ConditionalBatchNorm1d,
    ConditionalBatchNorm2d,
    ConditionalBatchNorm3d,
    standing_statistics,
)
from .key_value_cache import KeyValueCache
from .pixel_norm import PixelNorm
from .sparse_self_attention import SparseSelfAttention

__all__ = [
    "ConditionalBatchNorm1d",
    "ConditionalBatchNorm2d",
    "ConditionalBatchNorm3d",
    "KeyValueCache",
    "PixelNorm",
    "SparseSelfAttention",
    "standing_statistics",
]
