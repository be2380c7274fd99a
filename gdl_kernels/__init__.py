"""Fused GPU and CPU kernels for generative deep learning."""

from . import layouts, nn
from ._backends import available_backends, backend, explain
from ._truncated_normal import truncated_normal
from .nn.orthogonal_norm import init_orthogonal_, orthogonal_norm
from .nn.spectral_norm import spectral_norm
from .nn.spectral_norm_all import remove_spectral_norm_all, spectral_norm_all
from .ops.adain import adain
from .ops.adain_from_style import adain_from_style
from .ops.conditional_batch_norm import conditional_batch_norm
from .ops.minibatch_self_attention import minibatch_self_attention
from .ops.minibatch_stddev import minibatch_stddev
from .ops.orthogonal_regularization import orthogonal_regularization
from .ops.orthogonalize import orthogonalize
from .ops.pixel_norm import pixel_norm
from .ops.positional_embedding import positional_embedding
from .ops.sparse_attention import sparse_attention
from .ops.sparse_attention.merge import merge_attention
from .ops.spectral_normalize import spectral_normalize
from .ops.style_epilogue import style_epilogue

__version__ = "0.1.0"

__all__ = [
    "adain",
    "adain_from_style",
    "available_backends",
    "backend",
    "conditional_batch_norm",
    "explain",
    "init_orthogonal_",
    "layouts",
    "merge_attention",
    "minibatch_self_attention",
    "minibatch_stddev",
    "nn",
    "orthogonal_norm",
    "orthogonal_regularization",
    "orthogonalize",
    "pixel_norm",
    "positional_embedding",
    "remove_spectral_norm_all",
    "sparse_attention",
    "spectral_norm",
    "spectral_norm_all",
    "spectral_normalize",
    "style_epilogue",
    "truncated_normal",
]
