"""Token embeddings with sinusoidal positions in plain PyTorch: the specification."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def positional_embedding(tokens: Tensor, weight: Tensor, scale: float, start: int) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    place = sinusoids(start, tokens.shape[-1], weight.shape[1], weight.device)
    return (scale * F.embedding(tokens, weight.to(wide)) + place.to(wide)).to(weight.dtype)


def sinusoids(start: int, count: int, width: int, device: torch.device) -> Tensor:
    """Positions ``start`` to ``start + count - 1``: float64 ``(count, width)``."""
    position = torch.arange(count, dtype=torch.float64, device=device) + start
    rate = 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
    angle = position[:, None] * rate  # in float64: float32 is off by 1e-3 at position 10^5
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :width]


def check_range(tokens: Tensor, num_embeddings: int) -> None:
    """Refuse the first token that no row of the table is for. Waits for the tensor's device."""
    outside = (tokens < 0) | (tokens >= num_embeddings)
    if outside.any():
        index = outside.nonzero()[0].tolist()
        value = tokens[tuple(index)].item()
        raise ValueError(f"tokens{index} must be from 0 to {num_embeddings - 1}, a row of weight, got {value}")
