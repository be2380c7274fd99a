"""Bytes as tokens of the published vocabulary."""

from __future__ import annotations

import pytest

from models.gpt2.text import decode, encode
from models.text import excerpts, reference


def test_they_are_the_vocabularys_own() -> None:
    published = {b"!": 0, b"A": 32, b"a": 64, b"~": 93, b"\xa1": 94, b"\xff": 187, b"\0": 188, b"\n": 198, b" ": 220}
    assert encode(b"".join(published)).tolist() == list(published.values())
    everything = bytes(range(256))
    assert sorted(encode(everything).tolist()) == list(range(256))
    assert decode(encode(everything).tolist()) == everything
    assert encode(b"").tolist() == []


def test_merged_tokens_are_none_of_these() -> None:
    with pytest.raises(ValueError, match="tokens of single bytes are from 0 to 255, got 256"):
        decode([3, 256])


def test_the_text_is_real_and_ends() -> None:
    first, second = excerpts(2, 1000)
    assert (first + second) == reference()[:2000]
    assert b"statement" in first
    assert len(reference()) > 100_000
    with pytest.raises(ValueError, match=r"3 × 400000 bytes of text must be at most the \d+ that"):
        excerpts(3, 400_000)
