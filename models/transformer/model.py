"""The model: the encoder and decoder of "Attention Is All You Need" (arXiv 1706.03762)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gdl_kernels
from gdl_kernels.nn import KeyValueCache, SparseSelfAttention

from .attention import CrossAttention, causal_layout, full_layout

#: Where a layer is normalised: ``norm(x + f(x))``, as published, or ``x + f(norm(x))``, which trains without a warm-up.
Norm = Literal["post", "pre"]

#: Which weights are one: source and target embedding and output, as published; target embedding and output; none.
Shared = Literal["all", "output", "none"]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}


@dataclass(frozen=True)
class Config:
    """The shape of a model.

    Attributes:
        source_vocabulary, target_vocabulary: numbers of tokens.
        hidden: width between the two matrices of each MLP.
        dropout: on sums of embedding and position, and on what attention and MLP add; never inside attention.
        final_norm: whether each stack ends with a norm; None is with ``norm="pre"`` only. The paper's post-norm has
            none, ``torch.nn.Transformer`` always has.
    """

    source_vocabulary: int
    target_vocabulary: int
    encoder_layers: int = 6
    decoder_layers: int = 6
    heads: int = 8
    width: int = 512
    hidden: int = 2048
    dropout: float = 0.1
    norm: Norm = "post"
    final_norm: bool | None = None
    activation: str = "relu"
    shared: Shared = "all"

    def __post_init__(self) -> None:
        for name in (
            "source_vocabulary", "target_vocabulary", "encoder_layers", "decoder_layers", "heads", "width", "hidden",
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.width % (2 * self.heads):
            raise ValueError(f"width must be a multiple of twice the {self.heads} heads, got {self.width}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be from 0 up to, not including, 1, got {self.dropout}")
        for name, known in (("norm", get_args(Norm)), ("shared", get_args(Shared)), ("activation", ACTIVATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.shared == "all" and self.source_vocabulary != self.target_vocabulary:
            sizes = f"{self.source_vocabulary} and {self.target_vocabulary}"
            raise ValueError(f"shared must not be 'all' where the vocabularies differ, got {sizes} tokens")

    @property
    def ends_with_norm(self) -> bool:
        return self.norm == "pre" if self.final_norm is None else self.final_norm


PRESETS = {
    "tiny": Config(1, 1, encoder_layers=2, decoder_layers=2, heads=4, width=64, hidden=256, norm="pre"),
    "base": Config(1, 1),
    "big": Config(1, 1, heads=16, width=1024, hidden=4096, dropout=0.3),
}


def preset(name: str, source_vocabulary: int, target_vocabulary: int, **changes: object) -> Config:
    """One of ``PRESETS`` for two vocabularies, with other fields changed; a change that is None is none.

    Raises:
        ValueError: if there is no such preset, or a field does not fit.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    given = {field: value for field, value in changes.items() if value is not None}
    vocabularies = {"source_vocabulary": source_vocabulary, "target_vocabulary": target_vocabulary}
    return replace(PRESETS[name], **vocabularies, **given)  # type: ignore[arg-type]


class Residual(nn.Module):
    """What a layer adds to its input, and the norm: ``norm(x + dropout(f(x)))`` or ``x + dropout(f(norm(x)))``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.before = config.norm == "pre"
        self.norm = nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        if self.before:
            return x + self.dropout(function(self.norm(x)))
        return self.norm(x + self.dropout(function(x)))


class EncoderLayer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention = _self_attention(config)
        self.attention_residual = Residual(config)
        self.mlp = _mlp(config)
        self.mlp_residual = Residual(config)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        layout = full_layout(x.shape[1], x.shape[1], x.device)
        x = self.attention_residual(x, lambda y: self.attention(y, layout=layout, key_padding_mask=padding))
        return self.mlp_residual(x, self.mlp)


class DecoderLayer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention = _self_attention(config)
        self.attention_residual = Residual(config)
        self.cross = CrossAttention(config.width, config.heads)
        self.cross_residual = Residual(config)
        self.mlp = _mlp(config)
        self.mlp_residual = Residual(config)

    def forward(
        self, x: Tensor, key: Tensor, value: Tensor, padding: Tensor | None = None,
        target_padding: Tensor | None = None, cache: KeyValueCache | None = None,
    ) -> Tensor:  # fmt: skip
        """``key`` and ``value`` are ``cross.keys_values`` of the source; ``padding`` is the source's."""
        layout = causal_layout(x.shape[1] + (0 if cache is None else cache.length), x.device)
        x = self.attention_residual(
            x, lambda y: self.attention(y, layout=layout, key_padding_mask=target_padding, cache=cache)
        )
        x = self.cross_residual(x, lambda y: self.cross(y, key, value, padding))
        return self.mlp_residual(x, self.mlp)


@dataclass
class DecoderCache:
    """What decoding keeps between tokens.

    Attributes:
        attention: keys and values of the target so far, one cache a layer.
        source: keys and values of the source, one pair a layer.
        padding: bool ``(B, S)``, True for the padding of the source, or None.
    """

    attention: list[KeyValueCache]
    source: list[tuple[Tensor, Tensor]]
    padding: Tensor | None

    @property
    def length(self) -> int:
        """Tokens of the target so far."""
        return self.attention[0].length

    def select(self, index: Tensor) -> None:
        """Go on with these targets, int64 ``(B * K,)``, in this order. Each has to stay with its source."""
        for cache in self.attention:
            cache.select(index)


class EncoderDecoder(nn.Module):
    """Vectors to vectors: ``torch.nn.Transformer(batch_first=True)``, whose weights :mod:`.conversion` brings here.

    Positions are in the vectors already. The encoder sees all of the source, the decoder all of the encoder's output
    and of the target what came before.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        ends = config.ends_with_norm
        self.encoder_norm = nn.LayerNorm(config.width) if ends else nn.Identity()
        self.decoder_norm = nn.LayerNorm(config.width) if ends else nn.Identity()
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.xavier_uniform_(parameter)

    def encode(self, source: Tensor, padding: Tensor | None = None) -> Tensor:
        """``(B, S, width)`` to as much. ``padding`` is bool ``(B, S)``, True for what none may see."""
        for layer in self.encoder:
            source = layer(source, padding)
        return self.encoder_norm(source)

    def cache(self, memory: Tensor, padding: Tensor | None, *, capacity: int, beams: int = 1) -> DecoderCache:
        """What decoding starts from: the keys and values of the encoder's output, and none yet of the target.

        Args:
            capacity: the most tokens of a target.
            beams: targets of each source, which follow each other.
        """
        layers: list[DecoderLayer] = list(self.decoder)  # type: ignore[arg-type]
        return DecoderCache(
            [layer.attention.cache(len(memory) * beams, capacity) for layer in layers],
            [layer.cross.keys_values(memory) for layer in layers],
            padding,
        )

    def decode(
        self, target: Tensor, memory: Tensor, padding: Tensor | None = None, target_padding: Tensor | None = None
    ) -> Tensor:
        """``(B, T, width)`` to as much, given the encoder's output."""
        for layer in self.decoder:
            key, value = layer.cross.keys_values(memory)  # type: ignore[operator, union-attr]
            target = layer(target, key, value, padding, target_padding)
        return self.decoder_norm(target)

    def decode_next(self, target: Tensor, cache: DecoderCache) -> Tensor:
        """``(B * K, T, width)`` that follow what the cache holds, to as much. Needs no gradient."""
        for layer, (key, value), own in zip(self.decoder, cache.source, cache.attention):
            target = layer(target, key, value, cache.padding, cache=own)
        return self.decoder_norm(target)

    def forward(
        self, source: Tensor, target: Tensor, padding: Tensor | None = None, target_padding: Tensor | None = None
    ) -> Tensor:
        """The decoder's output for ``(B, S, width)`` and ``(B, T, width)``: ``(B, T, width)``.

        Args:
            padding, target_padding: bool ``(B, S)`` and ``(B, T)``, True for positions that none may see.
        """
        return self.decode(target, self.encode(source, padding), padding, target_padding)


class Transformer(nn.Module):
    """Tokens of a source and of a target to the logits of the token that follows each of the target's.

    ``x = dropout(sqrt(width) * embedding[token] + sinusoids)`` on both sides; then :class:`EncoderDecoder`; then
    ``logits = x @ output.T``, where ``output`` may be the embedding. Positions are sinusoids, for any length.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.target_embedding = nn.Parameter(torch.empty(config.target_vocabulary, config.width))
        self.source_embedding: nn.Parameter | None = None
        self.output: nn.Parameter | None = None
        if config.shared != "all":
            self.source_embedding = nn.Parameter(torch.empty(config.source_vocabulary, config.width))
        if config.shared == "none":
            self.output = nn.Parameter(torch.empty(config.target_vocabulary, config.width))
        self.body = EncoderDecoder(config)
        self.dropout = nn.Dropout(config.dropout)
        for weight in (self.target_embedding, self.source_embedding, self.output):
            if weight is not None:  # times sqrt(width) an embedding is as large as a position, and so are the logits
                nn.init.normal_(weight, std=config.width**-0.5)

    def encode(self, source: Tensor, padding: Tensor | None = None) -> Tensor:
        """The encoder's output.

        Args:
            source: int64 ``(B, S)``.
            padding: bool ``(B, S)``, True for tokens that none may see.

        Returns:
            ``(B, S, width)``; what it is for padding means nothing.

        Raises:
            ValueError: if shapes do not fit, or a token is not in the vocabulary.
        """
        weight = self.target_embedding if self.source_embedding is None else self.source_embedding
        return self.body.encode(self._embed("source", source, weight, padding), padding)

    def decode(
        self, target: Tensor, memory: Tensor, padding: Tensor | None = None, target_padding: Tensor | None = None
    ) -> Tensor:
        """Logits ``(B, T, target_vocabulary)`` for int64 ``(B, T)`` and the encoder's output."""
        x = self._embed("target", target, self.target_embedding, target_padding)
        return self._logits(self.body.decode(x, memory, padding, target_padding))

    def cache(self, memory: Tensor, padding: Tensor | None = None, *, capacity: int, beams: int = 1) -> DecoderCache:
        """What :meth:`decode_next` starts from. ``beams`` targets of each source follow each other in the batch."""
        return self.body.cache(memory, padding, capacity=capacity, beams=beams)

    def decode_next(self, target: Tensor, cache: DecoderCache) -> Tensor:
        """Logits for int64 ``(B * beams, T)`` that follow what the cache holds; it grows by them, without gradients."""
        x = self._embed("target", target, self.target_embedding, None, start=cache.length)
        return self._logits(self.body.decode_next(x, cache))

    def forward(
        self, source: Tensor, target: Tensor, padding: Tensor | None = None, target_padding: Tensor | None = None
    ) -> Tensor:
        """Logits of the token that follows each of the target's.

        Args:
            source, target: int64 ``(B, S)`` and ``(B, T)``; the target begins with what stands for its beginning.
            padding, target_padding: bool, of the same shapes, True for tokens that none may see. Padding behind a
                target needs none: what comes before does not see it.

        Returns:
            ``(B, T, target_vocabulary)``.

        Raises:
            ValueError: if shapes do not fit, or a token is not in its vocabulary.
        """
        if source.shape[:1] != target.shape[:1]:
            raise ValueError(f"target must have the batch of source, {len(source)}, got {len(target)}")
        return self.decode(target, self.encode(source, padding), padding, target_padding)

    def _embed(self, name: str, tokens: Tensor, weight: Tensor, padding: Tensor | None, *, start: int = 0) -> Tensor:
        if tokens.dim() != 2 or tokens.shape[1] == 0:
            raise ValueError(f"{name} must be (batch, at least one position), got shape {tuple(tokens.shape)}")
        if padding is not None and padding.shape != tokens.shape:
            raise ValueError(
                f"the padding of {name} must have its shape, {tuple(tokens.shape)}, got {tuple(padding.shape)}"
            )
        try:
            return self.dropout(gdl_kernels.positional_embedding(tokens, weight, start=start))
        except (TypeError, ValueError) as error:  # which speaks of tokens, and here there are two of that kind
            raise type(error)(f"{name}: {error}") from error

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(x, self.target_embedding if self.output is None else self.output)


def _self_attention(config: Config) -> SparseSelfAttention:
    """Its layout is given at each call, by the call's length."""
    return SparseSelfAttention(config.width, config.heads, causal_layout(1, torch.device("cpu")))


def _mlp(config: Config) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(config.width, config.hidden), ACTIVATIONS[config.activation](), nn.Linear(config.hidden, config.width)
    )
