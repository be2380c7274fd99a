"""Lets GPT-2 go on with texts, a token of each at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..drawing import Drawing, streams
from ..language import check_tokens
from .model import GPT2


def generate(
    model: GPT2,
    prompt: Tensor,
    *,
    drawing: Drawing = Drawing(temperature=0),  # noqa: B008  (frozen)
    generators: Sequence[torch.Generator] | None = None,
) -> Iterator[Tensor]:
    """Yield the next token of each text, int64 ``(B,)``, until the context is full.

    A token costs what its row of the layouts keeps: all before it is in the cache. Only the last position of the prompt
    goes through the head.

    Args:
        prompt: int64 ``(B, N)``, texts of one length.
        drawing: how; the likeliest token by default.
        generators: one for each text, on the CPU; ``streams(0, B)`` by default.

    Raises:
        ValueError: if ``prompt`` leaves no room or has a token out of its range, or generators are not one for each.
    """
    config = model.config
    check_tokens("prompt", prompt, config.vocabulary)
    if prompt.shape[1] > config.context:
        raise ValueError(f"prompt must have at most the context's {config.context} tokens, got {prompt.shape[1]}")
    drawing.check(config.vocabulary)
    generators = streams(0, len(prompt)) if generators is None else generators
    if len(generators) != len(prompt):
        raise ValueError(f"generators must be one for each of the {len(prompt)} texts, got {len(generators)}")
    return _tokens(model, prompt, drawing, generators)


@torch.inference_mode()
def _tokens(model: GPT2, tokens: Tensor, drawing: Drawing, generators: Sequence[torch.Generator]) -> Iterator[Tensor]:
    cache = model.cache(len(tokens))
    while True:
        logits = model.logits(model.hidden(tokens, cache=cache)[:, -1]).float()
        drawn = drawing.draw(logits, generators)
        yield drawn
        if cache[0].length == model.config.context:
            return
        tokens = drawn[:, None]
