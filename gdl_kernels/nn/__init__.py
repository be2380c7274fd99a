"""The ops as modules."""

from .adain import AdaIN, AdaINFromStyle
from .conditional_batch_norm import (
    ConditionalBatchNorm1d,
    ConditionalBatchNorm2d,
    ConditionalBatchNorm3d,
    standing_statistics,
)
from .key_value_cache import KeyValueCache
from .minibatch_self_attention import MinibatchSelfAttention2d
from .minibatch_stddev import MinibatchStdDev
from .orthogonal_norm import OrthogonalNorm, init_orthogonal_, orthogonal_norm
from .pixel_norm import PixelNorm
from .positional_embedding import PositionalEmbedding
from .sparse_self_attention import SparseSelfAttention
from .style_epilogue import StyleEpilogue
from .truncated_normal import TruncatedNormal

__all__ = [
    "AdaIN",
    "AdaINFromStyle",
    "ConditionalBatchNorm1d",
    "ConditionalBatchNorm2d",
    "ConditionalBatchNorm3d",
    "KeyValueCache",
    "MinibatchSelfAttention2d",
    "MinibatchStdDev",
    "OrthogonalNorm",
    "PixelNorm",
    "PositionalEmbedding",
    "SparseSelfAttention",
    "StyleEpilogue",
    "TruncatedNormal",
    "init_orthogonal_",
    "orthogonal_norm",
    "standing_statistics",
]
