"""What models of tokens with a table of positions share: shape, layouts of the layers, checks of the input."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

import gdl_kernels
from gdl_kernels import layouts
from gdl_kernels._backends import Explanation
from gdl_kernels.layouts import Layout

#: What a layer attends to: an entry for :func:`gdl_kernels.layouts.named`; None is all that the model lets it see.
Entry = Mapping[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The shape of a model.

    Attributes:
        vocabulary: number of tokens.
        context: positions in the table, the longest sequence.
        hidden: width between the two linear layers of an MLP.
        dropout: of embeddings and of what attention and MLP add.
        attention_dropout: of attention weights.
        eps: added to variances under the root.
        attention: for all layers, ``{"pattern": "local", "window": 256}`` and the like, or None; or a list with one of
            these for each layer.
        causal: whether no position sees a later one.
    """

    vocabulary: int
    context: int
    layers: int
    heads: int
    width: int
    hidden: int
    dropout: float = 0.1
    attention_dropout: float = 0.1
    eps: float
    attention: Entry | list[Entry] | tuple[Entry, ...] = None

    causal: ClassVar[bool]

    def __post_init__(self) -> None:
        for name in ("vocabulary", "context", "layers", "heads", "width", "hidden"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of the {self.heads} heads, got {self.width}")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be from 0 up to, not including, 1, got {getattr(self, name)}")
        if not self.eps > 0:
            raise ValueError(f"eps must be positive, got {self.eps}")
        for entry in self._entries:
            if entry is not None:
                layouts.check_entry(entry, "attention")
        if len(self._entries) != self.layers:
            raise ValueError(f"attention must have an entry for each of the {self.layers} layers, got {self.attention}")

    @property
    def _entries(self) -> Sequence[Entry]:
        """One a layer."""
        return self.attention if isinstance(self.attention, (list, tuple)) else [self.attention] * self.layers

    def layouts(self, n: int, device: torch.device | str = "cpu") -> list[Layout]:
        """The layout of each layer for ``n`` positions. Layers with the same pattern share one, and so do calls."""
        return [layouts.named(n, entry, causal=self.causal, device=device, argument="attention")
                for entry in self._entries]  # fmt: skip

    def patterns(self) -> str:
        """``attention`` in words: ``dense``, ``local(window=256)``, or ``dense and local(window=256)``."""
        return " and ".join(dict.fromkeys("dense" if entry is None else _spoken(entry) for entry in self._entries))

    def explain(self, batch: int, dtype: torch.dtype, device: str) -> list[Explanation]:
        """Who serves the attention of a batch of the longest sequences, for each different layout."""
        shape = (batch, self.heads, self.context, self.width // self.heads)
        query = torch.empty(shape, device=device, dtype=dtype)
        different = dict.fromkeys(self.layouts(self.context, device))
        return [gdl_kernels.explain("sparse_attention", query, query, query, layout) for layout in different]


def _spoken(entry: Mapping[str, Any]) -> str:
    arguments = ", ".join(f"{name}={value}" for name, value in entry.items() if name != "pattern")
    return f"{entry['pattern']}({arguments})"


def read_attention(text: str | None) -> Entry | list[Entry]:
    """``Shape.attention`` from a command line, where it is JSON.

    Raises:
        ValueError: if it is not.
    """
    try:
        return None if text is None else json.loads(text)
    except ValueError as error:
        example = '{"pattern": "local", "window": 256}'
        raise ValueError(f"attention must be JSON, such as {example}, got {text!r}") from error


def check_tokens(name: str, tokens: Tensor, count: int) -> None:
    """Raise a ValueError if ``tokens`` are not int64 ``(B, N)`` from 0 to ``count - 1``, or there are no positions.

    Values are read on the CPU only: a GPU would have to be waited for, and has an assertion of its own.
    """
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64:
        found = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"{name} must be an int64 tensor, got {found}")
    if tokens.dim() != 2 or tokens.shape[1] == 0:
        raise ValueError(f"{name} must be (batch, positions), at least one of these, got shape {tuple(tokens.shape)}")
    if tokens.device.type == "cpu" and tokens.numel():
        for value in (int(end) for end in tokens.aminmax()):
            if not 0 <= value < count:
                raise ValueError(f"{name} must be from 0 to {count - 1}, got {value}")


def check_end(end: int, context: int) -> None:
    """Raise a ValueError if a sequence goes beyond the table of positions."""
    if end > context:
        raise ValueError(
            f"tokens must end within the {context} positions of the model's table, and would end at {end}: "
            "a larger context needs a model that has learnt it"
        )
