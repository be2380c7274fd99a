"""Token embeddings with positions, of the Transformer and of MuseNet at its published width."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import gdl_kernels

from ...cases import short
from ...images import FORWARD
from ...ops.positional_embedding import SIZES, Size, case
from ..passes import Pass


def passes(device: torch.device) -> Iterator[Pass]:
    transformer, musenet = SIZES[:2]
    for dtype in (torch.bfloat16, torch.float32):
        for size in (transformer, musenet._replace(columns=1536)):
            for order in (0, 1):
                yield embedding(order, size, dtype, device)


def embedding(order: int, size: Size, dtype: torch.dtype, device: torch.device) -> Pass:
    def inputs() -> tuple[torch.Tensor, ...]:
        return case(size, dtype, device, FORWARD, quick=True).inputs(torch.Generator(device).manual_seed(0))

    return Pass(
        "positional_embedding",
        order,
        f"{size.name}, B{size.batch} N{size.length} D{size.columns} V{size.rows}, {short(dtype)}",
        lambda tokens, weight, backend: gdl_kernels.positional_embedding(tokens, weight, backend=backend),
        inputs,
    )
