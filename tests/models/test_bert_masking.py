"""What BERT's training hides."""

from __future__ import annotations

import pytest
import torch

from models.bert.masking import CLS, FIRST_UNUSED, MASK, PADDING, SEP, SPECIAL, hide
from models.bert.model import IGNORED

VOCABULARY = 1000


def test_a_seventh_is_chosen_and_most_of_it_masked() -> None:
    tokens = torch.randint(FIRST_UNUSED, VOCABULARY, (200, 400))
    hidden, labels = hide(tokens, VOCABULARY)
    chosen = labels != IGNORED
    assert (chosen.sum(1) == 60).all()
    assert torch.equal(labels[chosen], tokens[chosen])
    assert torch.equal(hidden[~chosen], tokens[~chosen])
    masked, same = hidden[chosen] == MASK, hidden[chosen] == tokens[chosen]
    assert masked.double().mean().item() == pytest.approx(0.8, abs=0.015)  # 4 deviations of 12,000 draws
    assert same.double().mean().item() == pytest.approx(0.1, abs=0.011)
    random = hidden[chosen][~masked & ~same]
    assert len(random) / chosen.sum().item() == pytest.approx(0.1, abs=0.011)
    assert 0 <= random.min() < 20 < 980 < random.max() < VOCABULARY
    places = chosen.double().mean(0)  # every place alike
    assert 0 < places.min() < 0.15 < places.max() < 0.3


def test_padding_and_marks_are_neither_chosen_nor_counted() -> None:
    tokens = torch.randint(FIRST_UNUSED, VOCABULARY, (50, 40))
    tokens[:, 0], tokens[:, 20], tokens[:, 30:] = CLS, SEP, PADDING
    _, labels = hide(tokens, VOCABULARY)
    assert not torch.isin(labels, torch.tensor(SPECIAL)).any()
    assert ((labels != IGNORED).sum(1) == 4).all()  # 0.15 · 30 = 4.5, to even, as Python and the published code round


def test_one_at_least_and_no_more_than_there_are() -> None:
    tokens = torch.full((3, 40), SEP)
    tokens[:, 5] = 500
    for share in (0.001, 0.9):
        assert ((hide(tokens, VOCABULARY, share=share)[1] != IGNORED).sum(1) == 1).all()


def test_a_generator_says_which() -> None:
    tokens = torch.randint(FIRST_UNUSED, VOCABULARY, (4, 100))
    first, again = (hide(tokens, VOCABULARY, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    other = hide(tokens, VOCABULARY, generator=torch.Generator().manual_seed(4))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])


def test_errors() -> None:
    tokens = torch.full((2, 9), 500)
    with pytest.raises(ValueError, match="share must be between 0 and 1, got 1"):
        hide(tokens, VOCABULARY, share=1)
    tokens[1] = PADDING
    with pytest.raises(ValueError, match="one to hide in each sequence, and sequence 1 has none"):
        hide(tokens, VOCABULARY)
