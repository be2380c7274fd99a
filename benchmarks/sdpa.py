"""``F.scaled_dot_product_attention`` by each of its kernels: torch takes one of them, and not always the fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

#: Those that a device has. One that can't serve a call raises, and its row says so.
KERNELS = {
    "cpu": {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH},
    "cuda": {
        "cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH,
    },
}  # fmt: skip

Attention = Callable[..., Tensor]


def by_kernel(name: str, attention: Attention, device: torch.device) -> Iterator[tuple[str, Attention]]:
    """A rival's name and function, then the same function by each kernel; a backward pass follows its forward pass."""
    yield name, attention
    for kernel, backend in KERNELS[device.type].items():
        yield f"{name}, {kernel}", _forced(attention, backend)


def _forced(attention: Attention, backend: SDPBackend) -> Attention:
    def forced(*inputs: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return attention(*inputs)

    return forced
