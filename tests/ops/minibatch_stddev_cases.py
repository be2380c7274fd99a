"""What the tests of minibatch_stddev share: backends, sizes, ways to lie in memory, the comparison."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from gdl_kernels import minibatch_stddev
from tests.accuracy import assert_accurate

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

#: (backend, device)
Kernel = tuple[str, str]
KERNELS = (
    [pytest.param(("triton", "cpu"), id="triton")]
    if INTERPRETING
    else [
        pytest.param(("cpu", "cpu"), id="cpu"),
        pytest.param(("triton", "cuda"), id="triton", marks=pytest.mark.gpu),
    ]
)
for_each_kernel = pytest.mark.parametrize("kernel", KERNELS)

#: Shape, group size, features.
SIZES = [
    ((8, 64, 4, 4), 4, 1),  # as ProGAN has it: two groups, small images
    ((4, 3, 40, 30), 4, 1),  # one group; lines longer than a tile
    ((6, 10, 7, 9), 3, 2),  # divides nothing
    ((3, 4, 5), 4, 1),  # fewer samples than a group
    ((2, 24, 1, 1), 2, 4),  # 1x1 maps: a line of one number
    ((6, 18), 2, 3),  # no pixels
    ((4, 1, 50), 2, 1),  # one channel: the line of a channels-last tensor has one element
    ((4, 6, 2, 3, 4), 2, 6),  # volumes; each channel a feature
    ((20, 5, 3, 3), 10, 5),  # a large group
    ((3, 4, 6), 1, 1),  # groups of one: no deviation at all
    ((2, 3, 1300), 2, 3),  # several tasks, the last not full
    ((2, 1030, 5), 2, 1),  # channels-last lines longer than a tile
]
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


def with_channels(shape: tuple[int, ...], added: int) -> tuple[int, ...]:
    return shape[0], shape[1] + added, *shape[2:]


def run(x: Tensor, grad: Tensor, backend: str, **call: Any) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = minibatch_stddev(x, backend=backend, **call)
    (dx,) = torch.autograd.grad(y, x, grad)
    return y.detach(), dx


def check(x: Tensor, grad: Tensor, backend: str, *, ulps: int = 2, **call: Any) -> None:
    ours, plain = run(x, grad, backend, **call), run(x, grad, "reference", **call)
    exact = run(x.double(), grad.double(), "reference", **call)
    channels = x.shape[1]
    assert torch.equal(ours[0][:, :channels], x)
    # A statistic is one number for all of a group's members and pixels: fewer to compare than assert_accurate is for.
    assert_accurate(*(y[:, channels:] for y in (ours[0], plain[0], exact[0])), "statistic", ulps=ulps)
    # dx is small where the copied part and the statistic's part cancel.
    copied = grad[:, :channels].double()
    assert_accurate(ours[1], plain[1], exact[1], "dx", terms=torch.cat([copied, exact[1] - copied]))


# The first two in every dtype; the others need no more than one that is narrower than its sums.
CASES = [(memory, dtype) for memory in list(MEMORY)[:2] for dtype in DTYPES]
CASES += [(memory, torch.bfloat16) for memory in list(MEMORY)[2:]]
