"""The model: a post-norm Transformer encoder (BERT, arXiv 1810.04805)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdl_kernels.layouts import Layout
from gdl_kernels.nn import SparseSelfAttention

from ..language import Shape, check_end, check_tokens

#: Labels of positions that the loss leaves out.
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Config(Shape):
    """A ``Shape``, and:

    Attributes:
        token_types: kinds of segment.
        padding: the token whose embedding begins at 0 and is not trained by its use as input; None is none.
    """

    vocabulary: int = 30_522
    context: int = 512
    eps: float = 1e-12
    token_types: int = 2
    padding: int | None = 0

    causal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.token_types, int) or self.token_types < 1:
            raise ValueError(f"token_types must be a whole number of at least 1, got {self.token_types!r}")
        if self.padding is not None and not 0 <= self.padding < self.vocabulary:
            raise ValueError(f"padding must be a token from 0 to {self.vocabulary - 1}, got {self.padding}")


def _published(layers: int, width: int) -> Config:
    return Config(layers=layers, heads=width // 64, width=width, hidden=4 * width)


#: base and large from the paper, the smaller ones from arXiv 1908.08962.
PRESETS = {
    "tiny": _published(2, 128),
    "mini": _published(4, 256),
    "small": _published(4, 512),
    "medium": _published(8, 512),
    "base": _published(12, 768),
    "large": _published(24, 1024),
}


def preset(name: str, **changes: Any) -> Config:
    """One of ``PRESETS`` with other fields changed; a change that is None is none.

    Raises:
        ValueError: if there is no such preset, or a field does not fit.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return replace(PRESETS[name], **{field: value for field, value in changes.items() if value is not None})


class Embeddings(nn.Module):
    """``dropout(norm(word[token] + position[place] + token_type[type]))``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.word = nn.Embedding(config.vocabulary, config.width, padding_idx=config.padding)
        self.position = nn.Embedding(config.context, config.width)
        self.token_type = nn.Embedding(config.token_types, config.width)
        self.norm = nn.LayerNorm(config.width, config.eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor, token_types: Tensor | None) -> Tensor:
        places = self.position.weight[: tokens.shape[1]]
        if token_types is None:  # one row for all: no gather
            x = self.word(tokens) + (places + self.token_type.weight[0])
        else:
            x = self.word(tokens) + places + self.token_type(token_types)
        return self.dropout(self.norm(x))


class Layer(nn.Module):
    """``x = norm(x + attention(x)); x = norm(x + mlp(x))``."""

    def __init__(self, config: Config, layout: Layout) -> None:
        super().__init__()
        self.attention = SparseSelfAttention(config.width, config.heads, layout, dropout=config.attention_dropout)
        self.attention_norm = nn.LayerNorm(config.width, config.eps)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, config.hidden), nn.GELU(), nn.Linear(config.hidden, config.width)
        )
        self.mlp_norm = nn.LayerNorm(config.width, config.eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, layout: Layout, key_padding_mask: Tensor | None) -> Tensor:
        seen = self.attention(x, layout=layout, key_padding_mask=key_padding_mask)
        x = self.attention_norm(x + self.dropout(seen))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))


class Bert(nn.Module):
    """Tokens to a vector for each.

    Args:
        pooler: whether it has a vector for the whole sequence too, :meth:`pool`.

    Raises:
        ValueError: if ``config.attention`` does not fit the model.
    """

    def __init__(self, config: Config, *, pooler: bool = True) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config, layout) for layout in config.layouts(config.context))
        self.pooler = nn.Linear(config.width, config.width) if pooler else None
        self.apply(_initialize)

    def forward(
        self, tokens: Tensor, token_types: Tensor | None = None, *, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """The last layer's output.

        Args:
            tokens: int64 ``(B, N)``. ``N`` need not be the context: the layouts are those of ``N`` positions.
            token_types: int64 ``(B, N)``; 0 by default.
            key_padding_mask: bool ``(B, N)``, True for padding, which no position sees. A pattern counts from the first
                position, so padding goes on the right.

        Returns:
            ``(B, N, width)``.

        Raises:
            ValueError: if a shape does not fit, a token is out of its range (on the CPU), or ``N`` is beyond the
                table of positions.
        """
        check_tokens("tokens", tokens, self.config.vocabulary)
        check_end(tokens.shape[1], self.config.context)
        if token_types is not None:
            check_tokens("token_types", token_types, self.config.token_types)
            if token_types.shape != tokens.shape:
                want, got = tuple(tokens.shape), tuple(token_types.shape)
                raise ValueError(f"token_types must have the shape of tokens, {want}, got {got}")
        x = self.embeddings(tokens, token_types)
        for layer, layout in zip(self.layers, self.config.layouts(tokens.shape[1], x.device)):
            x = layer(x, layout, key_padding_mask)
        return x

    def pool(self, hidden: Tensor) -> Tensor:
        """``tanh(linear(hidden[:, 0]))``, ``(B, width)``, of what :meth:`forward` gave.

        Raises:
            ValueError: if the model was made without a pooler.
        """
        if self.pooler is None:
            raise ValueError("this model has no pooler: it was made with pooler=False")
        return self.pooler(hidden[:, 0]).tanh()


class BertForMaskedLM(nn.Module):
    """BERT and the head that tells what a masked token was.

    ``logits = norm(gelu(transform(hidden))) @ embeddings.word.weight.T + bias``
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.bert = Bert(config, pooler=False)
        self.transform = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, config.eps)
        self.bias = nn.Parameter(torch.zeros(config.vocabulary))
        self.transform.apply(_initialize)

    def forward(
        self, tokens: Tensor, token_types: Tensor | None = None, *, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """Logits ``(B, N, vocabulary)``; arguments and errors are those of :class:`Bert`."""
        return self.logits(self.bert(tokens, token_types, key_padding_mask=key_padding_mask))

    def logits(self, hidden: Tensor) -> Tensor:
        """``(..., width)`` to ``(..., vocabulary)``."""
        return F.linear(self.norm(F.gelu(self.transform(hidden))), self.bert.embeddings.word.weight, self.bias)

    def loss(
        self, tokens: Tensor, labels: Tensor, token_types: Tensor | None = None, *,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Mean cross-entropy, in nats, of the labelled positions. The head runs on these alone: a seventh of the text.

        Args:
            labels: int64 ``(B, N)``, the tokens that were there, and ``IGNORED`` wherever there is nothing to tell.

        Raises:
            ValueError: as :meth:`forward`; or if ``labels`` are of another shape or range, or label nothing.
        """
        labelled = labels != IGNORED
        if labels.shape != tokens.shape or not labelled.any():
            raise ValueError(
                f"labels must have the shape of tokens, {tuple(tokens.shape)}, and label at least one position, "
                f"got shape {tuple(labels.shape)}"
            )
        wanted = labels[labelled]
        check_tokens("labels", wanted[None], self.config.vocabulary)
        hidden = self.bert(tokens, token_types, key_padding_mask=key_padding_mask)
        return F.cross_entropy(self.logits(hidden[labelled]), wanted)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding) and module.padding_idx is not None:
        with torch.no_grad():
            module.weight[module.padding_idx].zero_()
