"""Launches the C++ kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _native
from . import op


def _start(
    query: Tensor, key: Tensor, sizes: list[int], query_start: int, start_tensor: Tensor | None
) -> tuple[int, int]:
    """Position of the first query, and how many keys are read: of a causal layout none past the last query."""
    n_q, n_k = query.shape[2], key.shape[2]
    if start_tensor is not None:
        query_start += int(start_tensor)
        op.check_start(query_start, n_q, n_k, sizes)
    return query_start, min(n_k, query_start + n_q) if sizes[3] else n_k


def _call(
    query: Tensor, value: Tensor, padding: Tensor | None, layout: list[Tensor], sizes: list[int], scale: float,
    start: int, dropout_p: float, seed: Tensor | None,
) -> tuple[str, tuple[Any, ...]]:  # fmt: skip
    batch, heads, n_q, head_dim = query.shape
    _, kv_heads, n_k, value_dim = value.shape
    n_layout_q, n_layout_k, block_size, _causal = sizes
    splits, order = layout[1], layout[11]
    shape = (
        batch, heads, kv_heads, n_q, n_k, head_dim, value_dim,
        n_layout_q, n_layout_k, splits.shape[0], block_size, order.shape[0], start,
    )  # fmt: skip
    addresses = tuple(map(Tensor.data_ptr, layout))
    padding_address = 0 if padding is None else padding.data_ptr()
    seed_value = 0 if seed is None else int(seed)
    call = (shape, addresses, padding_address, scale, dropout_p, seed_value, torch.get_num_threads())
    return str(query.dtype).removeprefix("torch."), call


def _padding(key_padding_mask: Tensor | None, n_seen: int) -> Tensor | None:
    return None if key_padding_mask is None else key_padding_mask[:, :n_seen].contiguous()


def _tensor(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.stride()


def forward(
    outputs: tuple[Tensor, Tensor], query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None,
    layout: list[Tensor], sizes: list[int], scale: float, query_start: int, start_tensor: Tensor | None,
    dropout_p: float, seed: Tensor | None, _backend: str,
) -> None:  # fmt: skip
    out, lse = outputs
    start, n_seen = _start(query, key, sizes, query_start, start_tensor)
    if n_seen < key.shape[2]:  # not so in decoding, where each microsecond is one of each layer and token
        key, value = key[:, :, :n_seen], value[:, :, :n_seen]
    padding = _padding(key_padding_mask, n_seen)
    _native.cpu_module().sparse_attention_forward(
        *_call(query, value, padding, layout, sizes, scale, start, dropout_p, seed),
        _tensor(query), _tensor(key), _tensor(value), _tensor(out), lse.data_ptr(),
    )  # fmt: skip


def backward(
    outputs: tuple[Tensor, Tensor, Tensor], grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor,
    value: Tensor, out: Tensor, lse: Tensor, key_padding_mask: Tensor | None, layout: list[Tensor], sizes: list[int],
    scale: float, query_start: int, start_tensor: Tensor | None, dropout_p: float, seed: Tensor | None, backend: str,
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
    start, n_seen = _start(query, key, sizes, query_start, start_tensor)
    key, value, padding = key[:, :, :n_seen], value[:, :, :n_seen], _padding(key_padding_mask, n_seen)
    # Bound to names: an address outlives a temporary.
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    lse = lse.contiguous()
    _native.cpu_module().sparse_attention_backward(
        *_call(query, value, padding, layout, sizes, scale, start, dropout_p, seed),
        _tensor(grad_out), 0 if grad_lse is None else grad_lse.data_ptr(),
        _tensor(query), _tensor(key), _tensor(value), _tensor(out), lse.data_ptr(),
        *map(_tensor, outputs),
    )  # fmt: skip
    _no_gradients(outputs[1:], n_seen)


def double_backward(
    outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], grad_grad_query: Tensor, grad_grad_key: Tensor,
    grad_grad_value: Tensor, grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor,
    out: Tensor, lse: Tensor, key_padding_mask: Tensor | None, layout: list[Tensor], sizes: list[int],
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
    start, n_seen = _start(query, key, sizes, query_start, start_tensor)
    key, value, padding = key[:, :, :n_seen], value[:, :, :n_seen], _padding(key_padding_mask, n_seen)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    lse = lse.contiguous()
    grad_grad_out, grad_grad_lse, *gradients = outputs
    _native.cpu_module().sparse_attention_double_backward(
        *_call(query, value, padding, layout, sizes, scale, start, dropout_p, seed),
        *map(_tensor, (grad_grad_query, grad_grad_key, grad_grad_value, grad_out)),
        0 if grad_lse is None else grad_lse.data_ptr(),
        *map(_tensor, (query, key, value, out)), lse.data_ptr(),
        _tensor(grad_grad_out), grad_grad_lse.data_ptr(), *map(_tensor, gradients),
    )  # fmt: skip
    _no_gradients(outputs[3:], n_seen)


def _keys_differ_in_a_group(query: Tensor, key: Tensor, layout: list[Tensor]) -> bool:
    """Whether query heads on one key head read it in orders of their own.

    The kernels sum a key's gradients in the order of places, which such heads don't share.
    """
    return query.shape[1] > key.shape[1] and layout[11].shape[0] > 1


def _for_each_query_head(query: Tensor, tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(query.shape[1] // tensor.shape[1], 1)


def _sum_groups(totals: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    for total, grad in zip(totals, grads):
        torch.sum(grad.unflatten(1, (total.shape[1], -1)), 2, out=total)


def _no_gradients(grads: Sequence[Tensor], n_seen: int) -> None:
    for grad in grads:
        grad[:, :, n_seen:].zero_()
