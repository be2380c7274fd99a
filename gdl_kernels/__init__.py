"""Fused GPU and CPU kernels for generative deep learning."""

from . import layouts, nn
from ._backends import available_backends, backend, explain
from .nn.orthogonal_norm import init_orthogonal_, orthogonal_norm
from .ops.orthogonal_regularization import orthogonal_regularization
from .ops.orthogonalize import orthogonalize
from .ops.pixel_norm import pixel_norm
from .ops.sparse_attention import sparse_attention
from .ops.sparse_attention.merge import merge_attention

__version__ = "0.1.0"

__all__ = [
    "available_backends",
    "backend",
    "explain",
    "init_orthogonal_",
    "layouts",
    "merge_attention",
    "nn",
    "orthogonal_norm",
    "orthogonal_regularization",
    "orthogonalize",
    "pixel_norm",
    "sparse_attention",
]
