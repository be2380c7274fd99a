"""Block-sparse attention."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal, overload

import torch
from torch import Tensor

from ..._arguments import autocast_is_on, check_finite, check_floating, in_autocast
from ..._philox import draw_seed
from ...layouts import Layout
from . import op
from .merge import merge_attention


@overload
def sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, *, scale: float | None = ..., dropout_p: float = ...,
    key_padding_mask: Tensor | None = ..., query_start: int | Tensor = ..., return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, *, scale: float | None = ..., dropout_p: float = ...,
    key_padding_mask: Tensor | None = ..., query_start: int | Tensor = ..., return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    key_padding_mask: Tensor | None = None,
    query_start: int | Tensor = 0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the pairs that a layout keeps (Sparse Transformer, arXiv 1904.10509).

    ``out[b, h, i] = sum_j p[i, j] value[b, g, j]`` with ``p[i, :] = softmax_j(scale * <query[b, h, i], key[b, g, j]>)``
    over the keys ``j`` that row ``query_start + i`` of the layout keeps, and ``g = h // (H // Hkv)``.
    Time and memory grow with the blocks that the layout keeps, not with ``Nq * Nk``.
    A layout with ``rest`` takes a pass for each of its parts; they are merged as ``merge_attention`` does.

    Args:
        query: ``(B, H, Nq, D)``, any strides.
        key: ``(B, Hkv, Nk, D)``; ``Hkv`` divides ``H``.
        value: ``(B, Hkv, Nk, Dv)``.
        layout: rows ``query_start`` to ``query_start + Nq - 1`` are used. ``layout.n_k`` is ``Nk``; a causal layout may
            be longer, so that one layout serves a growing cache.
        scale: default ``1 / sqrt(D)``.
        dropout_p: each weight ``p[i, j]`` is dropped with this probability, and the others are divided by
            ``1 - dropout_p``; ``lse`` is that of all. Drawn at every call, in evaluation too. What is dropped hangs on
            a seed from torch's generator of the CPU and on the positions of the pair: after one ``torch.manual_seed``
            all backends drop the same, on every device.
        key_padding_mask: bool ``(B, Nk)``, True for keys that no query may see.
        query_start: position of the first query; decoding with a cache has ``Nq = 1`` and ``query_start = Nk - 1``. Or
            an integer tensor of one element on the device of ``query``, which is read there: so a CUDA graph can
            decode into a cache of fixed length. Keys of a causal layout past the last query are not read. On a GPU its
            value can't be checked beforehand: queries past the end of the layout keep nothing.
        return_lse: also return ``lse``, the logarithm of each row's softmax denominator.
        backend: overrides the backend of this call.

    Returns:
        ``(B, H, Nq, Dv)`` in the dtype of ``query``, and with ``return_lse`` also ``(B, H, Nq)`` in the dtype that sums
        are kept in: float32, for float64 float64. A row that keeps nothing gives 0, zero gradients and ``lse = -inf``.
        Differentiable without limit in ``query``, ``key`` and ``value``, through ``lse`` too. From the third derivative
        on the compiled backends use the reference, in O(Nq * Nk) memory.

    Raises:
        ValueError: if shapes, head counts, lengths or devices do not fit each other or the layout.
        TypeError: if dtypes differ or are not floating point.
        RuntimeError: if ``backend`` was given and can't serve the call.
    """
    if autocast_is_on():
        query, key, value = in_autocast(query, key, value)
    if not isinstance(layout, Layout):
        raise TypeError(f"layout must be a gdl_kernels.layouts.Layout, got {type(layout).__name__}")
    start, start_tensor = (0, query_start) if isinstance(query_start, Tensor) else (query_start, None)
    chosen, scale = _serving(
        backend, query, key, value, layout.mask_table, layout.heads, scale, dropout_p, key_padding_mask, start_tensor
    )
    sizes = layout.sizes()
    _check_lengths(query.shape[2], key.shape[2], query_start, sizes)
    if start_tensor is not None:
        start_tensor = start_tensor.view(())
    seed = draw_seed(query.device).to(query.device) if dropout_p > 0 else None
    rest = (scale, start, start_tensor, dropout_p, seed)
    if chosen == "reference":
        out, lse = op.by_reference(query, key, value, key_padding_mask, layout, *rest, return_lse)
    else:
        call = (query, key, value, key_padding_mask)
        out, lse = op.forward(*call, layout.tensors(), sizes, *rest, chosen)
        outs, lses = [out], [lse]
        while layout.rest is not None:
            layout = layout.rest
            out, lse = op.forward(*call, layout.tensors(), layout.sizes(), *rest, chosen)
            outs.append(out)
            lses.append(lse)
        if len(outs) > 1:
            out, lse = merge_attention(outs, lses)
    return (out, lse) if return_lse else out  # type: ignore[return-value]


@partial(op.choices.serving, growing={"query": 2, "key": 2, "value": 2, "key_padding_mask": 1})
def _serving(
    backend: str | None, query: Tensor, key: Tensor, value: Tensor, layout: Tensor, layout_heads: int,
    scale: float | None, dropout_p: float, key_padding_mask: Tensor | None, query_start: Tensor | None,
) -> tuple[str, float]:  # fmt: skip
    """The backend, and the scale. ``layout`` is a tensor of it, for its device."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_floating(name, tensor)
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be (batch, heads, positions, features), got shape {tuple(tensor.shape)}")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} must have the dtype of query, {query.dtype}, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on the device of query, {query.device}, got {tensor.device}")
    batch, heads, _, head_dim = query.shape
    key_batch, kv_heads, n_k, key_dim = key.shape
    value_batch, value_heads, value_positions, value_dim = value.shape
    if key_batch != batch or value_batch != batch:
        sizes = f"{key_batch} and {value_batch}"
        raise ValueError(f"key and value must have the batch size of query, {batch}, got {sizes}")
    if value_heads != kv_heads or value_positions != n_k:
        raise ValueError(
            f"value must have the heads and positions of key, {(kv_heads, n_k)}, got {(value_heads, value_positions)}"
        )
    if key_dim != head_dim:
        raise ValueError(f"key must have the features of query, {head_dim}, got {key_dim}")
    if head_dim == 0 or value_dim == 0:
        raise ValueError("query, key and value must have at least one feature, got 0")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"the heads of key, {kv_heads}, must divide the heads of query, {heads}")
    if layout_heads not in (1, heads):
        raise ValueError(f"layout must have 1 head or as many as query, {heads}, got {layout_heads}")
    if layout.device != query.device:
        raise ValueError(f"layout must be on the device of query, {query.device}, got {layout.device}: layout.to(...)")
    if scale is not None:
        check_finite("scale", scale)
    if not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p must be a number, got {type(dropout_p).__name__}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be from 0 up to, not including, 1, got {dropout_p}")
    if key_padding_mask is not None:
        if not isinstance(key_padding_mask, Tensor):
            raise TypeError(f"key_padding_mask must be a tensor, got {type(key_padding_mask).__name__}")
        if key_padding_mask.dtype != torch.bool:
            raise TypeError(f"key_padding_mask must be bool, True for keys to leave out, got {key_padding_mask.dtype}")
        if key_padding_mask.shape != (batch, n_k):
            raise ValueError(f"key_padding_mask must be {(batch, n_k)}, got {tuple(key_padding_mask.shape)}")
        if key_padding_mask.device != query.device:
            raise ValueError(f"key_padding_mask must be on {query.device}, got {key_padding_mask.device}")
    if query_start is not None:
        if query_start.is_floating_point() or query_start.is_complex() or query_start.dtype == torch.bool:
            raise TypeError(f"query_start must be of an integer dtype, got {query_start.dtype}")
        if query_start.numel() != 1:
            raise ValueError(f"query_start must have one element, got shape {tuple(query_start.shape)}")
        if query_start.device != query.device:
            raise ValueError(f"query_start must be on the device of query, {query.device}, got {query_start.device}")
    chosen = op.choices.pick(query.device, backend, query, key, value)
    return chosen, head_dim**-0.5 if scale is None else scale


def _check_lengths(n_q: int, n_k: int, query_start: int | Tensor, sizes: Sequence[int]) -> None:
    """What grows as tokens are decoded is checked at every call: remembered, each length would be a kind of its own."""
    _, layout_n_k, _, causal = sizes
    if n_k != layout_n_k and (n_k > layout_n_k or not causal):
        raise ValueError(f"layout is for {layout_n_k} keys, got {n_k}")
    if isinstance(query_start, (int, torch.SymInt)):
        op.check_start(query_start, n_q, n_k, sizes)
    elif not isinstance(query_start, Tensor):
        raise TypeError(f"query_start must be an integer or a tensor of one, got {type(query_start).__name__}")
