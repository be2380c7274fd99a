"""The Triton kernels of spectral_normalize."""

from .launch import backward, forward

__all__ = ["backward", "forward"]
