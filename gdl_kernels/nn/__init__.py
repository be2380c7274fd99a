"""The ops as modules."""

from .key_value_cache import KeyValueCache
from .minibatch_stddev import MinibatchStdDev
from .pixel_norm import PixelNorm
from .sparse_self_attention import SparseSelfAttention

__all__ = ["KeyValueCache", "MinibatchStdDev", "PixelNorm", "SparseSelfAttention"]
