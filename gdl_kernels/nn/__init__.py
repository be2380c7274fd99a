"""The ops as modules."""

from .key_value_cache import KeyValueCache
from .orthogonal_norm import OrthogonalNorm, init_orthogonal_, orthogonal_norm
from .pixel_norm import PixelNorm
from .sparse_self_attention import SparseSelfAttention

__all__ = [
    "KeyValueCache",
    "OrthogonalNorm",
    "PixelNorm",
    "SparseSelfAttention",
    "init_orthogonal_",
    "orthogonal_norm",
]
