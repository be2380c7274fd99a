"""Conditional batch norm on the GPU, in Triton: ``kernels``, and ``passes``, which each op consists of."""

from .passes import backward, double_backward, forward

__all__ = ["backward", "double_backward", "forward"]
