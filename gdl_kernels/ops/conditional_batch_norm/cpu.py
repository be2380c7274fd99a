"""Launches the C++ kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _images, _native
from .passes import Term


def moments(x: Tensor, last: bool) -> Tensor:
    out = x.new_empty(2, x.shape[1], dtype=torch.float64)
    mean = out.data_ptr()
    kernel = _native.cpu_module().conditional_batch_norm_moments
    kernel(
        *_images_of(x, last), _images.lines(x, last).array(), mean, mean + out.nbytes // 2, _native.threads(x.numel())
    )
    return out


def sums(v: Tensor | None, grad: Tensor, x: Tensor, mean: Tensor, last: bool) -> Tensor:
    out = mean.new_empty(2 if v is None else 5, *x.shape[:2])
    tensors = [None if t is None else _images.lines(t, last).array() for t in (v, grad, x)]
    kernel = _native.cpu_module().conditional_batch_norm_sums
    kernel(*_images_of(x, last), *tensors, mean.data_ptr(), out.data_ptr(), _native.threads(x.numel()))
    return out


def combine(out: Tensor, others: Sequence[Term], x: Term | None, mean: Tensor, offset: Tensor, last: bool) -> None:
    # Named, so that the contiguous ones live as long as the call.
    terms = [(_images.lines(t, last), weight.contiguous()) for t, weight in (*others, *([x] if x else []))]
    offset = offset.contiguous()
    arrays = [(lines.array(), _planes(weight)) for lines, weight in terms]
    kernel = _native.cpu_module().conditional_batch_norm_combine
    kernel(
        *_images_of(out, last), arrays[: len(others)], arrays[-1] if x else None, mean.data_ptr(), _planes(offset),
        _images.lines(out, last).array(), _native.threads(out.numel()),
    )  # fmt: skip


def _images_of(x: Tensor, last: bool) -> tuple[str, tuple[int, int, int], bool]:
    return str(x.dtype).removeprefix("torch."), _images.shape(x), last


def _planes(numbers: Tensor) -> tuple[int, int]:
    """Address, and stride from image to image: 0 for numbers of channels, which all images share."""
    return numbers.data_ptr(), numbers.shape[1] if numbers.dim() == 2 else 0
