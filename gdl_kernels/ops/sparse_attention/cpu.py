"""Launches the C++ kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _native
from . import op


def _call(
    query: Tensor, key: Tensor, key_padding_mask: Tensor | None, layout: Sequence[Tensor], sizes: Sequence[int],
    scale: float, query_start: int, start_tensor: Tensor | None, dropout_p: float, seed: Tensor | None,
) -> tuple[Any, ...]:  # fmt: skip
    """What the bindings take after the tensors: what a kernel is told in numbers is read here."""
    if start_tensor is not None:
        query_start += int(start_tensor)
        op.check_start(query_start, query.shape[2], key.shape[2], sizes)
    drawn = 0 if seed is None else int(seed)
    return key_padding_mask, layout, sizes, scale, query_start, dropout_p, drawn, torch.get_num_threads()


def forward(
    outputs: tuple[Tensor, Tensor], query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None,
    layout: Sequence[Tensor], sizes: Sequence[int], scale: float, query_start: int, start_tensor: Tensor | None,
    dropout_p: float, seed: Tensor | None, _backend: str,
) -> None:  # fmt: skip
    _native.cpu_module().sparse_attention_forward(
        *outputs, query, key, value,
        _call(query, key, key_padding_mask, layout, sizes, scale, query_start, start_tensor, dropout_p, seed),
    )  # fmt: skip


def backward(
    outputs: tuple[Tensor, Tensor, Tensor], grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor,
    value: Tensor, out: Tensor, lse: Tensor, key_padding_mask: Tensor | None, layout: Sequence[Tensor],
    sizes: Sequence[int], scale: float, query_start: int, start_tensor: Tensor | None, dropout_p: float,
    seed: Tensor | None, backend: str,
) -> None:  # fmt: skip
    if _keys_differ_in_a_group(query, key, layout):
        key, value = (_for_each_query_head(query, t) for t in (key, value))
        grads = torch.empty_like(key), torch.empty_like(value)
        backward(
            (outputs[0], *grads), grad_out, grad_lse, query, key, value, out, lse, key_padding_mask, layout, sizes,
            scale, query_start, start_tensor, dropout_p, seed, backend,
        )  # fmt: skip
        _sum_groups(outputs[1:], grads)
        return
    _native.cpu_module().sparse_attention_backward(
        *outputs, grad_out, grad_lse, query, key, value, out, lse,
        _call(query, key, key_padding_mask, layout, sizes, scale, query_start, start_tensor, dropout_p, seed),
    )  # fmt: skip


def double_backward(
    outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], grad_grad_query: Tensor, grad_grad_key: Tensor,
    grad_grad_value: Tensor, grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor,
    out: Tensor, lse: Tensor, key_padding_mask: Tensor | None, layout: Sequence[Tensor], sizes: Sequence[int],
    scale: float, query_start: int, start_tensor: Tensor | None, dropout_p: float, seed: Tensor | None, backend: str,
) -> None:  # fmt: skip
    if _keys_differ_in_a_group(query, key, layout):
        grad_grad_key, grad_grad_value, key, value = (
            _for_each_query_head(query, t) for t in (grad_grad_key, grad_grad_value, key, value)
        )
        grads = torch.empty_like(key), torch.empty_like(value)
        double_backward(
            (*outputs[:3], *grads), grad_grad_query, grad_grad_key, grad_grad_value, grad_out, grad_lse, query, key,
            value, out, lse, key_padding_mask, layout, sizes, scale, query_start, start_tensor, dropout_p, seed,
            backend,
        )  # fmt: skip
        _sum_groups(outputs[3:], grads)
        return
    _native.cpu_module().sparse_attention_double_backward(
        *outputs, grad_grad_query, grad_grad_key, grad_grad_value, grad_out, grad_lse, query, key, value, out, lse,
        _call(query, key, key_padding_mask, layout, sizes, scale, query_start, start_tensor, dropout_p, seed),
    )  # fmt: skip


def _keys_differ_in_a_group(query: Tensor, key: Tensor, layout: Sequence[Tensor]) -> bool:
    """Whether query heads on one key head read it in orders of their own.

    The kernels sum a key's gradients in the order of places, which such heads don't share.
    """
    return layout[11].shape[0] > 1 and query.shape[1] > key.shape[1]


def _for_each_query_head(query: Tensor, tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(query.shape[1] // tensor.shape[1], 1)


def _sum_groups(totals: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    for total, grad in zip(totals, grads):
        torch.sum(grad.unflatten(1, (total.shape[1], -1)), 2, out=total)
