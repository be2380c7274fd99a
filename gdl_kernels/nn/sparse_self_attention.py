"""Multi-head self-attention over a layout, as a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn

from ..layouts import Layout
from ..ops.sparse_attention import sparse_attention
from .key_value_cache import KeyValueCache

#: Of each layout its copies on other devices, as long as a module holds them: layers go on sharing one.
_copies: WeakKeyDictionary[Layout, WeakValueDictionary[torch.device, Layout]] = WeakKeyDictionary()


class SparseSelfAttention(nn.Module):
    """Multi-head self-attention over the pairs that a layout keeps: :func:`gdl_kernels.sparse_attention` as a layer.

    ``y = out(concat_h(attention(q_h, k_g, v_g)))`` with ``q, k, v = qkv(x)`` and ``g = h // (num_heads //
    num_kv_heads)``. Weights are drawn as ``torch.nn.MultiheadAttention`` draws them (``qkv`` Xavier-uniform, ``out`` as
    ``nn.Linear``, biases 0), and without grouped heads ``qkv.weight`` is its ``in_proj_weight``.

    Each layer may have a pattern of its own; layers given the same layout share it, also after ``.to(device)``, which
    takes the layout along. It is no part of the state dict.

    Args:
        embed_dim: features of input and output.
        num_heads: query heads.
        layout: which positions each position sees. A causal one serves every length up to its own, and a cache.
        num_kv_heads: key and value heads, a divisor of ``num_heads``; default ``num_heads``.
        head_dim: features of a head; default ``embed_dim / num_heads``.
        bias: whether the projections add one.
        dropout: of attention weights, in training only.
        backend: that of every call of this layer.

    Raises:
        ValueError: if a size is out of its range or does not divide what it must, or ``layout`` has other heads.
        TypeError: if an argument is of another type.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        layout: Layout,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _positive("embed_dim", embed_dim)
        _positive("num_heads", num_heads)
        num_kv_heads = num_heads if num_kv_heads is None else _positive("num_kv_heads", num_kv_heads)
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads, {num_heads}, got {num_kv_heads}")
        if head_dim is None:
            if embed_dim % num_heads:
                raise ValueError(
                    f"embed_dim must be a multiple of num_heads, {num_heads}, unless head_dim is given, got {embed_dim}"
                )
            head_dim = embed_dim // num_heads
        _positive("head_dim", head_dim)
        if not isinstance(dropout, (int, float)):
            raise TypeError(f"dropout must be a number, got {type(dropout).__name__}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be from 0 up to, not including, 1, got {dropout}")
        _check_layout(layout, num_heads)
        self.embed_dim, self.head_dim = embed_dim, head_dim
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.layout, self.dropout, self.backend = layout, dropout, backend
        self.qkv = nn.Linear(
            embed_dim, (num_heads + 2 * num_kv_heads) * head_dim, bias=bias, device=device, dtype=dtype
        )
        self.out = nn.Linear(num_heads * head_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.qkv.weight)
        self.out.reset_parameters()
        for linear in (self.qkv, self.out):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def cache(self, batch: int = 1, capacity: int | None = None) -> KeyValueCache:
        """An empty cache for decoding with this layer, on its device, in the dtype that it computes keys in.

        Args:
            batch: sequences that are decoded side by side.
            capacity: the most positions; default those of the layout.
        """
        weight = self.qkv.weight
        dtype, device_type = weight.dtype, weight.device.type
        if torch.is_autocast_enabled(device_type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device_type)
        capacity = self.layout.n_k if capacity is None else capacity
        return KeyValueCache(batch, self.num_kv_heads, capacity, self.head_dim, device=weight.device, dtype=dtype)

    def forward(
        self,
        x: Tensor,
        *,
        layout: Layout | None = None,
        key_padding_mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Attend among the positions of ``x``, and to those in ``cache``.

        Args:
            x: ``(B, N, embed_dim)``.
            layout: in place of the layer's own, for this call.
            key_padding_mask: bool ``(B, keys)``, True for positions that none may see; ``keys`` counts those in
                ``cache`` too.
            cache: what came before ``x``; grows by ``x``. Needs a causal layout, and no gradient. One more token costs
                what its row of the layout keeps, not what was decoded before.

        Returns:
            ``(B, N, embed_dim)``. Differentiable as :func:`gdl_kernels.sparse_attention` is.

        Raises:
            ValueError: if shapes do not fit the layer, the layout or the cache, or the cache has no room. The cache is
                then as it was.
            TypeError: if an argument is of another type or dtype.
            RuntimeError: if there is a cache and a gradient is asked for; or ``backend`` can't serve the call.
        """
        layout = self.layout if layout is None else layout
        self._check(x, layout, key_padding_mask, cache)
        start = 0 if cache is None else cache.length
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H + 2 Hkv, N, D]
        sizes = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        query, key, value = heads.split_with_sizes(sizes, 1)
        if cache is not None:
            key, value = cache.extend(key, value)
        seen = sparse_attention(
            query, key, value, layout, dropout_p=self.dropout if self.training else 0.0,
            key_padding_mask=key_padding_mask, query_start=start, backend=self.backend,
        )  # fmt: skip
        return self.out(seen.transpose(1, 2).flatten(2))

    def _check(self, x: Tensor, layout: Layout, key_padding_mask: Tensor | None, cache: KeyValueCache | None) -> None:
        """All that sparse_attention would refuse after the cache has grown, in the terms of this call."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        if x.dim() != 3 or x.shape[2] != self.embed_dim:
            raise ValueError(f"x must be (batch, positions, {self.embed_dim}), got shape {tuple(x.shape)}")
        _check_layout(layout, self.num_heads)
        if layout.device != x.device:
            raise ValueError(f"layout must be on the device of x, {x.device}, got {layout.device}: layout.to(...)")
        start = 0
        if cache is not None:
            if not isinstance(cache, KeyValueCache):
                raise TypeError(f"cache must be a KeyValueCache, got {type(cache).__name__}")
            if not layout.causal:
                raise ValueError("layout must be causal where there is a cache, got one that sees later positions")
            start = cache.length
        end = start + x.shape[1]
        if end > min(layout.n_q, layout.n_k) or (not layout.causal and end != layout.n_k):
            raise ValueError(f"layout must have the {end} positions of x{' and cache' * bool(start)}, got {layout!r}")
        if key_padding_mask is not None:
            if not isinstance(key_padding_mask, Tensor) or key_padding_mask.dtype != torch.bool:
                found = key_padding_mask.dtype if isinstance(key_padding_mask, Tensor) else type(key_padding_mask)
                raise TypeError(f"key_padding_mask must be a bool tensor, True for keys to leave out, got {found}")
            if key_padding_mask.shape != (x.shape[0], end):
                raise ValueError(
                    f"key_padding_mask must be {(x.shape[0], end)}, got shape {tuple(key_padding_mask.shape)}"
                )
            if key_padding_mask.device != x.device:
                raise ValueError(f"key_padding_mask must be on {x.device}, got {key_padding_mask.device}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseSelfAttention:
        super()._apply(fn, recurse)
        # Where fn takes a tensor, the layout goes. Not by fn itself, which may change dtypes or leave values behind.
        device = fn(torch.empty(0, dtype=torch.int32, device=self.layout.device)).device
        if device.type != "meta":  # which has no values, that nothing could bring back
            self.layout = on_device(self.layout, device)
        return self

    def extra_repr(self) -> str:
        return (
            f"{self.embed_dim}, {self.num_heads}, {self.layout!r}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, bias={self.qkv.bias is not None}, dropout={self.dropout}, "
            f"backend={self.backend!r}"
        )


def on_device(layout: Layout, device: torch.device) -> Layout:
    """The layout on a device, the same one at every call while somebody holds it."""
    if layout.device == device:
        return layout
    copies = _copies.setdefault(layout, WeakValueDictionary())
    copy = copies.get(device)
    if copy is None:
        copy = copies[device] = layout.to(device)
    return copy


def _check_layout(layout: Any, num_heads: int) -> None:
    if not isinstance(layout, Layout):
        raise TypeError(f"layout must be a gdl_kernels.layouts.Layout, got {type(layout).__name__}")
    if layout.heads not in (1, num_heads):
        raise ValueError(f"layout must have 1 head or as many as the queries, {num_heads}, got {layout.heads}")


def _positive(name: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value
