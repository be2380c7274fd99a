"""The model: a pre-norm Transformer decoder with learned positions (GPT-2, Radford et al. 2019)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from gdl_kernels.layouts import Layout
from gdl_kernels.nn import KeyValueCache, SparseSelfAttention

from ..language import Shape, check_end, check_tokens


@dataclass(frozen=True, kw_only=True)
class Config(Shape):
    """A ``Shape`` with GPT-2's vocabulary and context, unless others are given."""

    vocabulary: int = 50_257
    context: int = 1024
    eps: float = 1e-5

    causal: ClassVar[bool] = True


def _published(layers: int, width: int) -> Config:
    return Config(layers=layers, heads=width // 64, width=width, hidden=4 * width)


#: tiny is ours, to try things out; the others are the published ones.
PRESETS = {
    "tiny": _published(2, 128),
    "small": _published(12, 768),
    "medium": _published(24, 1024),
    "large": _published(36, 1280),
    "xl": _published(48, 1600),
}


def preset(name: str, **changes: Any) -> Config:
    """One of ``PRESETS`` with other fields changed; a change that is None is none.

    Raises:
        ValueError: if there is no such preset, or a field does not fit.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return replace(PRESETS[name], **{field: value for field, value in changes.items() if value is not None})


class Block(nn.Module):
    """``x = x + attention(norm(x)); x = x + mlp(norm(x))``."""

    def __init__(self, config: Config, layout: Layout) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, config.eps)
        self.attention = SparseSelfAttention(config.width, config.heads, layout, dropout=config.attention_dropout)
        self.mlp_norm = nn.LayerNorm(config.width, config.eps)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, config.hidden), nn.GELU("tanh"), nn.Linear(config.hidden, config.width)
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        seen = self.attention(self.attention_norm(x), key_padding_mask=key_padding_mask, cache=cache)
        x = x + self.dropout(seen)
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class GPT2(nn.Module):
    """Tokens to the logits of the token that follows each.

    ``x = embedding[token] + position[place]``; then the blocks; then ``logits = norm(x) @ embedding.T``.

    Raises:
        ValueError: if ``config.attention`` does not fit the model.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.position = nn.Embedding(config.context, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layout) for layout in config.layouts(config.context))
        self.norm = nn.LayerNorm(config.width, config.eps)
        self._initialize()

    def _initialize(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # What is added to the residual stream shrinks with the number of additions, so that depth adds no size.
                residual = name.endswith(("attention.out.weight", "mlp.2.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.layers) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @property
    def attention(self) -> list[SparseSelfAttention]:
        """The attention of each layer."""
        return [module for module in self.modules() if isinstance(module, SparseSelfAttention)]

    def cache(self, batch: int = 1) -> list[KeyValueCache]:
        """Empty caches for decoding with this model, one a layer."""
        return [attention.cache(batch) for attention in self.attention]

    def forward(
        self, tokens: Tensor, *, key_padding_mask: Tensor | None = None, cache: Sequence[KeyValueCache] | None = None
    ) -> Tensor:
        """Logits ``(B, N, vocabulary)``; arguments and errors are those of :meth:`hidden`."""
        return self.logits(self.hidden(tokens, key_padding_mask=key_padding_mask, cache=cache))

    def hidden(
        self, tokens: Tensor, *, key_padding_mask: Tensor | None = None, cache: Sequence[KeyValueCache] | None = None
    ) -> Tensor:
        """The last norm's output.

        Args:
            tokens: int64 ``(B, N)``.
            key_padding_mask: bool ``(B, N)``, with a cache ``(B, what it holds + N)``: True for padding, which no
                position sees. A place and a pattern count from the first position, so padding goes on the right.
            cache: what came before ``tokens``; grows by ``tokens``, without gradients. One more token costs what its
                rows of the layouts keep, not what was decoded before.

        Returns:
            ``(B, N, width)``.

        Raises:
            ValueError: if a shape does not fit, a token is out of its range (on the CPU), or the sequence goes beyond
                the table of positions.
        """
        check_tokens("tokens", tokens, self.config.vocabulary)
        start = 0 if cache is None else cache[0].length
        end = start + tokens.shape[1]
        check_end(end, self.config.context)
        x = self.dropout(self.embedding(tokens) + self.position.weight[start:end])
        for layer, block in enumerate(self.blocks):
            x = block(x, key_padding_mask, None if cache is None else cache[layer])
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """``(..., width)`` to ``(..., vocabulary)``."""
        return F.linear(hidden, self.embedding.weight)


def next_token_loss(model: GPT2, tokens: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, of each token but the first, ``tokens`` being int64 ``(B, N + 1)``."""
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
