"""How the next token is drawn from a model's logits, for several sequences at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: All seeds that a generator tells apart are below it.
SEEDS = 2**63


@dataclass(frozen=True)
class Drawing:
    """Which tokens may be drawn, and how likely each is.

    ``p = softmax(logits / temperature)`` over the ``top_k`` largest logits; of these only the likeliest, as few as have
    ``top_p`` of the weight (nucleus sampling, arXiv 1904.09751); then ``p`` in proportion.

    Attributes:
        temperature: below 1 plays safe, above takes risks; 0 is always the likeliest.
        top_k: None for all tokens.
        top_p: 1 for all of those.

    Raises:
        ValueError: if an attribute is out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")

    def check(self, vocabulary: int) -> None:
        """Raise a ValueError if there are not that many tokens to draw from."""
        if self.top_k is not None and self.top_k > vocabulary:
            raise ValueError(f"top_k must be from 1 to {vocabulary}, got {self.top_k}")

    def draw(self, logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """A token for each row of ``logits``, ``(B, V)``: int64 ``(B,)``, on their device.

        Each row takes one number from a generator of its own, so what it draws does not hang on the other rows. The
        generators are the CPU's: a seed means the same on every device.

        Raises:
            ValueError: if a logit is not finite, there are fewer than ``top_k``, or the generators are not ``B``.
        """
        self.check(logits.shape[1])
        if len(generators) != len(logits):
            raise ValueError(f"generators must be one for each of the {len(logits)} rows, got {len(generators)}")
        if not logits.isfinite().all():
            raise ValueError("the model's logits are not finite: its weights are damaged, or its training diverged")
        if self.temperature == 0:
            return logits.argmax(-1)
        everything = self.top_k is None and self.top_p == 1
        best, tokens = (logits, None) if everything else logits.topk(self.top_k or logits.shape[1])
        # Less the largest first: a low temperature would take quotients to infinity, and infinity less itself is NaN.
        weights = (best - best.amax(-1, keepdim=True)).double() / self.temperature
        upto = weights.softmax(-1).cumsum(-1)  # [B, K], of the likeliest first where not all may be drawn
        last = torch.full_like(upto[:, :1], self.top_p)
        last = torch.searchsorted(upto, last).clamp_(max=upto.shape[1] - 1)  # the nucleus ends where it has top_p
        numbers = torch.tensor([[torch.rand((), dtype=torch.float64, generator=g)] for g in generators])
        share = numbers.to(logits.device) * upto.gather(1, last)
        place = torch.searchsorted(upto, share, right=True).minimum(last)
        return (place if tokens is None else tokens.gather(1, place))[:, 0]


def streams(seed: int, count: int) -> list[torch.Generator]:
    """A generator for each of ``count`` sequences; the i-th is the first of ``seed + i``."""
    return [torch.Generator().manual_seed((seed + place) % SEEDS) for place in range(count)]
