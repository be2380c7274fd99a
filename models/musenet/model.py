"""The model: a pre-norm, decoder-only Sparse Transformer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gdl_kernels.layouts import Layout
from gdl_kernels.nn import KeyValueCache, PositionalEmbedding, SparseSelfAttention

from .patterns import ATTENTION, Attention, layer_layouts
from .places import ROWS, Places


@dataclass(frozen=True)
class Config:
    """The shape of a model.

    Attributes:
        vocabulary: number of tokens.
        context: the longest sequence.
        stride, summary: l and c of the fixed pattern; 16 and c divide l, and l the context.
        dropout: on what attention and MLP add; never inside attention.
        recompute: keep only each block's input for the backward pass, and compute the rest again there.
        elapsed, chord, part, countdown: which of :class:`Places` have an embedding that is added to the token's.
    """

    vocabulary: int
    context: int = 4096
    layers: int = 4
    heads: int = 8
    width: int = 512
    attention: Attention = "merged"
    stride: int = 128
    summary: int = 32
    dropout: float = 0.0
    recompute: bool = False
    elapsed: bool = False
    chord: bool = False
    part: bool = False
    countdown: bool = False

    def __post_init__(self) -> None:
        for name in ("vocabulary", "context", "layers", "heads", "width", "stride", "summary"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.attention not in ATTENTION:
            raise ValueError(f"attention must be one of {', '.join(ATTENTION)}, got {self.attention!r}")
        if self.width % (2 * self.heads):
            raise ValueError(f"width must be a multiple of twice the {self.heads} heads, got {self.width}")
        if self.stride % 16:
            raise ValueError(f"stride must be a multiple of 16, got {self.stride}")
        if self.context % self.stride:
            raise ValueError(f"context must be a multiple of stride, {self.stride}, got {self.context}")
        if self.stride % self.summary:
            raise ValueError(f"summary must divide stride, {self.stride}, got {self.summary}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be from 0 up to 1, got {self.dropout}")

    @property
    def places(self) -> tuple[str, ...]:
        """The names of the places that have an embedding."""
        return tuple(name for name in ROWS if getattr(self, name))


_placed = partial(Config, vocabulary=1, elapsed=True, chord=True, part=True, countdown=True)

PRESETS = {
    "tiny": _placed(context=512, layers=2, heads=4, width=128, stride=64, summary=16),
    "small": _placed(context=4096, layers=4, heads=8, width=512),
    # 72 layers, 24 heads and context 4096 are MuseNet's; its width was not published: 24 heads of 64.
    "musenet": _placed(context=4096, layers=72, heads=24, width=1536, recompute=True),
}


def preset(name: str, vocabulary: int, **changes: object) -> Config:
    """One of ``PRESETS`` for a vocabulary, with other fields changed; a change that is None is none.

    Raises:
        ValueError: if there is no such preset, or a field does not fit.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    given = {field: value for field, value in changes.items() if value is not None}
    return replace(PRESETS[name], vocabulary=vocabulary, **given)  # type: ignore[arg-type]


class Block(nn.Module):
    def __init__(self, config: Config, layout: Layout) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = SparseSelfAttention(config.width, config.heads, layout)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, 4 * config.width), nn.GELU(), nn.Linear(4 * config.width, config.width)
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), cache=cache))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class MuseNet(nn.Module):
    """Tokens to the logits of the token that follows each.

    ``x = sqrt(width) * embedding[token] + sinusoids``, and a row of each table of places besides; then blocks
    ``x += attention(norm(x)); x += mlp(norm(x))``; then ``logits = norm(x) @ embedding.T``.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = PositionalEmbedding(config.vocabulary, config.width)
        self.places = nn.ModuleDict({name: nn.Embedding(ROWS[name], config.width) for name in config.places})
        layouts = layer_layouts(
            config.attention, layers=config.layers, heads=config.heads, context=config.context,
            stride=config.stride, summary=config.summary,
        )  # fmt: skip
        self.blocks = nn.ModuleList(Block(config, layout) for layout in layouts)
        self.norm = nn.LayerNorm(config.width)
        self._initialize()

    def _initialize(self) -> None:
        # The rows are output weights too. At a size of width^-1/4, a token's own row adds about 1 to its logit; at size
        # 1 it would add sqrt(width), and the model would begin by foretelling that each token repeats.
        nn.init.normal_(self.embedding.weight, std=self.config.width**-0.75)
        for table in self.places.parameters():  # a place that training has not met says nothing
            nn.init.zeros_(table)
        for name, parameter in self.blocks.named_parameters():
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
        self, tokens: Tensor, cache: Sequence[KeyValueCache] | None = None, *, places: Places | None = None
    ) -> Tensor:
        """Logits of the next token.

        Args:
            tokens: int64 ``(B, N)``.
            cache: what came before ``tokens``; grows by ``tokens``, without gradients. One more token costs what its
                rows of the layouts keep, not what was decoded before.
            places: those of ``tokens``, each ``(B, N)``; needed by a model that has embeddings of them.

        Returns:
            ``(B, N, vocabulary)``.

        Raises:
            ValueError: if ``tokens`` is not ``(B, N)``, has one that is none, or does not fit the context, or places
                are missing or of another shape.
        """
        if tokens.dim() != 2:
            raise ValueError(f"tokens must be (batch, positions), got shape {tuple(tokens.shape)}")
        start = 0 if cache is None else cache[0].length
        end = start + tokens.shape[1]
        if end > self.config.context:
            raise ValueError(f"tokens must end within the context, {self.config.context}, but would end at {end}")
        x = self.embedding(tokens, start)
        for name, rows in self._place_rows(tokens, places).items():
            x = x + self.places[name](rows)
        for layer, block in enumerate(self.blocks):
            if self.config.recompute and self.training and cache is None:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x, None if cache is None else cache[layer])
        return F.linear(self.norm(x), self.embedding.weight)

    def _place_rows(self, tokens: Tensor, places: Places | None) -> dict[str, Tensor]:
        """The rows of each of our tables."""
        if not self.config.places:
            return {}
        if places is None:
            raise ValueError(f"places must be given: the model has embeddings of {', '.join(self.config.places)}")
        found = {name: getattr(places, name) for name in self.config.places}
        for name, rows in found.items():
            if rows.shape != tokens.shape:
                raise ValueError(f"places.{name} must be like tokens, {tuple(tokens.shape)}, got {tuple(rows.shape)}")
            _check_rows(f"places.{name}", rows, ROWS[name])
        return found


def _check_rows(name: str, rows: Tensor, count: int) -> None:
    """Raise a ValueError if a row is none of ``count``. On a GPU torch asserts, and looking would wait for it."""
    if rows.device.type == "cpu" and rows.numel():
        low, high = (int(end) for end in rows.aminmax())
        if low < 0 or high >= count:
            raise ValueError(f"{name} must be from 0 to {count - 1}, got {low if low < 0 else high}")


def bits_per_token(model: nn.Module, tokens: Tensor, places: Places | None = None) -> Tensor:
    """The loss: mean of -log2 p of each token but the first, ``tokens`` and ``places`` being int64 ``(B, N + 1)``."""
    logits = model(tokens[:, :-1], places=None if places is None else places.span(0, -1))
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) / math.log(2)
