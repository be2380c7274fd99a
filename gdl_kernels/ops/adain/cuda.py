"""Launches the CUDA kernels."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ... import _images, _native


def forward(
    outputs: tuple[Tensor, Tensor], x: Tensor, scale: Tensor, bias: Tensor, noise: Tensor | None, seed: Tensor | None,
    noise_weight: Tensor | None, channel_bias: Tensor | None, negative_slope: float, eps: float, _backend: str,
) -> None:  # fmt: skip
    y, statistics = outputs
    mean, rstd = statistics
    with _Frame(y) as frame:
        prologue = frame.prologue(noise, seed, noise_weight, channel_bias, negative_slope)
        frame.module.adain_forward(
            *frame.head(), prologue, eps, frame.lines(x), frame.planes(scale), frame.planes(bias), frame.lines(y),
            mean.data_ptr(), rstd.data_ptr(), *frame.tail(),
        )  # fmt: skip


def statistics(out: Tensor, x: Tensor, eps: float) -> None:
    """To ``out``, ``(2, N, C)``: the mean and ``sqrt(var + eps)`` of every plane."""
    mean, deviation = out
    with _Frame(x) as frame:
        frame.module.adain_statistics(
            *frame.head(), eps, frame.lines(x), mean.data_ptr(), deviation.data_ptr(), *frame.tail()
        )


def backward(
    outputs: tuple[Tensor, ...], grad: Tensor, x: Tensor, scale: Tensor, statistics: Tensor, noise: Tensor | None,
    seed: Tensor | None, noise_weight: Tensor | None, channel_bias: Tensor | None, negative_slope: float, _eps: float,
    _backend: str,
) -> None:  # fmt: skip
    dx, *gradients = outputs
    with _Frame(dx) as frame:
        prologue = frame.prologue(noise, seed, noise_weight, channel_bias, negative_slope)
        frame.module.adain_backward(
            *frame.head(), prologue, frame.lines(grad), frame.lines(x), tuple(map(frame.planes, (scale, *statistics))),
            frame.lines(dx), tuple(g.data_ptr() for g in gradients), *frame.tail(),
        )  # fmt: skip


def double_backward(
    outputs: tuple[Tensor, ...], v: Tensor, v_scale: Tensor, v_bias: Tensor, v_noise_weight: Tensor,
    v_channel_bias: Tensor, grad: Tensor, x: Tensor, scale: Tensor, statistics: Tensor, noise: Tensor | None,
    seed: Tensor | None, noise_weight: Tensor | None, channel_bias: Tensor | None, negative_slope: float, _eps: float,
    _backend: str,
) -> None:  # fmt: skip
    grad_grad, grad_x, of_scale, of_noise_weight, of_channel_bias = outputs
    with _Frame(grad_x) as frame:
        prologue = frame.prologue(noise, seed, noise_weight, channel_bias, negative_slope)
        directions = tuple(map(frame.planes, (v_scale, v_bias, v_noise_weight, v_channel_bias)))
        gradients = of_scale.data_ptr(), 0, of_noise_weight.data_ptr(), of_channel_bias.data_ptr()
        frame.module.adain_double_backward(
            *frame.head(), prologue, frame.lines(v), directions, frame.lines(grad), frame.lines(x),
            tuple(map(frame.planes, (scale, *statistics))), frame.lines(grad_grad), frame.lines(grad_x), gradients,
            *frame.tail(),
        )  # fmt: skip


class _Frame:
    """What all passes over images like ``out`` take, on its device.

    Keeps the copies that it makes and the memory that kernels ask for until they are launched: what comes after on the
    same stream may have it.
    """

    def __init__(self, out: Tensor) -> None:
        self.out = out
        self.last = _images.channels_last(out)
        self._kept: list[Tensor] = []
        self._device = torch.cuda.device(out.device)

    def __enter__(self) -> _Frame:
        self._device.__enter__()
        self.stream = torch.cuda.current_stream().cuda_stream
        return self

    def __exit__(self, *error: Any) -> None:
        self._device.__exit__(*error)

    @property
    def module(self) -> ModuleType:
        return _native.cuda_module()

    def head(self) -> tuple[str, tuple[int, int, int], bool]:
        return str(self.out.dtype).removeprefix("torch."), _images.shape(self.out), self.last

    def tail(self) -> tuple[Any, int]:
        return self._allocate, self.stream

    def lines(self, x: Tensor) -> tuple[int, int, int]:
        lines = _images.lines(x, self.last)
        self._kept.append(lines.tensor)
        return lines.array()

    def planes(self, parameter: Tensor) -> int:
        """The address of one number a plane, or a channel."""
        self._kept.append(parameter.contiguous())
        return self._kept[-1].data_ptr()

    def prologue(
        self, noise: Tensor | None, seed: Tensor | None, noise_weight: Tensor | None, channel_bias: Tensor | None,
        negative_slope: float,
    ) -> tuple[Any, ...]:  # fmt: skip
        images, _, pixels = _images.shape(self.out)
        if seed is not None:
            noise = torch.empty(images, pixels, dtype=torch.float32, device=self.out.device)
            self.module.adain_noise(seed.data_ptr(), images, pixels, noise.data_ptr(), self.stream)
        active = noise is not None or channel_bias is not None or negative_slope != 1
        image = 0 if noise is None or noise.shape[0] == 1 else pixels
        addresses = [0 if t is None else self.planes(t) for t in (noise, noise_weight, channel_bias)]
        return active, addresses[0], image, *addresses[1:], negative_slope

    def _allocate(self, floats: int) -> int:
        self._kept.append(torch.empty(floats, dtype=torch.float32, device=self.out.device))
        return self._kept[-1].data_ptr()
