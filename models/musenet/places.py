"""Where in its piece a token is: what MuseNet's extra embeddings tell of each token besides which one it is.

For token i of a piece of n tokens, each a row of a table:

``elapsed``    the sixteenth notes that have passed, ``ticks // 6``, up to 2047, where it stays. A wait's is when it is
               over, as all that follows it is. Tokens at one instant share it.
``chord``      k for the k-th note that begins at this instant, up to 15, where it stays; 0 for every other token.
``part``       ``128 * i // n``: in which of 128 equal parts of the piece the token is.
``countdown``  ``n - 1 - i``, tokens to come, up to 127: it falls from 127 to 0, which is at ``end``.

The first two follow from the tokens so far. The other two need the length: that of the whole piece in training, and an
intended one in generation. Where none is known both are 128, and training has pieces without, so a model knows these.
A piece that outgrows its intended length stays in the last part, with a countdown of 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .tokens import PITCHES, TICKS_PER_BEAT, Vocabulary

SIXTEENTH = TICKS_PER_BEAT // 4
PARTS = 128

#: How many rows the table of each has. Part and countdown have one for "not known", the last.
ROWS = {"elapsed": 2048, "chord": 16, "part": PARTS + 1, "countdown": PARTS + 1}
UNKNOWN = PARTS


class Places(NamedTuple):
    """Rows for tokens, each int64 and of the tokens' shape."""

    elapsed: Tensor
    chord: Tensor
    part: Tensor
    countdown: Tensor

    def span(self, start: int | None, end: int | None) -> Places:
        """Those of tokens ``start`` to ``end - 1``, on the last dimension."""
        return Places(*(place[..., start:end] for place in self))

    def to(self, device: torch.device | str) -> Places:
        return Places(*(place.to(device) for place in self))


def joined(places: Sequence[Places]) -> Places:
    """Of tokens on end."""
    return Places(*(torch.cat(parts, -1) for parts in zip(*places)))


def batched(places: Sequence[Places]) -> Places:
    """Of several sequences of tokens side by side."""
    return Places(*(torch.stack(rows) for rows in zip(*places)))


class Placer:
    """Tells the places of one piece's tokens as they come.

    ``Placer(vocabulary, length)`` stands before the first token; ``length`` is how many tokens the piece is to have,
    ``start`` and ``end`` included, or None. :meth:`step` takes the next token and gives its places, :meth:`of` takes
    some on end. So for a prompt and what is drawn after it::

        placer = Placer(vocabulary, 500)
        logits = model(prompt[None], cache, places=batched([placer.of(prompt)]))
        logits = model(drawn[None, None], cache, places=batched([placer.of(drawn[None])]))
    """

    def __init__(self, vocabulary: Vocabulary, length: int | None = None) -> None:
        """
        Raises:
            ValueError: if ``length`` is not positive.
        """
        if length is not None and length < 1:
            raise ValueError(f"length must be at least 1 token, got {length}")
        self.vocabulary, self.length = vocabulary, length
        self._index, self._ticks, self._chord = 0, 0, 0

    def step(self, token: int) -> tuple[int, int, int, int]:
        """The rows of the next token: elapsed, chord, part, countdown.

        Raises:
            ValueError: if the token is none of the vocabulary's.
        """
        vocabulary = self.vocabulary
        vocabulary.check(token)
        chord = 0
        if vocabulary.first_wait <= token < vocabulary.first_tempo:
            self._ticks += token - vocabulary.first_wait + 1
            self._chord = 0
        elif token >= vocabulary.first_note and vocabulary.event(token)[1]:
            self._chord = chord = self._chord + 1
        part = countdown = UNKNOWN
        if self.length is not None:
            part = min(PARTS * self._index // self.length, PARTS - 1)
            countdown = max(min(self.length - 1 - self._index, PARTS - 1), 0)
        self._index += 1
        return min(self._ticks // SIXTEENTH, ROWS["elapsed"] - 1), min(chord, ROWS["chord"] - 1), part, countdown

    def of(self, tokens: Tensor) -> Places:
        """The places of the next tokens, int64 ``(N,)``."""
        rows = [self.step(token) for token in tokens.tolist()]
        return Places(*torch.tensor(rows, dtype=torch.int64).reshape(-1, len(ROWS)).T)


def of_piece(vocabulary: Vocabulary, tokens: Tensor, *, length: int | None = None) -> Places:
    """What a new ``Placer(vocabulary, length).of(tokens)`` gives, for a whole piece at once."""
    is_wait = (vocabulary.first_wait <= tokens) & (tokens < vocabulary.first_tempo)
    ticks = torch.where(is_wait, tokens - vocabulary.first_wait + 1, 0).cumsum(0)
    line = (tokens - vocabulary.first_note).div(PITCHES, rounding_mode="floor")
    begins = (tokens >= vocabulary.first_note) & (line % len(vocabulary.levels) != 0)
    begun = begins.cumsum(0)
    # Beginnings before this instant are those counted at the last wait: the largest count so far, as none is smaller.
    before = torch.where(is_wait, begun, 0).cummax(0).values if len(tokens) else begun
    index = torch.arange(len(tokens), device=tokens.device)
    if length is None:
        part = countdown = torch.full_like(index, UNKNOWN)
    else:
        part = (PARTS * index // length).clamp(max=PARTS - 1)
        countdown = (length - 1 - index).clamp(0, PARTS - 1)
    return Places(
        (ticks // SIXTEENTH).clamp(max=ROWS["elapsed"] - 1),
        torch.where(begins, begun - before, 0).clamp(max=ROWS["chord"] - 1),
        part,
        countdown,
    )
