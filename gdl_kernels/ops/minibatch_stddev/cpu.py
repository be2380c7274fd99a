"""Launches the C++ kernels."""

from __future__ import annotations

from torch import Tensor

from ... import _images, _native


def forward(y: Tensor, x: Tensor, group_size: int, num_features: int, eps: float, backend: str) -> None:
    _launch("minibatch_stddev_forward", x, group_size, num_features, eps, x, y)


def backward(dx: Tensor, grad: Tensor, x: Tensor, group_size: int, num_features: int, eps: float, backend: str) -> None:
    _launch("minibatch_stddev_backward", x, group_size, num_features, eps, grad, x, dx)


def _launch(kernel: str, x: Tensor, group_size: int, num_features: int, eps: float, *tensors: Tensor) -> None:
    last = _images.channels_last(x)
    kept: list[Tensor] = []
    arrays = [_images.array(t, last, kept) for t in tensors]
    dtype = str(x.dtype).removeprefix("torch.")
    group = min(group_size, x.shape[0])
    native = getattr(_native.cpu_module(), kernel)
    native(dtype, _images.shape(x), last, group, num_features, eps, *arrays, _native.threads(x.numel()))
