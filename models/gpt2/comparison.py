"""GPT-2 on real text, as :mod:`models.compare` wants it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..compare import Problem
from ..text import excerpts
from .model import GPT2, Config, next_token_loss
from .text import encode


def bytes_of_text(config: Config, batch: int) -> Tensor:
    """Tokens, int64 ``(batch, context + 1)``.

    Raises:
        ValueError: if the vocabulary is too small for that, or there is less text.
    """
    if config.vocabulary < 256:
        raise ValueError(f"vocabulary must be at least 256 for bytes, got {config.vocabulary}")
    return torch.stack([encode(excerpt) for excerpt in excerpts(batch, config.context + 1)])


def problem(config: Config, tokens: Tensor, dtype: torch.dtype, device: str, seed: int) -> Problem:
    """The same model at every call. The output is the logits; the loss that of the next token."""
    torch.manual_seed(seed)
    model = GPT2(config).to(device=device, dtype=dtype).train()
    tokens = tokens.to(device)
    explain = partial(config.explain, len(tokens), dtype, device)
    return Problem(model, lambda: model(tokens[:, :-1]), lambda: next_token_loss(model, tokens), explain)
