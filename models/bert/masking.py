"""What BERT's training hides (arXiv 1810.04805, section 3.1 and appendix A.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from .model import IGNORED

#: Of the published English vocabularies. Those from FIRST_UNUSED on are theirs for others to use.
PADDING, CLS, SEP, MASK, FIRST_UNUSED = 0, 101, 102, 103, 104
SPECIAL = (PADDING, CLS, SEP)


def hide(
    tokens: Tensor, vocabulary: int, *, share: float = 0.15, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Choose 15 % of each sequence's tokens; of these 80 % become ``MASK``, 10 % a random token, 10 % stay.

    Args:
        tokens: int64 ``(B, N)``, on the generator's device. ``SPECIAL`` ones are not chosen.
        share: of the tokens that are no padding; at least one is chosen in every sequence that has one to choose.

    Returns:
        ``(hidden, labels)``, both ``(B, N)``: the input, and what was there, or ``IGNORED`` where nothing was chosen.

    Raises:
        ValueError: if ``share`` is not between 0 and 1, or a sequence has nothing to choose.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must be between 0 and 1, got {share}")
    special = torch.isin(tokens, torch.tensor(SPECIAL, device=tokens.device))
    if (alone := special.all(1)).any():
        which = int(alone.long().argmax())
        raise ValueError(f"tokens must have one to hide in each sequence, and sequence {which} has none")
    drawn = torch.rand(3, *tokens.shape, generator=generator, device=tokens.device)
    count = ((tokens != PADDING).sum(1, keepdim=True) * share).round().clamp(min=1)
    rank = drawn[0].masked_fill(special, 2.0).argsort(1).argsort(1)  # of a place among the draws of its sequence
    chosen = (rank < count) & ~special
    random = (drawn[2] * vocabulary).long().clamp(max=vocabulary - 1)  # float32 rounds up to 1 · vocabulary at times
    hidden = torch.where(drawn[1] < 0.8, MASK, torch.where(drawn[1] < 0.9, random, tokens))
    return torch.where(chosen, hidden, tokens), torch.where(chosen, tokens, IGNORED)
