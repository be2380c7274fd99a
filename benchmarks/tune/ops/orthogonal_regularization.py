"""Orthogonal regularisation of BigGAN-128's discriminator: of rows, and of columns, which takes their norms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

import gdl_kernels

from ...biggan import DISCRIMINATOR, elements
from ...cases import short
from ...ops.orthogonal_regularization import MOST
from ..passes import Pass

Shapes = list[tuple[int, int]]


def passes(device: torch.device) -> Iterator[Pass]:
    """Of weights whose rows are 16 bytes apart, which most of a model's are: others keep the launcher's own choice."""
    aligned = [shape for shape in DISCRIMINATOR if shape[1] % 8 == 0]
    # Plain PyTorch computes the larger Gram matrix, of as many rows as the longer side has.
    smaller = [shape for shape in aligned if max(shape) <= MOST]
    for dtype in (torch.float32, torch.bfloat16):
        yield penalty(0, aligned, "rows", dtype, device)
        yield penalty(1, aligned, "rows", dtype, device)
        yield penalty(0, smaller, "columns", dtype, device)


def penalty(
    order: int, shapes: Shapes, gram: Literal["rows", "columns"], dtype: torch.dtype, device: torch.device
) -> Pass:
    def inputs() -> list[Tensor]:
        # As large as orthogonal initialisation makes them.
        return [torch.randn(shape, device=device, dtype=dtype) / max(shape) ** 0.5 for shape in shapes]

    return Pass(
        "orthogonal_regularization",
        order,
        f"{len(shapes)} weights, {elements(shapes) / 1e6:.3g} M elements, Gram of {gram}, {short(dtype)}",
        lambda *weights, backend: gdl_kernels.orthogonal_regularization(list(weights), gram=gram, backend=backend),
        inputs,
    )
