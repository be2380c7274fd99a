"""Random numbers from a counter: the same on every backend, in whatever order they are drawn.

Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11): the fewest that pass
BigCrush. A 64-bit seed and four 32-bit counters give four words of 32 random bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7

_WORD = 0xFFFFFFFF


def draw_seed(device: torch.device) -> Tensor:
    """A fresh seed for a device, int64 ``()``, on the CPU: to copy it to a GPU takes as long as a kernel.

    From torch's generator of the CPU, whatever the device: after one ``torch.manual_seed`` every device has the same.
    Where a CUDA graph is captured or ``torch.compile`` may make one, on the GPU and from its own generator, so that
    every replay has another.
    """
    recorded = device.type == "cuda" and (torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing())
    return torch.randint(2**63 - 1, (), device=device if recorded else "cpu")


def philox(seed: Tensor, counters: tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int]) -> list[Tensor]:
    """Four words of 32 random bits for each counter, in int64.

    Args:
        seed: int64 ``()``.
        counters: four integers from 0 to 2³² − 1 or int64 tensors of them, that broadcast.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*(torch.as_tensor(c, device=seed.device) for c in counters))
    key0, key1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(ROUNDS):
        # 32 by 32 bits: int64 wraps around, which keeps all 64 of the product.
        low, high = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (high >> 32 & _WORD) ^ c1 ^ key0, high & _WORD, (low >> 32 & _WORD) ^ c3 ^ key1, low & _WORD
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    return [c0, c1, c2, c3]
