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
    shape = _images.shape(x)
    native = getattr(_native.cpu_module(), kernel)
    native(dtype, shape, last, min(group_size, shape[0]), num_features, eps, *arrays, _native.threads(x.numel()))
