"""Fused GPU and CPU kernels for generative deep learning."""

from . import layouts
from ._backends import available_backends, backend, explain
from .ops.sparse_attention import sparse_attention

__version__ = "0.1.0"

__all__ = ["available_backends", "backend", "explain", "layouts", "sparse_attention"]
