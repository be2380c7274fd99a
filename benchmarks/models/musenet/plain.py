"""MuseNet as one would write it in plain PyTorch, on the weights of a model of ours."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.musenet.model import Block, MuseNet

#: From the layer and its query, key and value, each ``(B, H, N, D)``, to what each position has seen.
Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def hidden(model: MuseNet, tokens: Tensor, attention: Attention, start: int = 0) -> Tensor:
    """What logits are made of, ``(B, N, width)``: the model's own forward pass with another attention."""
    heads, width, weight = model.config.heads, model.config.width, model.embedding.weight
    place = sinusoids(model.config.context, width, weight.dtype, weight.device)[start : start + tokens.shape[1]]
    x = F.embedding(tokens, weight) * math.sqrt(width) + place
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        qkv = block.attention.qkv(block.attention_norm(x)).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        seen = attention(layer, *qkv)
        x = x + block.attention.out(seen.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.mlp_norm(x))
    return model.norm(x)


@functools.cache
def sinusoids(count: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[p, 2i] = sin(p / 10000^(2i / width))``, ``[p, 2i + 1]`` the cosine: a table that is made once."""
    rate = 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(count)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1).to(device, dtype)


def last_logits(model: MuseNet, tokens: Tensor, attention: Attention, start: int = 0) -> Tensor:
    """Those of the token that follows the last one, ``(B, vocabulary)``."""
    return F.linear(hidden(model, tokens, attention, start)[:, -1], model.embedding.weight)


def bits_per_token(model: MuseNet, tokens: Tensor, attention: Attention) -> Tensor:
    """The loss of training: see :func:`models.musenet.model.bits_per_token`."""
    logits = F.linear(hidden(model, tokens[:, :-1], attention), model.embedding.weight)
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) / math.log(2)


def dense(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Every earlier position: torch's fastest, and another function than the model's own."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def masked(mask: Tensor) -> Attention:
    """torch's attention with a mask, ``(heads, N, N)``, True where a pair is kept; the same in each layer."""
    return lambda layer, query, key, value: F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


class DenseCache:
    """Decoding with ``dense``: keys and values of all positions so far, in memory set aside for them."""

    def __init__(self, model: MuseNet, capacity: int) -> None:
        weight, config = model.embedding.weight, model.config
        shape = 2, config.layers, 1, config.heads, capacity, config.width // config.heads
        self.keys, self.values = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        self.length = 0

    def next_logits(self, model: MuseNet, tokens: Tensor) -> Tensor:
        """Of the token that follows ``tokens``, which follow those so far: one, or the first ones."""
        logits = last_logits(model, tokens, self._attention, self.length)
        self.length += tokens.shape[1]
        return logits

    def _attention(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        end = self.length + query.shape[2]
        self.keys[layer, :, :, self.length : end] = key
        self.values[layer, :, :, self.length : end] = value
        keys, values = self.keys[layer, :, :, :end], self.values[layer, :, :, :end]
        return F.scaled_dot_product_attention(query, keys, values, is_causal=self.length == 0)


def run_by_run(stride: int, summary: int) -> Attention:
    """The fixed pattern, merged, over the kept keys alone: gathered for a run of ``stride`` queries at a time.

    Written from the paper and apart from the layouts: the truth by which they are judged, at any length. For that the
    backward pass computes each run again, and keeps none.
    """

    def attention(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            runs = [run(query, key, value, begin) for begin in range(0, query.shape[2], stride)]
        else:
            runs = [
                checkpoint(run, query, key, value, begin, use_reentrant=False)
                for begin in range(0, query.shape[2], stride)
            ]
        return torch.cat(runs, dim=2)

    def run(query: Tensor, key: Tensor, value: Tensor, begin: int) -> Tensor:
        query = query[:, :, begin : begin + stride]
        kept = kept_keys(query.shape[1], begin, begin + query.shape[2], stride, summary).to(query.device)
        head = torch.arange(len(kept), device=query.device)[:, None]
        keys, values = key[:, head, kept], value[:, head, kept]  # [B, H, K, D]
        own = torch.ones(query.shape[2], kept.shape[1], dtype=torch.bool, device=query.device)
        own = own.tril(kept.shape[1] - query.shape[2])  # summaries, and of the run itself what came before
        return masked_softmax(query, keys, own) @ values

    return attention


def kept_keys(heads: int, begin: int, end: int, stride: int, summary: int) -> Tensor:
    """The keys that queries ``begin`` to ``end - 1`` of one run see, int64 ``(heads, K)``.

    Summaries of the runs before, then the run itself. Heads take their summaries from a run's end on, in turn.
    """
    last = stride - torch.arange(heads) % (stride // summary) * summary  # where a head's summary of a run ends
    column = last[:, None] - summary + torch.arange(summary)  # [H, c]
    before = (torch.arange(0, begin, stride)[:, None] + column[:, None]).flatten(1)  # [H, runs * c]
    return torch.cat([before, torch.arange(begin, end).expand(heads, -1)], 1)


def masked_softmax(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1)
