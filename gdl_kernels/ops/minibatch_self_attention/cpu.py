"""Launches the C++ kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ... import _images, _native


def forward(
    outputs: tuple[Tensor, Tensor], query: Tensor, key: Tensor, value: Tensor, scale: float, pool: int, score: str,
    _backend: str,
) -> None:  # fmt: skip
    out, lse = outputs
    frame = _Frame(query, value, scale, pool, score)
    _native.cpu_module().minibatch_self_attention_forward(
        *frame.call, *map(frame.map, (query, key, value, out)), lse.data_ptr()
    )


def backward(
    outputs: tuple[Tensor, Tensor, Tensor], grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor,
    lse: Tensor, scale: float, pool: int, score: str, _backend: str,
) -> None:  # fmt: skip
    frame = _Frame(query, value, scale, pool, score)
    _native.cpu_module().minibatch_self_attention_backward(
        *frame.call, *map(frame.map, (grad_out, query, key, value, out)), frame.contiguous(lse),
        *map(frame.map, outputs),
    )  # fmt: skip


def double_backward(
    outputs: tuple[Tensor, Tensor, Tensor, Tensor], grad_grad_query: Tensor, grad_grad_key: Tensor,
    grad_grad_value: Tensor, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    scale: float, pool: int, score: str, _backend: str,
) -> None:  # fmt: skip
    frame = _Frame(query, value, scale, pool, score)
    directions = grad_grad_query, grad_grad_key, grad_grad_value
    _native.cpu_module().minibatch_self_attention_double_backward(
        *frame.call, *map(frame.map, (*directions, grad_out, query, key, value, out)), frame.contiguous(lse),
        *map(frame.map, outputs),
    )  # fmt: skip


class _Frame:
    """What all passes take. Keeps the copies that it makes, for as long as it lives."""

    def __init__(self, query: Tensor, value: Tensor, scale: float, pool: int, score: str) -> None:
        batch, channels, height, width = query.shape
        pixels = height * width
        threads = _native.threads(batch * pixels * (pixels // pool**2))
        sizes = batch, channels, value.shape[1], height, width
        self.call = str(query.dtype).removeprefix("torch."), (*sizes, pool, scale, score == "l2", threads)
        self._kept: list[Tensor] = []

    def map(self, x: Tensor) -> tuple[Any, ...]:
        """Address, strides of images and of lines, and whether a line is a pixel's channels."""
        last = _images.channels_last(x)
        return *_images.array(x, last, self._kept), last

    def contiguous(self, x: Tensor) -> int:
        self._kept.append(x.contiguous())
        return self._kept[-1].data_ptr()
