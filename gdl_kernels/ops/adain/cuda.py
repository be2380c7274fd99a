"""Launches the CUDA kernels."""

from __future__ import annotations

from torch import Tensor

from ..._cuda_launch import launch


def forward(
    outputs: tuple[Tensor, Tensor], x: Tensor, scale: Tensor, bias: Tensor, noise: Tensor | None, seed: Tensor | None,
    noise_weight: Tensor | None, channel_bias: Tensor | None, negative_slope: float, eps: float, _backend: str,
) -> None:  # fmt: skip
    y, statistics = outputs
    prologue = noise, seed, noise_weight, channel_bias, negative_slope
    launch("adain_forward", y, statistics, x, scale, bias, prologue, eps)


def backward(
    outputs: tuple[Tensor, ...], grad: Tensor, x: Tensor, scale: Tensor, statistics: Tensor, noise: Tensor | None,
    seed: Tensor | None, noise_weight: Tensor | None, channel_bias: Tensor | None, negative_slope: float, _eps: float,
    _backend: str,
) -> None:  # fmt: skip
    dx, *gradients = outputs
    prologue = noise, seed, noise_weight, channel_bias, negative_slope
    launch("adain_backward", dx, gradients, grad, x, scale, statistics, prologue)


def double_backward(
    outputs: tuple[Tensor, ...], v: Tensor, v_scale: Tensor | None, v_bias: Tensor | None,
    v_noise_weight: Tensor | None, v_channel_bias: Tensor | None, grad: Tensor, x: Tensor, scale: Tensor,
    statistics: Tensor, noise: Tensor | None, seed: Tensor | None, noise_weight: Tensor | None,
    channel_bias: Tensor | None, negative_slope: float, _eps: float, _backend: str,
) -> None:  # fmt: skip
    grad_grad, grad_x, *gradients = outputs
    directions = v_scale, v_bias, v_noise_weight, v_channel_bias
    prologue = noise, seed, noise_weight, channel_bias, negative_slope
    launch("adain_double_backward", grad_grad, grad_x, gradients, v, directions, grad, x, scale, statistics, prologue)


def noise_gradient(out: Tensor, gradient: Tensor, weight: Tensor, _noise: Tensor, _backend: str) -> None:
    launch("adain_noise_gradient", out, gradient, weight)
