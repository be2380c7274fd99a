"""Launches the C++ kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _native
from ..._arguments import to_dtype
from .phases import phase_steps
from .reference import check_range
from .rows import contiguous_rows


def forward(out: Tensor, tokens: Tensor, weight: Tensor, scale: float, start: int, backend: str) -> None:
    ids, table = _ids(tokens), contiguous_rows(weight)
    rows, width = table.shape
    steps = phase_steps(width, table.device)
    native = _native.cpu_module().positional_embedding_forward
    ok = native(
        _dtype(weight), ids.data_ptr(), ids.numel(), ids.shape[-1], table.data_ptr(), table.stride()[0], rows, width,
        scale, start, steps.data_ptr(), out.data_ptr(), _native.threads(out.numel()),
    )  # fmt: skip
    if not ok:
        check_range(tokens, rows)


def backward(
    grad_weight: Tensor, grad: Tensor, tokens: Tensor, num_embeddings: int, scale: float, backend: str
) -> None:
    ids, grads = _ids(tokens), contiguous_rows(grad.reshape(-1, grad.shape[-1]))
    native = _native.cpu_module().positional_embedding_backward
    ok = native(
        _dtype(grad), ids.data_ptr(), ids.numel(), grads.data_ptr(), grads.stride(0), *grad_weight.shape, scale,
        grad_weight.data_ptr(), _native.threads(grads.numel() + grad_weight.numel()),
    )  # fmt: skip
    if not ok:
        check_range(tokens, num_embeddings)


def _ids(tokens: Tensor) -> Tensor:
    return to_dtype(tokens, torch.int64).contiguous()


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
