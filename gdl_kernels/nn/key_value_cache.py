"""Keys and values of what was decoded so far."""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValueCache:
    """The keys and values of one attention layer's positions so far, in memory set aside for all that may come.

    For decoding: it holds no autograd graph, so it is extended under ``torch.no_grad()`` or ``torch.inference_mode()``.

    Args:
        batch: sequences that are decoded side by side.
        heads: key heads.
        capacity: the most positions that it can hold.
        head_dim: features of a key, and of a value.

    Attributes:
        keys, values: ``(batch, heads, capacity, head_dim)``; what lies past ``length`` means nothing.
        length: positions that it holds.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        capacity: int,
        head_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, size, least in (
            ("batch", batch, 0), ("heads", heads, 1), ("capacity", capacity, 1), ("head_dim", head_dim, 1),
        ):  # fmt: skip
            if not isinstance(size, int) or isinstance(size, bool):
                raise TypeError(f"{name} must be an integer, got {size!r}")
            if size < least:
                raise ValueError(f"{name} must be at least {least}, got {size}")
        shape = (batch, heads, capacity, head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put the keys and values of new positions behind those of the old, and return all. The old are not copied.

        Args:
            key, value: ``(batch, heads, N, head_dim)``, in the cache's dtype, on its device.

        Returns:
            Views of ``keys`` and ``values``, ``(batch, heads, length, head_dim)``.

        Raises:
            ValueError: if shapes or devices do not fit, or there is no room for ``N`` more.
            TypeError: if dtypes do not fit.
            RuntimeError: if ``key`` or ``value`` is part of an autograd graph.
        """
        batch, heads, capacity, head_dim = self.keys.shape
        for name, tensor in (("key", key), ("value", value)):
            if tensor.dim() != 4 or (*tensor.shape[:2], tensor.shape[3]) != (batch, heads, head_dim):
                raise ValueError(
                    f"{name} must be (batch, heads, positions, features) with the cache's batch of {batch}, {heads} "
                    f"heads and {head_dim} features, got shape {tuple(tensor.shape)}"
                )
            if tensor.dtype != self.keys.dtype:
                raise TypeError(f"{name} must have the cache's dtype, {self.keys.dtype}, got {tensor.dtype}")
            if tensor.device != self.keys.device:
                raise ValueError(f"{name} must be on the cache's device, {self.keys.device}, got {tensor.device}")
            if torch.is_grad_enabled() and tensor.requires_grad:
                raise RuntimeError(
                    f"{name} requires a gradient, and a cache passes none on: decode under torch.no_grad()"
                )
        if value.shape != key.shape:
            raise ValueError(f"value must have the shape of key, {tuple(key.shape)}, got {tuple(value.shape)}")
        start, end = self.length, self.length + key.shape[2]
        if end > capacity:
            raise ValueError(f"cache has room for {capacity} positions and holds {start}, got {key.shape[2]} more")
        # narrow, as an index of slices takes twice as long: more than the copy does for one position.
        self.keys.narrow(2, start, end - start).copy_(key)
        self.values.narrow(2, start, end - start).copy_(value)
        self.length = end
        return self.keys.narrow(2, 0, end), self.values.narrow(2, 0, end)

    def reset(self, length: int = 0) -> None:
        """Forget all but the first ``length`` positions.

        Raises:
            ValueError: if it holds fewer.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"length must be from 0 to {self.length}, what the cache holds, got {length}")
        self.length = length

    def select(self, index: Tensor) -> None:
        """Go on with some of the sequences, each as often as it is named: sequence ``i`` is the old ``index[i]``.

        For beam search. Takes new memory, and copies what is held.

        Args:
            index: int64 ``(new batch,)``, on the cache's device.

        Raises:
            ValueError: if ``index`` is not one-dimensional or elsewhere.
            TypeError: if ``index`` is not int64.
        """
        if index.dtype != torch.int64:
            raise TypeError(f"index must be int64, got {index.dtype}")
        if index.dim() != 1:
            raise ValueError(f"index must be (new batch,), got shape {tuple(index.shape)}")
        if index.device != self.keys.device:
            raise ValueError(f"index must be on the cache's device, {self.keys.device}, got {index.device}")
        self.keys, self.values = (self._selected(tensor, index) for tensor in (self.keys, self.values))

    def _selected(self, tensor: Tensor, index: Tensor) -> Tensor:
        chosen = tensor.new_empty(len(index), *tensor.shape[1:])
        chosen[:, :, : self.length] = tensor[:, :, : self.length].index_select(0, index)
        return chosen

    def __repr__(self) -> str:
        batch, heads, capacity, head_dim = self.keys.shape
        return (
            f"KeyValueCache(batch={batch}, heads={heads}, capacity={capacity}, head_dim={head_dim}, "
            f"length={self.length}, dtype={self.keys.dtype}, device={str(self.keys.device)!r})"
        )
