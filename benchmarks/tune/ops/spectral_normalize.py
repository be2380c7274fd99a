"""Spectral norm of all weights of BigGAN-128's generator, which are wide and narrow, large and small."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import gdl_kernels

from ...biggan import GENERATOR, elements
from ...cases import short
from ..passes import Pass

Shapes = list[tuple[int, int]]


def passes(device: torch.device) -> Iterator[Pass]:
    for dtype in (torch.float32, torch.bfloat16):
        for order in (0, 1):
            yield normalization(order, GENERATOR, dtype, device)


def normalization(order: int, shapes: Shapes, dtype: torch.dtype, device: torch.device) -> Pass:
    @functools.cache
    def vectors(of: torch.dtype) -> list[list[Tensor]]:
        """The same of every call, and in its dtype: u and v are no variables here."""
        generator = torch.Generator(device).manual_seed(0)
        drawn = [[torch.randn(shape[i], generator=generator, device=device) for shape in shapes] for i in (0, 1)]
        return [[F.normalize(x, dim=0).to(of) for x in some] for some in drawn]

    def normalize(*weights: Tensor, backend: str) -> list[Tensor]:
        us, vs = vectors(weights[0].dtype)
        return gdl_kernels.spectral_normalize(list(weights), us, vs, update=False, backend=backend)

    return Pass(
        "spectral_normalize",
        order,
        f"{len(shapes)} matrices, {elements(shapes) / 1e6:.3g} M elements, {short(dtype)}",
        normalize,
        lambda: [torch.randn(shape, device=device, dtype=dtype).mul_(0.02) for shape in shapes],
    )
