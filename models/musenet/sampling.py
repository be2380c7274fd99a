"""Draws music from a model, a token of each piece at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..drawing import Drawing
from .model import MuseNet
from .places import Placer, Places, batched
from .tokens import Vocabulary


def sample(
    model: MuseNet,
    vocabulary: Vocabulary,
    prompt: Sequence[int],
    *,
    generators: Sequence[torch.Generator],
    drawing: Drawing = Drawing(),  # noqa: B008  (frozen)
    length: int | None = None,
) -> Iterator[dict[int, int]]:
    """Yield the next token of each piece that goes on, by its number, until all have ended or the context is full.

    There is a piece for each of ``generators``, and all follow ``prompt``; which tokens one draws hangs on its own
    generator alone, but for how a batch's sums are rounded. A piece ends with ``vocabulary.end``; the others go on
    without it. Token i costs what row i of the layouts keeps: all before it is in the cache, one for all pieces.

    Args:
        length: how many tokens a piece is meant to have, ``start`` and ``end`` included, for a model that has
            embeddings of where in its piece a token is. It ends by then if it has learned to, and is not cut.

    Raises:
        ValueError: if an argument is out of its range, or ``prompt`` leaves no room or has a token that is none.
    """
    count, context = model.config.vocabulary, model.config.context
    if len(vocabulary) != count:
        raise ValueError(f"vocabulary must have the model's {count} tokens, got {len(vocabulary)}")
    if not 0 < len(prompt) < context:
        raise ValueError(f"prompt must have from 1 to {context - 1} tokens, got {len(prompt)}")
    if wrong := [token for token in prompt if not 0 <= token < count]:
        raise ValueError(f"prompt must have tokens from 0 to {count - 1}, got {wrong[0]}")
    if not generators:
        raise ValueError("generators must be at least one, got none")
    drawing.check(count)
    placers = [Placer(vocabulary, length) for _ in generators]
    return _tokens(model, vocabulary.end, list(prompt), generators, drawing, placers)


@torch.inference_mode()  # rather than no_grad: what torch does besides computing takes half as long
def _tokens(
    model: MuseNet,
    end: int,
    prompt: list[int],
    generators: Sequence[torch.Generator],
    drawing: Drawing,
    placers: Sequence[Placer],
) -> Iterator[dict[int, int]]:
    device = model.embedding.weight.device
    going = list(range(len(generators)))
    cache = model.cache()

    def places(pieces: list[list[int]]) -> Places | None:
        """Of the next tokens of each piece that goes on."""
        if not model.config.places:
            return None
        return batched([placers[i].of(torch.tensor(piece)) for i, piece in zip(going, pieces)]).to(device)

    # All begin alike, so the prompt is computed once.
    begun = places([prompt] * len(going))
    first = None if begun is None else Places(*(rows[:1] for rows in begun))
    logits = model(torch.tensor([prompt], device=device), cache, places=first)[:, -1].expand(len(going), -1)
    if len(going) > 1:
        for layer in cache:
            layer.select(torch.zeros(len(going), dtype=torch.int64, device=device))
    while True:
        tokens = drawing.draw(logits, [generators[i] for i in going])
        drawn = dict(zip(going, tokens.tolist()))
        yield drawn
        going = [i for i, token in drawn.items() if token != end]
        if not going or cache[0].length == model.config.context:
            return
        if len(going) < len(drawn):
            rest = (tokens != end).nonzero()[:, 0]
            tokens = tokens[rest]
            for layer in cache:
                layer.select(rest)
        logits = model(tokens[:, None], cache, places=places([[drawn[i]] for i in going]))[:, -1]
