"""Images for the tests of the ops that take them: numbers, and every way to lay them out in memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def random(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(device, dtype)


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


MEMORY = {
    "contiguous": lambda x: x,
    "channels last": channels_last,
    "every other image and channel": lambda x: (
        torch.stack([x, x]).flatten(0, 1)[::2].repeat(1, 2, *[1] * (x.dim() - 2))[:, : x.shape[1]]
    ),
    "a crop": lambda x: torch.nn.functional.pad(x, (1, 2))[..., 1:-2],
    "last dimension first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "not aligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "one image for all": lambda x: x[:1].expand(x.shape),
}


@st.composite
def images(draw: st.DrawFn, shape: list[int], dtype: torch.dtype) -> Tensor:
    """In memory the dimensions come in any order and with gaps."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.integers(1, 2)) for _ in shape]
    memory = random(tuple(shape[d] * steps[d] for d in order), dtype)
    x = memory.permute(*(order.index(d) for d in range(len(shape))))
    return x[tuple(slice(None, None, step) for step in steps)]
