"""Token embeddings with sinusoidal positions as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.positional_embedding import positional_embedding


class PositionalEmbedding(nn.Module):
    """:func:`gdl_kernels.positional_embedding` with a table of its own: tokens ``(..., N)`` to ``(..., N, D)``.

    In the place of an ``nn.Embedding``, whose parameter, ``weight``, and first values, standard normal, it has: state
    dicts go from one to the other.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.scale = num_embeddings, embedding_dim, scale
        self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)

    def forward(self, tokens: Tensor, start: int = 0) -> Tensor:
        return positional_embedding(tokens, self.weight, scale=self.scale, start=start)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, scale={self.scale}"
