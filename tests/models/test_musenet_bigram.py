"""The model to beat."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import pytest
import torch

from models.musenet.bigram import STRENGTHS, Bigram
from models.musenet.data import Piece, encoded
from models.musenet.excerpts import KEYS
from models.musenet.tokens import CHORALES, Vocabulary

SMALL = Vocabulary(("piano",), longest_wait=4)


def test_it_is_counted_and_smoothed_as_defined() -> None:
    generator = torch.Generator().manual_seed(0)
    pieces = [torch.randint(SMALL.first_note, SMALL.first_note + 6, (60,), generator=generator) for _ in range(2)]
    held_out = torch.randint(SMALL.first_note, SMALL.first_note + 12, (3, 21), generator=generator)
    pairs: Counter[tuple[int, int]] = Counter()
    for key in (0, 3):
        pairs.update(pairwise(SMALL.transpose(torch.cat(pieces), key).tolist()))
    before, after = Counter[int](), Counter[int]()
    for (a, b), count in pairs.items():
        before[a] += count
        after[b] += count

    def bits(strength: float) -> float:
        logs = []
        for row in held_out.tolist():
            for a, b in pairwise(row):
                alone = (after[b] + 1) / (after.total() + len(SMALL))
                logs.append(math.log2((pairs[a, b] + strength * alone) / (before[a] + strength)))
        return -sum(logs) / len(logs)

    found = Bigram([piece.int() for piece in pieces], SMALL, (0, 3)).bits_per_token(held_out)
    assert found == pytest.approx(min(bits(strength) for strength in STRENGTHS), rel=1e-12)


def test_a_token_never_met_is_as_likely_as_it_is_alone() -> None:
    bigram = Bigram([torch.zeros(2, dtype=torch.int32)], SMALL, (0,))
    assert bigram.bits_per_token(torch.tensor([[200, 201]])) == pytest.approx(math.log2(1 + len(SMALL)))


def test_it_foretells_chorales_better_than_chance_and_than_single_tokens(pieces: list[Piece]) -> None:
    tokens = [encoded(piece, CHORALES) for piece in pieces]
    bits = Bigram(tokens[1:], CHORALES, KEYS).bits_per_token(tokens[0].long()[None])
    assert 3 < bits < 6
