"""Excerpts of pieces, with the places of their tokens: what a model learns from, and what it is measured on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .places import Places, batched, joined, of_piece
from .tokens import Vocabulary

#: Half an octave either way: every key, and no voice moves further than it must.
KEYS = range(-5, 7)


class Excerpt(NamedTuple):
    """Tokens and their places, int64 of one shape: ``(N + 1,)``, or ``(B, N + 1)`` for several side by side.

    Inputs are all but the last token, targets all but the first.
    """

    tokens: Tensor
    places: Places

    def chunks(self, size: int) -> Iterator[Excerpt]:
        """Of several, ``size`` at a time."""
        for start in range(0, len(self.tokens), size):
            some = slice(start, start + size)
            yield Excerpt(self.tokens[some], Places(*(place[some] for place in self.places)))

    def to(self, device: torch.device | str) -> Excerpt:
        return Excerpt(self.tokens.to(device), self.places.to(device))


class Excerpts:
    """Endless random excerpts of pieces on end, each piece in a random key, for training.

    A piece loses its composer, its instrumentation and the knowledge of its length with probability ``drop`` each, so
    that a model learns to go without. A piece that an excerpt begins with begins there or earlier, as if a silence of
    ``length`` went before it: long pieces are met anywhere, and of short ones many are met whole.

    Everything random comes from ``generator``: with its state saved, excerpts go on as if never interrupted.
    """

    def __init__(
        self, pieces: Sequence[Tensor], vocabulary: Vocabulary, length: int, batch: int, generator: torch.Generator,
        *, transpose: bool = True, drop: float = 0.0,
    ) -> None:  # fmt: skip
        if not pieces:
            raise ValueError("pieces must be at least one, got none")
        self.pieces, self.vocabulary = pieces, vocabulary
        self.length, self.batch = length, batch
        self.generator, self.transpose, self.drop = generator, transpose, drop

    def __iter__(self) -> Iterator[Excerpt]:
        """Yields excerpts of ``(batch, length + 1)`` tokens."""
        while True:
            tokens, places = zip(*(self._excerpt() for _ in range(self.batch)))
            yield Excerpt(torch.stack(tokens), batched(places))

    def _excerpt(self) -> Excerpt:
        first = self._piece()
        begin = max(self._draw(len(first.tokens) + self.length) - self.length, 0)
        parts = [Excerpt(first.tokens[begin:], first.places.span(begin, None))]
        while sum(len(part.tokens) for part in parts) <= self.length:
            parts.append(self._piece())
        end = self.length + 1
        tokens, places = zip(*parts)
        return Excerpt(torch.cat(tokens)[:end], joined(places).span(0, end))

    def _piece(self) -> Excerpt:
        tokens = self.pieces[self._draw(len(self.pieces))].long()
        if self.transpose:
            tokens = self.vocabulary.transpose(tokens, KEYS[self._draw(len(KEYS))])
        composer, instrumentation, length = (torch.rand(3, generator=self.generator) < self.drop).tolist()
        tokens = self.vocabulary.without_conditions(tokens, composer=composer, instrumentation=instrumentation)
        return Excerpt(tokens, of_piece(self.vocabulary, tokens, length=None if length else len(tokens)))

    def _draw(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self.generator))


def held_out(pieces: Sequence[Tensor], vocabulary: Vocabulary, length: int, count: int) -> Excerpt:
    """The first ``count`` stretches of ``length`` tokens of pieces on end, as they are, of lengths that are not told.

    So nothing that is measured there helps itself to what only the whole piece tells. ``(<= count, length + 1)``; or
    one stretch of all there is, where that is shorter.
    """
    stream = torch.cat([tokens.long() for tokens in pieces])
    places = joined([of_piece(vocabulary, tokens.long()) for tokens in pieces])
    length = min(length, len(stream) - 1)
    return Excerpt(windows(stream, length, count), Places(*(windows(place, length, count) for place in places)))


def windows(tokens: Tensor, length: int, count: int) -> Tensor:
    """The first ``count`` stretches of a stream, which follow each other: int64 ``(<= count, length + 1)``."""
    fit = min(count, (len(tokens) - 1) // length)
    return tokens[: fit * length + 1].unfold(0, length + 1, length)
