"""BERT on real text, as :mod:`models.compare` wants it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..compare import Problem
from ..text import excerpts
from .masking import CLS, FIRST_UNUSED, SEP, hide
from .model import BertForMaskedLM, Config


def pairs_of_segments(config: Config, batch: int) -> tuple[Tensor, Tensor]:
    """Tokens and token types, int64 ``(batch, context)``: ``CLS``, a segment, ``SEP``, the next one, ``SEP``.

    A byte of text is a token, one of those that the vocabulary leaves unused: the published one is not at hand.

    Raises:
        ValueError: if the vocabulary or the context is too small for that, or there is less text.
    """
    if config.vocabulary < FIRST_UNUSED + 256:
        raise ValueError(f"vocabulary must be at least {FIRST_UNUSED + 256} for bytes, got {config.vocabulary}")
    if config.token_types < 2 or config.context < 5:
        sizes = f"{config.token_types} and {config.context}"
        raise ValueError(f"token_types must be at least 2 and context 5 for pairs of segments, got {sizes}")
    text = [torch.tensor(list(excerpt)) + FIRST_UNUSED for excerpt in excerpts(batch, config.context - 3)]
    half = (config.context - 3) // 2
    cls, sep = torch.tensor([CLS]), torch.tensor([SEP])
    tokens = torch.stack([torch.cat([cls, bytes_[:half], sep, bytes_[half:], sep]) for bytes_ in text])
    return tokens, (torch.arange(config.context) >= half + 2).long().expand(batch, -1)


def problem(config: Config, tokens: Tensor, token_types: Tensor, dtype: torch.dtype, device: str, seed: int) -> Problem:
    """The same model at every call. The output is the encoder's; the loss that of tokens that are hidden first."""
    torch.manual_seed(seed)
    model = BertForMaskedLM(config).to(device=device, dtype=dtype).train()
    hidden, labels = hide(tokens, config.vocabulary, generator=torch.Generator().manual_seed(seed))
    tokens, token_types, hidden, labels = (t.to(device) for t in (tokens, token_types, hidden, labels))
    explain = partial(config.explain, len(tokens), dtype, device)
    return Problem(
        model, lambda: model.bert(tokens, token_types), lambda: model.loss(hidden, labels, token_types), explain
    )
