"""The model to beat: what follows a token depends on that token alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .tokens import Vocabulary

#: Prior weights that :meth:`Bigram.bits_per_token` chooses among.
STRENGTHS = tuple(2.0**power for power in range(-2, 13))


class Bigram:
    """Counts of pairs of tokens, smoothed by the counts of single ones (a Dirichlet prior):

    ``p(b | a) = (count(a, b) + s p(b)) / (count(a) + s)`` with ``p(b) = (count(b) + 1) / (all + vocabulary)``.
    """

    def __init__(self, pieces: Iterable[Tensor], vocabulary: Vocabulary, keys: Sequence[int]) -> None:
        """Count pairs in every piece, each in all of ``keys``, given as semitones."""
        self.size = len(vocabulary)
        stream = torch.cat([piece.long() for piece in pieces])
        found = [torch.unique(self._pair(moved[:-1], moved[1:]), return_counts=True)
                 for moved in (vocabulary.transpose(stream, key) for key in keys)]  # fmt: skip
        pairs, counts = (torch.cat(parts) for parts in zip(*found))
        self.pairs, place = torch.unique(pairs, return_inverse=True)  # only those met: there are size ** 2
        self.counts = torch.zeros(len(self.pairs), dtype=torch.int64).index_add_(0, place, counts)
        self.before, self.after = (
            torch.zeros(self.size, dtype=torch.int64).index_add_(0, token, self.counts)
            for token in (self.pairs // self.size, self.pairs % self.size)
        )

    def bits_per_token(self, tokens: Tensor) -> float:
        """Mean of -log2 p of each token but the first of its row, int64 ``(B, N + 1)``, with the ``s`` of ``STRENGTHS``
        that is best on these very tokens: no fair choice would be better."""
        first, second = tokens[:, :-1].flatten(), tokens[:, 1:].flatten()
        pair = self._pair(first, second)
        place = torch.searchsorted(self.pairs, pair).clamp(max=len(self.pairs) - 1)
        met = torch.where(self.pairs[place] == pair, self.counts[place], 0).double()
        alone = (self.after[second].double() + 1) / (self.after.sum() + self.size)
        return min(
            -((met + strength * alone) / (self.before[first] + strength)).log2().mean().item() for strength in STRENGTHS
        )

    def _pair(self, first: Tensor, second: Tensor) -> Tensor:
        return first * self.size + second
