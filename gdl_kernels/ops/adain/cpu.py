"""Launches the C++ kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _images, _native


def forward(
    outputs: tuple[Tensor, Tensor, Tensor], x: Tensor, scale: Tensor, bias: Tensor, noise: Tensor | None,
    seed: Tensor | None, noise_weight: Tensor | None, channel_bias: Tensor | None, negative_slope: float, eps: float,
    _backend: str,
) -> None:  # fmt: skip
    y, mean, rstd = outputs
    frame = _Frame(y)
    prologue = frame.prologue(noise, seed, noise_weight, channel_bias, negative_slope)
    _native.cpu_module().adain_forward(
        *frame.head, prologue, eps, frame.lines(x), frame.planes(scale), frame.planes(bias), frame.lines(y),
        mean.data_ptr(), rstd.data_ptr(), frame.threads,
    )  # fmt: skip


def statistics(outputs: tuple[Tensor, Tensor], x: Tensor, eps: float, _backend: str) -> None:
    mean, deviation = outputs
    frame = _Frame(x)
    _native.cpu_module().adain_statistics(
        *frame.head, eps, frame.lines(x), mean.data_ptr(), deviation.data_ptr(), frame.threads
    )


def backward(
    outputs: tuple[Tensor, ...], grad: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor,
    noise: Tensor | None, seed: Tensor | None, noise_weight: Tensor | None, channel_bias: Tensor | None,
    negative_slope: float, _eps: float, _backend: str,
) -> None:  # fmt: skip
    dx, *gradients = outputs
    frame = _Frame(dx)
    prologue = frame.prologue(noise, seed, noise_weight, channel_bias, negative_slope)
    _native.cpu_module().adain_backward(
        *frame.head, prologue, frame.lines(grad), frame.lines(x), tuple(map(frame.planes, (scale, mean, rstd))),
        frame.lines(dx), tuple(g.data_ptr() for g in gradients), frame.threads,
    )  # fmt: skip


def double_backward(
    outputs: tuple[Tensor, ...], v: Tensor, v_scale: Tensor, v_bias: Tensor, v_noise_weight: Tensor,
    v_channel_bias: Tensor, grad: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, noise: Tensor | None,
    seed: Tensor | None, noise_weight: Tensor | None, channel_bias: Tensor | None, negative_slope: float, _eps: float,
    _backend: str,
) -> None:  # fmt: skip
    grad_grad, grad_x, of_scale, of_noise_weight, of_channel_bias = outputs
    frame = _Frame(grad_x)
    prologue = frame.prologue(noise, seed, noise_weight, channel_bias, negative_slope)
    directions = tuple(map(frame.planes, (v_scale, v_bias, v_noise_weight, v_channel_bias)))
    _native.cpu_module().adain_double_backward(
        *frame.head, prologue, frame.lines(v), directions, frame.lines(grad), frame.lines(x),
        tuple(map(frame.planes, (scale, mean, rstd))), frame.lines(grad_grad), frame.lines(grad_x),
        (of_scale.data_ptr(), 0, of_noise_weight.data_ptr(), of_channel_bias.data_ptr()), frame.threads,
    )  # fmt: skip


class _Frame:
    """What all passes over images like ``out`` take. Keeps what it makes for them, for as long as it lives."""

    def __init__(self, out: Tensor) -> None:
        self.dtype = out.dtype
        self.shape = _images.shape(out)
        self.last = _images.channels_last(out)
        self.head = str(out.dtype).removeprefix("torch."), self.shape, self.last
        self.threads = _native.threads(out.numel())
        self._kept: list[Tensor] = []

    def lines(self, x: Tensor) -> tuple[int, int, int]:
        return _images.array(x, self.last, self._kept)

    def planes(self, parameter: Tensor) -> int:
        """The address of one number a plane, or a channel."""
        if not parameter.is_contiguous():
            parameter = parameter.contiguous()
            self._kept.append(parameter)
        return parameter.data_ptr()

    def prologue(
        self, noise: Tensor | None, seed: Tensor | None, noise_weight: Tensor | None, channel_bias: Tensor | None,
        negative_slope: float,
    ) -> tuple[Any, ...]:  # fmt: skip
        if noise is None and seed is None and channel_bias is None and negative_slope == 1:
            return False, 0, 0, 0, 0, negative_slope
        images, _, pixels = self.shape
        if seed is not None:
            double = self.dtype == torch.float64
            noise = torch.empty(images, pixels, dtype=torch.float64 if double else torch.float32)
            self._kept.append(noise)
            _native.cpu_module().adain_noise(int(seed), images, pixels, double, noise.data_ptr(), self.threads)
        image = 0 if noise is None or noise.shape[0] == 1 else pixels
        addresses = [0 if t is None else self.planes(t) for t in (noise, noise_weight, channel_bias)]
        return True, addresses[0], image, *addresses[1:], negative_slope
