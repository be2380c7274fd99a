"""Draws music from a model, a token at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .model import MuseNet
from .places import Placer, batched


def sample(
    model: MuseNet,
    prompt: list[int],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    placer: Placer | None = None,
) -> Iterator[int]:
    """Yield tokens that follow ``prompt`` until the context is full.

    Token i costs what row i of the layouts keeps: all before it is in the cache.

    Args:
        temperature: divides the logits; 0 takes the likeliest token always.
        top_k: only the k likeliest tokens are drawn from; all by default.
        placer: a new one, for a model that has embeddings of places.

    Raises:
        ValueError: if an argument is out of its range, or ``prompt`` leaves no room or has a token that is none.
    """
    vocabulary, context = model.config.vocabulary, model.config.context
    if not 0 < len(prompt) < context:
        raise ValueError(f"prompt must have from 1 to {context - 1} tokens, got {len(prompt)}")
    if wrong := [token for token in prompt if not 0 <= token < vocabulary]:
        raise ValueError(f"prompt must have tokens from 0 to {vocabulary - 1}, got {wrong[0]}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    if top_k is not None and not 1 <= top_k <= vocabulary:
        raise ValueError(f"top_k must be from 1 to {vocabulary}, got {top_k}")
    return _tokens(model, prompt, temperature, top_k or vocabulary, generator, placer)


@torch.no_grad()
def _tokens(
    model: MuseNet,
    prompt: list[int],
    temperature: float,
    top_k: int,
    generator: torch.Generator | None,
    placer: Placer | None,
) -> Iterator[int]:
    device = model.embedding.weight.device
    cache = model.cache()
    given = torch.tensor([prompt], device=device)
    while True:
        places = None if placer is None else batched([placer.of(given[0])]).to(device)
        logits = model(given, cache, places=places)[0, -1].float()
        token = draw(logits, temperature, top_k, generator)
        yield token
        if cache[0].length == model.config.context:
            return
        given = torch.tensor([[token]], device=device)


def draw(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator | None) -> int:
    """One token by its logits, float32 ``(vocabulary,)``.

    Raises:
        ValueError: if one of them is not finite.
    """
    if not logits.isfinite().all():
        raise ValueError("the model's logits are not finite: its weights are damaged, or its training diverged")
    if temperature == 0:
        return int(logits.argmax())
    best, tokens = logits.topk(top_k)
    # Less the largest first: a low temperature would take the quotients to infinity, and infinity less itself is NaN.
    weights = ((best - best[0]).double() / temperature).softmax(0)
    weights = weights.cpu()  # the generator is the CPU's, so a seed means the same everywhere
    return int(tokens[torch.multinomial(weights, 1, generator=generator)])
