"""Text as GPT-2's own tokens for single bytes, the first 256 of its vocabulary. Its merges of these are not at hand."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

#: The vocabulary begins with the bytes that are printable in Latin-1, and goes on with the others.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTES = [*_PRINTABLE, *(byte for byte in range(256) if byte not in _PRINTABLE)]
_TOKENS = torch.tensor(sorted(range(256), key=_BYTES.__getitem__))


def encode(text: bytes) -> Tensor:
    """The token of each byte, int64 ``(bytes,)``."""
    return _TOKENS[torch.tensor(list(text), dtype=torch.int64)]


def decode(tokens: Iterable[int]) -> bytes:
    """The bytes again.

    Raises:
        ValueError: if a token is none of a single byte.
    """
    tokens = list(tokens)
    if wrong := [token for token in tokens if not 0 <= token < 256]:
        raise ValueError(f"tokens of single bytes are from 0 to 255, got {wrong[0]}")
    return bytes(_BYTES[token] for token in tokens)
