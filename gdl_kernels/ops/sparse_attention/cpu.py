"""Launches the C++ kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _native


def _call(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, layout: list[Tensor], sizes: list[int],
    scale: float, query_start: int,
) -> tuple[str, tuple[int, ...], tuple[int, ...], int, float, int]:  # fmt: skip
    batch, heads, n_q, head_dim = query.shape
    kv_heads, n_k, value_dim = value.shape[1:]
    n_layout_q, n_layout_k, block_size = sizes
    order = layout[9]
    return (
        str(query.dtype).removeprefix("torch."),
        (
            batch, heads, kv_heads, n_q, n_k, head_dim, value_dim,
            n_layout_q, n_layout_k, layout[1].shape[0], block_size, order.shape[0], query_start,
        ),
        tuple(t.data_ptr() for t in layout),
        0 if padding is None else padding.data_ptr(),
        scale,
        torch.get_num_threads(),
    )  # fmt: skip


def _tensor(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.stride()


def forward(
    outputs: tuple[Tensor, Tensor], query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None,
    layout: list[Tensor], sizes: list[int], scale: float, query_start: int, _backend: str,
) -> None:  # fmt: skip
    out, lse = outputs
    padding = None if key_padding_mask is None else key_padding_mask.contiguous()
    _native.cpu_module().sparse_attention_forward(
        *_call(query, key, value, padding, layout, sizes, scale, query_start),
        _tensor(query), _tensor(key), _tensor(value), _tensor(out), lse.data_ptr(),
    )  # fmt: skip


def backward(
    outputs: tuple[Tensor, Tensor, Tensor], grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor,
    value: Tensor, out: Tensor, lse: Tensor, key_padding_mask: Tensor | None, layout: list[Tensor], sizes: list[int],
    scale: float, query_start: int, _backend: str,
) -> None:  # fmt: skip
    group, order = query.shape[1] // key.shape[1], layout[9]
    if group > 1 and order.shape[0] > 1:
        # The kernel sums a key's gradients in the order of places, which query heads on one key head must then share.
        key, value = (t.repeat_interleave(group, 1) for t in (key, value))
        grads = (outputs[0], torch.empty_like(key), torch.empty_like(value))
        rest = (key_padding_mask, layout, sizes, scale, query_start, _backend)
        backward(grads, grad_out, grad_lse, query, key, value, out, lse, *rest)
        for total, grad in zip(outputs[1:], grads[1:]):
            torch.sum(grad.unflatten(1, (-1, group)), 2, out=total)
        return
    padding = None if key_padding_mask is None else key_padding_mask.contiguous()
    # Bound to names: an address outlives a temporary.
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    lse = lse.contiguous()
    _native.cpu_module().sparse_attention_backward(
        *_call(query, key, value, padding, layout, sizes, scale, query_start),
        _tensor(grad_out), 0 if grad_lse is None else grad_lse.data_ptr(),
        _tensor(query), _tensor(key), _tensor(value), _tensor(out), lse.data_ptr(),
        *map(_tensor, outputs),
    )  # fmt: skip
