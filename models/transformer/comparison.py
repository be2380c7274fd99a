"""A Transformer on real music, as :mod:`models.compare` wants it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import gdl_kernels
from gdl_kernels._backends import Explanation

from ..compare import Problem
from ..musenet.data import chorales
from .attention import causal_layout
from .harmony import PAD, Batch, Harmony, harmonies
from .model import Config, Transformer
from .objective import smoothed_cross_entropy


def chorale_batch(batch: int, length: int) -> Batch:
    """The first chorales, as many on end in each sample as fit in ``length`` eighth notes; the rest is padding.

    Raises:
        ValueError: if the chorales are too few.
    """
    limit, before = 4, 0
    while True:
        found = chorales(limit)
        samples = _filled(harmonies(found), length)
        if len(samples) > batch:  # the last one may not be full yet
            return Batch.of(samples[:batch])
        if len(found) == before:
            raise ValueError(f"batch must be at most the {len(samples)} that the chorales fill, got {batch}")
        limit, before = 2 * limit, len(found)


def _filled(pieces: Sequence[Harmony], length: int) -> list[Harmony]:
    """Harmonies on end, of at most ``length`` steps; of one that is longer, the beginning."""
    samples: list[Harmony] = []
    for piece in pieces:
        if samples and len(samples[-1].melody) + len(piece.melody) <= length:
            last = samples[-1]
            melody, bass = torch.cat([last.melody, piece.melody]), torch.cat([last.bass, piece.bass])
            samples[-1] = Harmony(last.name, melody, bass, last.held_out)
        else:
            samples.append(piece.excerpt(0, length))
    return samples


def problem(config: Config, batch: Batch, dtype: torch.dtype, device: str, seed: int) -> Problem:
    """The same model and input at every call."""
    torch.manual_seed(seed)
    model = Transformer(config).to(device=device, dtype=dtype).train()
    source, padding, target, following = (
        tensor.to(device) for tensor in (batch.source, batch.padding, batch.target, batch.following)
    )

    def forward() -> torch.Tensor:
        logits = model(source, target, padding)
        return logits[following != PAD]  # what it is for padding means nothing

    def explain() -> list[Explanation]:
        samples, positions = target.shape
        shape = (samples, config.heads, positions, config.width // config.heads)
        query = torch.empty(shape, device=device, dtype=dtype)
        layout = causal_layout(positions, query.device)
        return [
            gdl_kernels.explain("sparse_attention", query, query, query, layout),
            gdl_kernels.explain("positional_embedding", target, model.target_embedding),
        ]

    def loss() -> torch.Tensor:
        return smoothed_cross_entropy(model(source, target, padding), following, 0.1, PAD)

    return Problem(model, forward, loss, explain)
