"""Launches the C++ kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _native
from .phases import phase_steps
from .reference import check_range


def forward(out: Tensor, tokens: Tensor, weight: Tensor, scale: float, start: int, _backend: str) -> None:
    steps = phase_steps(weight.shape[1], weight.device)
    threads = torch.get_num_threads()
    if not _native.cpu_module().positional_embedding_forward(out, tokens, weight, scale, start, steps, threads):
        check_range(tokens, weight.shape[0])


def backward(
    grad_weight: Tensor, grad: Tensor, tokens: Tensor, num_embeddings: int, scale: float, _backend: str
) -> None:
    threads = torch.get_num_threads()
    if not _native.cpu_module().positional_embedding_backward(grad_weight, grad, tokens, scale, threads):
        check_range(tokens, num_embeddings)
