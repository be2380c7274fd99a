"""Where in a piece a token is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.musenet.data import Piece
from models.musenet.places import ROWS, UNKNOWN, Placer, batched, joined, of_piece
from models.musenet.tokens import CHORALES, GENERAL, Note, Vocabulary


def test_a_bar_is_placed_as_it_is_defined() -> None:
    notes = [Note(0, 24, "soprano", 72), Note(0, 48, "bass", 48), Note(24, 24, "soprano", 74)]
    tokens = torch.tensor(CHORALES.encode(notes))
    # start soprano:C5 bass:C3 wait:24 soprano:v0:C5 soprano:D5 wait:24 soprano:v0:D5 bass:v0:C3 end
    places = of_piece(CHORALES, tokens, length=len(tokens))
    assert places.elapsed.tolist() == [0, 0, 0, 4, 4, 4, 8, 8, 8, 8]
    assert places.chord.tolist() == [0, 1, 2, 0, 0, 1, 0, 0, 0, 0]
    assert places.part.tolist() == [128 * i // 10 for i in range(10)]
    assert places.countdown.tolist() == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    unknown = of_piece(CHORALES, tokens)
    assert torch.equal(unknown.elapsed, places.elapsed)
    assert torch.equal(unknown.chord, places.chord)
    assert set(unknown.part.tolist()) == set(unknown.countdown.tolist()) == {UNKNOWN}


vocabularies = st.sampled_from([CHORALES, GENERAL])


@given(vocabularies, st.data(), st.one_of(st.none(), st.integers(1, 60)))
def test_places_are_the_same_at_once_and_step_by_step(
    vocabulary: Vocabulary, data: st.DataObject, length: int | None
) -> None:
    # Half are notes; and waits often enough that there are several instants.
    kinds = st.one_of(
        st.integers(0, len(vocabulary) - 1), st.integers(vocabulary.first_wait, vocabulary.first_tempo - 1),
        st.integers(vocabulary.first_note, vocabulary.first_note + 255),
    )  # fmt: skip
    tokens = torch.tensor(data.draw(st.lists(kinds, max_size=50)), dtype=torch.int64)
    cut = data.draw(st.integers(0, len(tokens)))
    placer = Placer(vocabulary, length)
    steps = joined([placer.of(tokens[:cut]), placer.of(tokens[cut:])])
    for name, at_once, rows in zip(ROWS, of_piece(vocabulary, tokens, length=length), steps):
        assert at_once.tolist() == rows.tolist(), name
        assert all(0 <= row < ROWS[name] for row in rows.tolist())


def test_a_whole_piece_counts_down_to_its_end_and_fills_every_part(pieces: list[Piece]) -> None:
    tokens = torch.tensor(CHORALES.encode(pieces[0].notes))
    places = of_piece(CHORALES, tokens, length=len(tokens))
    assert places.countdown[-128:].tolist() == list(range(127, -1, -1))
    assert set(places.countdown[:-128].tolist()) == {127}
    assert sorted(set(places.part.tolist())) == list(range(128))
    assert places.elapsed[-1].item() == max(note.end for note in pieces[0].notes) // 6
    assert places.chord.max() == 4


def test_what_is_far_or_full_stays_in_the_last_row() -> None:
    wait = CHORALES.first_tempo - 1  # a bar of 16 sixteenths
    elapsed = of_piece(CHORALES, torch.full((130,), wait)).elapsed
    assert elapsed[[0, 126, 127, 129]].tolist() == [16, 2032, 2047, 2047]
    chord = of_piece(CHORALES, torch.tensor([CHORALES.note_token("bass", 80, pitch) for pitch in range(20)])).chord
    assert chord.tolist() == [*range(1, 16), 15, 15, 15, 15, 15]
    longer = Placer(CHORALES, 2).of(torch.tensor([0, 2, 2, 2]))
    assert longer.part.tolist() == [0, 64, 127, 127]
    assert longer.countdown.tolist() == [1, 0, 0, 0]


def test_places_lie_side_by_side_and_are_cut_as_tokens_are() -> None:
    one, other = (of_piece(CHORALES, torch.tensor([0, token, 5]), length=3) for token in (7, 1000))
    both = batched([one, other])
    assert all(place.shape == (2, 3) for place in both)
    assert both.span(1, None).elapsed.tolist() == [[1, 1], [0, 0]]
    assert both.span(0, -1).countdown.tolist() == [[2, 1], [2, 1]]


def test_what_has_no_place_is_refused() -> None:
    with pytest.raises(ValueError, match="length must be at least 1 token, got 0"):
        Placer(CHORALES, 0)
    with pytest.raises(ValueError, match=f"a token must be from 0 to {len(CHORALES) - 1}, got {len(CHORALES)}"):
        Placer(CHORALES).step(len(CHORALES))
