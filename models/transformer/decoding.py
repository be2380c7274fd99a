"""Targets for sources: the likeliest token each time, or a search among several beams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .model import DecoderCache, Transformer


@dataclass(frozen=True)
class Hypothesis:
    """A target that was found.

    Attributes:
        tokens: without the one that it started from, and without the one that ends it.
        score: the logarithm of its probability, divided by the length penalty.
        ended: whether it came to an end, and was not cut.
    """

    tokens: list[int]
    score: float
    ended: bool


def length_penalty(length: Tensor, alpha: float) -> Tensor:
    """``((5 + length) / 6) ** alpha`` (arXiv 1609.08144, section 7): without it short targets win."""
    return ((5 + length) / 6) ** alpha


@torch.no_grad()
def greedy(
    model: Transformer,
    source: Tensor,
    *,
    start: int,
    end: int,
    max_length: int,
    padding: Tensor | None = None,
    forbidden: Sequence[int] = (),
) -> list[list[int]]:
    """For each source the target whose every token is the likeliest after those before it.

    Args:
        source, padding: as of :meth:`Transformer.encode`.
        start, end: the token that a target starts from, and the one that ends it; neither is in what is returned.
        max_length: tokens at most, that which ends a target included.
        forbidden: tokens that no target has.

    Raises:
        ValueError: if an argument is out of its range, or the model's logits are not finite.
    """
    _check(model, start, end, max_length, forbidden)
    cache = model.cache(model.encode(source, padding), padding, capacity=max_length)
    token = source.new_full((len(source), 1), start)
    found: list[Tensor] = []
    ended = torch.zeros_like(token, dtype=torch.bool)
    while len(found) < max_length and not ended.all():
        likeliest = _next_log_p(model, token, cache, forbidden).argmax(-1, keepdim=True)
        token = torch.where(ended, end, likeliest)
        ended |= token == end
        found.append(token)
    return [_before(end, row) for row in torch.cat(found, 1).tolist()] if len(source) else []


@torch.no_grad()
def beam_search(
    model: Transformer,
    source: Tensor,
    *,
    start: int,
    end: int,
    max_length: int,
    beams: int = 4,
    alpha: float = 0.6,
    padding: Tensor | None = None,
    forbidden: Sequence[int] = (),
) -> list[list[Hypothesis]]:
    """For each source up to ``beams`` targets, those with the highest score first.

    ``score = log p(target) / ((5 + length) / 6) ** alpha``, the length with the token that ends it. After each token
    the beams with the highest scores are kept; one that has ended stays as it is, among those that go on.

    Args:
        beams: targets of a source that are kept; 1 is :func:`greedy`.
        alpha: of the length penalty; 0.6 is the paper's, 0 is none.
        source, start, end, max_length, padding, forbidden: as of :func:`greedy`. A target that has not ended with
            ``max_length`` tokens is cut.

    Raises:
        ValueError: if an argument is out of its range, or the model's logits are not finite.
    """
    _check(model, start, end, max_length, forbidden)
    if beams < 1:
        raise ValueError(f"beams must be at least 1, got {beams}")
    if not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha must be 0 or more, got {alpha}")
    batch, device = len(source), source.device
    cache = model.cache(model.encode(source, padding), padding, capacity=max_length, beams=beams)
    tokens = source.new_full((batch * beams, 1), start)
    # All beams of a source are one to begin with: only the first has a probability.
    log_p = torch.full((batch, beams), float("-inf"), dtype=torch.float64, device=device)
    log_p[:, 0] = 0
    lengths = torch.zeros_like(log_p)
    ended = torch.zeros(batch, beams, dtype=torch.bool, device=device)
    first = torch.arange(batch, device=device)[:, None] * beams
    for _ in range(max_length):
        step = _next_log_p(model, tokens[:, -1:], cache, forbidden).unflatten(0, (batch, beams))
        stays = step.new_full(step.shape[2:], float("-inf"))  # an ended beam goes on with `end` only, at no cost
        stays[end] = 0
        total = log_p[..., None] + torch.where(ended[..., None], stays, step)  # [B, K, V]
        longer = torch.where(ended, lengths, lengths + 1)
        chosen = (total / length_penalty(longer, alpha)[..., None]).flatten(1).topk(beams).indices
        beam, token = chosen // step.shape[-1], chosen % step.shape[-1]  # [B, K] each
        log_p = total.flatten(1).gather(1, chosen)
        lengths = longer.gather(1, beam)
        ended = ended.gather(1, beam) | (token == end)
        index = (first + beam).flatten()
        tokens = torch.cat([tokens[index], token.view(-1, 1)], 1)
        if (ended | (log_p == float("-inf"))).all():
            break
        cache.select(index)
    score = log_p / length_penalty(lengths, alpha)
    found = zip(*(t.tolist() for t in (tokens[:, 1:].unflatten(0, (batch, beams)), score, ended)))
    return [
        [Hypothesis(_before(end, row), s, e) for row, s, e in zip(*of_source) if s > float("-inf")]
        for of_source in found
    ]


def _next_log_p(model: Transformer, token: Tensor, cache: DecoderCache, forbidden: Sequence[int]) -> Tensor:
    """float64 ``(B, V)``: log p of the token that follows; -inf where that is forbidden, the others as they are."""
    logits = model.decode_next(token, cache)[:, -1].double()
    if not logits.isfinite().all():
        raise ValueError("the model's logits are not finite: its weights are damaged, or its training diverged")
    log_p = logits.log_softmax(-1)
    log_p[:, list(forbidden)] = float("-inf")
    return log_p


def _before(end: int, tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(end)] if end in tokens else tokens


def _check(model: Transformer, start: int, end: int, max_length: int, forbidden: Sequence[int]) -> None:
    if model.training:
        raise ValueError("model must be in evaluation mode, got one in training: model.eval()")
    vocabulary = model.config.target_vocabulary
    for name, token in (("start", start), ("end", end), *(("forbidden", token) for token in forbidden)):
        if not 0 <= token < vocabulary:
            raise ValueError(f"{name} must be from 0 to {vocabulary - 1}, got {token}")
    if end in forbidden:
        raise ValueError(f"forbidden must not have the token that ends a target, {end}")
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")
