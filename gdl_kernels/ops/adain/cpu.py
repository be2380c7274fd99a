"""Launches the C++ kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _native


def forward(
    outputs: tuple[Tensor, Tensor], x: Tensor, scale: Tensor, bias: Tensor, noise: Tensor | None, seed: Tensor | None,
    noise_weight: Tensor | None, channel_bias: Tensor | None, negative_slope: float, eps: float, _backend: str,
) -> None:  # fmt: skip
    y, statistics = outputs
    prologue = noise, seed, noise_weight, channel_bias, negative_slope
    _native.cpu_module().adain_forward(y, statistics, x, scale, bias, prologue, eps, torch.get_num_threads())


def backward(
    outputs: tuple[Tensor, ...], grad: Tensor, x: Tensor, scale: Tensor, statistics: Tensor, noise: Tensor | None,
    seed: Tensor | None, noise_weight: Tensor | None, channel_bias: Tensor | None, negative_slope: float, _eps: float,
    _backend: str,
) -> None:  # fmt: skip
    dx, *gradients = outputs
    prologue = noise, seed, noise_weight, channel_bias, negative_slope
    _native.cpu_module().adain_backward(dx, gradients, grad, x, scale, statistics, prologue, torch.get_num_threads())


def double_backward(
    outputs: tuple[Tensor, ...], v: Tensor, v_scale: Tensor | None, v_bias: Tensor | None,
    v_noise_weight: Tensor | None, v_channel_bias: Tensor | None, grad: Tensor, x: Tensor, scale: Tensor,
    statistics: Tensor, noise: Tensor | None, seed: Tensor | None, noise_weight: Tensor | None,
    channel_bias: Tensor | None, negative_slope: float, _eps: float, _backend: str,
) -> None:  # fmt: skip
    grad_grad, grad_x, *gradients = outputs
    directions = v_scale, v_bias, v_noise_weight, v_channel_bias
    prologue = noise, seed, noise_weight, channel_bias, negative_slope
    _native.cpu_module().adain_double_backward(
        grad_grad, grad_x, gradients, v, directions, grad, x, scale, statistics, prologue, torch.get_num_threads()
    )
