"""MuseNet on real music, as :mod:`models.compare` wants it."""

from __future__ import annotations

import torch
from torch import Tensor

import gdl_kernels
from gdl_kernels._backends import Explanation

from ..compare import Problem
from .data import chorales, stream
from .model import Config, MuseNet, bits_per_token
from .tokens import CHORALES


def chorale_tokens(context: int) -> list[int]:
    """The first ``context + 1`` tokens of the chorales on end, reading no more of them than that takes.

    Raises:
        ValueError: if the chorales have fewer tokens.
    """
    limit, before = 8, 0
    while True:
        found = chorales(limit)
        tokens = stream(found, CHORALES)
        if len(tokens) > context:
            return tokens[: context + 1].tolist()
        if len(found) == before:
            raise ValueError(f"context must be less than the chorales' {len(tokens)} tokens, got {context}")
        limit, before = 2 * limit, len(found)


#: How many tokens a comparison decodes.
DECODED = 16


def problem(config: Config, tokens: list[int], batch: int, dtype: torch.dtype, device: str, seed: int) -> Problem:
    """The same model and input at every call.

    ``tokens`` are ``context + 1``; each further sample of the batch is the same music, in another key.
    """
    torch.manual_seed(seed)
    model = MuseNet(config).to(device=device, dtype=dtype).train()
    music = torch.tensor(tokens)
    excerpts = torch.stack([CHORALES.transpose(music, sample) for sample in range(batch)]).to(device)
    head_dim = config.width // config.heads

    def explain() -> list[Explanation]:
        shape = (batch, config.heads, config.context, head_dim)
        query = torch.empty(shape, device=device, dtype=dtype)
        return [
            gdl_kernels.explain("sparse_attention", query, query, query, model.attention[0].layout),
            gdl_kernels.explain("positional_embedding", excerpts[:, :-1], model.embedding.weight),
        ]

    # What comes before the last tokens is played once.
    played = config.context - min(DECODED, config.context - 1)
    cache = model.cache(batch)
    with torch.inference_mode():
        model(excerpts[:, :played], cache)

    def decode() -> Tensor:
        for layer in cache:
            layer.reset(played)
        return torch.cat([model(excerpts[:, i : i + 1], cache) for i in range(played, config.context)], 1)

    def loss() -> Tensor:
        return bits_per_token(model, excerpts)

    return Problem(model, lambda: model(excerpts[:, :-1]), loss, explain, decode)
