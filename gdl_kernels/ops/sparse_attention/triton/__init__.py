"""Block-sparse attention on the GPU, in Triton.

A program owns one tile of queries (or, for the gradients of keys and values, of keys) of one head and walks the list of
blocks that the layout keeps for it: first its full blocks, whose loop knows no mask, then the rest. Every element of
the outputs is written by one program and summed in one order, so results are the same every run.

Scores live in base 2: ``exp(scale * s) = exp2(scale * log2(e) * s)``, and the GPU has an instruction for the latter.

Files: ``launch`` (what all launchers share), ``walk`` (tiles and lists, inside a kernel), ``dropout``, and for each
derivative its kernels with their launcher.
"""

from .backward_kernels import backward
from .double_backward_kernels import double_backward
from .forward_kernels import forward

__all__ = ["backward", "double_backward", "forward"]
