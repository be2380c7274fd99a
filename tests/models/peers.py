"""Models of transformers as peers: tiny, with random weights, and no network."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from models.huggingface import Same, to_theirs


def shake(model: nn.Module) -> None:
    """Draw every weight anew: biases and gains begin at 0 and 1, and matrices so small that attention is uniform."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = name.rpartition(".")[0].lower().rpartition(".")[2] in ("norm", "layernorm", "ln_1", "ln_2", "ln_f")
            around = 1.0 if gain and name.endswith("weight") else 0.0
            parameter.copy_(around + 0.2 * torch.randn_like(parameter))


def double(model: Any) -> Any:
    """A copy in float64. Eager attention's mask overflows there, and padding is NaN; PyTorch's own is not."""
    model = copy.deepcopy(model).double()
    model.set_attn_implementation("sdpa")
    return model


def gradients(ours: nn.Module, table: list[Same]) -> dict[str, Tensor]:
    """Of our parameters, by the names that they have there. A conversion is linear: gradients take it as weights do."""
    return to_theirs(table, {name: p.grad for name, p in ours.named_parameters() if p.grad is not None})


def right_padding(batch: int, n: int) -> Tensor:
    """int64 (batch, n), 0 for padding; the first sequence has none."""
    length = torch.tensor([n, n - 5, n // 3])[:batch, None]
    return (torch.arange(n) < length).long()


def additive(kept: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A mask of four dimensions for eager attention, which takes it as it is: float (B, 1, n, n) from bool."""
    return torch.zeros(kept.shape, dtype=dtype).masked_fill(~kept, torch.finfo(torch.float32).min)[:, None]
