"""Launches the C++ kernels."""

from __future__ import annotations

from torch import Tensor

from ... import _images, _native


def forward(y: Tensor, x: Tensor, eps: float, backend: str) -> None:
    _launch("pixel_norm_forward", eps, x, y)


def backward(dx: Tensor, grad: Tensor, x: Tensor, eps: float, backend: str) -> None:
    _launch("pixel_norm_backward", eps, grad, x, dx)


def _launch(kernel: str, eps: float, *tensors: Tensor) -> None:
    """``tensors`` ends with the output."""
    out = tensors[-1]
    last = _images.channels_last(out)
    kept: list[Tensor] = []
    arrays = [_images.array(t, last, kept) for t in tensors]
    dtype = str(out.dtype).removeprefix("torch.")
    getattr(_native.cpu_module(), kernel)(dtype, _images.shape(out), last, eps, *arrays, _native.threads(out.numel()))
