"""Launches the C++ kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _native


def forward(
    outputs: tuple[Tensor, Tensor], query: Tensor, key: Tensor, value: Tensor, scale: float, pool: int, score: str,
    _backend: str,
) -> None:  # fmt: skip
    _native.cpu_module().minibatch_self_attention_forward(
        *outputs, query, key, value, scale, pool, score, torch.get_num_threads()
    )


def backward(
    outputs: tuple[Tensor, Tensor, Tensor], grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor,
    lse: Tensor, scale: float, pool: int, score: str, _backend: str,
) -> None:  # fmt: skip
    _native.cpu_module().minibatch_self_attention_backward(
        *outputs, grad_out, query, key, value, out, lse, scale, pool, score, torch.get_num_threads()
    )


def double_backward(
    outputs: tuple[Tensor, Tensor, Tensor, Tensor], grad_grad_query: Tensor, grad_grad_key: Tensor,
    grad_grad_value: Tensor, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    scale: float, pool: int, score: str, _backend: str,
) -> None:  # fmt: skip
    _native.cpu_module().minibatch_self_attention_double_backward(
        *outputs, grad_grad_query, grad_grad_key, grad_grad_value, grad_out, query, key, value, out, lse, scale, pool,
        score, torch.get_num_threads(),
    )  # fmt: skip
