"""What the tests of positional_embedding share: backends, sizes, ways to lie in memory, the comparison."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gdl_kernels import positional_embedding
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

#: Shape of the tokens, rows and columns of the table.
SIZES = [
    ((2, 40), 100, 64),  # whole vectors
    ((3, 5, 7), 11, 37),  # divides nothing; a batch of two dimensions
    ((4, 1), 50, 512),  # decoding: the batch alone is work
    ((2, 19), 6, 1),  # one column, of sines
    ((9,), 9, 1029),  # no batch; several blocks of columns, the last of few
    ((2, 500), 3, 24),  # few tokens, each often: several threads share a row, programs its chunks
    ((1, 130), 1, 130),  # one row
    ((1, 5), 300, 8),  # most rows never
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

TOKENS = {
    "int64": lambda t: t,
    "int32": lambda t: t.to(torch.int32),
    "every other": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
    "backwards in memory": lambda t: t.movedim(-1, 0).contiguous().movedim(0, -1),
    "one for all": lambda t: t[..., :1].expand(t.shape),
}

#: Ways for a table, or for gradients, to lie in memory.
MEMORY = {
    "contiguous": lambda x: x,
    "columns apart": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "rows apart": lambda x: F.pad(x, (1, 2))[..., 1:-2],
    "not aligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "one row for all": lambda x: x[..., :1, :].expand(x.shape),
}


def random(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(device, dtype)


def random_tokens(shape: tuple[int, ...], rows: int, device: str = "cpu") -> Tensor:
    return torch.randint(rows, shape, device="cpu").to(device)


def run(tokens: Tensor, weight: Tensor, grad: Tensor, backend: str, **call: Any) -> tuple[Tensor, Tensor]:
    weight = weight.detach().requires_grad_()
    out = positional_embedding(tokens, weight, backend=backend, **call)
    (grad_weight,) = torch.autograd.grad(out, weight, grad)
    return out.detach(), grad_weight


def check(tokens: Tensor, weight: Tensor, grad: Tensor, backend: str, **call: Any) -> None:
    ours, plain = run(tokens, weight, grad, backend, **call), run(tokens, weight, grad, "reference", **call)
    exact = run(tokens, weight.double(), grad.double(), "reference", **call)
    assert ours[0].is_contiguous()
    for what, *values in zip(("output", "gradient"), ours, plain, exact):
        assert_accurate(*values, what)


# The first two of each in every dtype; the others need no more than one that is narrower than its sums.
CASES = [("int64", "contiguous", dtype) for dtype in DTYPES]
CASES += [("int32", memory, torch.bfloat16) for memory in list(MEMORY)[1:]]
CASES += [(order, "contiguous", torch.float32) for order in list(TOKENS)[2:]]
