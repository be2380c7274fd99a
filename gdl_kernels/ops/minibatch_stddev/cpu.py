"""Launches the C++ kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _native


def forward(y: Tensor, x: Tensor, group_size: int, num_features: int, eps: float, _backend: str) -> None:
    _native.cpu_module().minibatch_stddev_forward(y, x, group_size, num_features, eps, torch.get_num_threads())


def backward(
    dx: Tensor, grad: Tensor, x: Tensor, group_size: int, num_features: int, eps: float, _backend: str
) -> None:
    native = _native.cpu_module()
    native.minibatch_stddev_backward(dx, grad, x, group_size, num_features, eps, torch.get_num_threads())
