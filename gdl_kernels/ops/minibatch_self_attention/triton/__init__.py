"""Self-attention of a minibatch on the GPU, in Triton.

A program owns one tile of queries (or, for the gradients of keys and values, of keys) of one image and walks all keys
(or queries) of that image. Every element of the outputs is written by one program and summed in one order, so results
are the same every run.

With ``pool=2`` a first launch pools key and value once, into a quarter of their memory, instead of every program each
time it walks by, and writes which of the four won. Gradients go straight to the winners, and zeros to the others.

Scores live in base 2: ``exp(scale * s) = exp2(scale * log2(e) * s)``, and the GPU has an instruction for the latter.

Files: ``maps`` (how kernels read and write images, pooling), ``launch`` (what the launchers share), and for each
derivative its kernels with their launcher.
"""

from .backward_kernels import backward
from .double_backward_kernels import double_backward
from .forward_kernels import forward

__all__ = ["backward", "double_backward", "forward"]
