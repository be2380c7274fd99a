"""Lines of eighth notes, the baselines, and what is asked of a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.musenet.data import Piece
from models.musenet.midi import write_midi
from models.musenet.tokens import Note
from models.transformer.accuracy import Agreement, harmonise, next_tokens
from models.transformer.harmony import (
    BASS_PITCHES,
    END,
    KEYS,
    MELODY_PITCHES,
    PAD,
    REST,
    START,
    VOCABULARY,
    Baseline,
    Batch,
    Batches,
    Harmony,
    begins,
    decode,
    encode,
    harmonies,
    pitches,
    transpose,
)
from models.transformer.melody import read_melody
from models.transformer.model import Config, Transformer

LINE = [Note(0, 24, "bass", 48), Note(24, 12, "bass", 48), Note(48, 36, "bass", 50)]


def said(tokens: list[int]) -> list[str]:
    """Tokens as one reads them: a capital begins a note."""
    names = {48: "c", 50: "d", 60: "e"}
    return ["-" if t == REST else names[p].upper() if b else names[p]
            for t, p, b in zip(tokens, pitches(torch.tensor(tokens)), begins(torch.tensor(tokens)))
            for p in [int(p)]]  # fmt: skip


def test_a_line_is_a_token_an_eighth() -> None:
    assert said(encode(LINE)) == ["C", "c", "C", "-", "D", "d", "d"]
    assert said(encode(LINE, 9)) == ["C", "c", "C", "-", "D", "d", "d", "-", "-"]
    assert said(encode(LINE, 2)) == ["C", "c"]
    assert encode([]) == []


def test_what_is_off_the_grid_moves_to_the_next_eighth_or_is_lost() -> None:
    dotted = [Note(0, 18, "bass", 48), Note(18, 18, "bass", 50), Note(38, 6, "bass", 60), Note(44, 6, "bass", 48)]
    assert said(encode(dotted)) == ["C", "c", "D", "-", "C"]


def test_a_line_comes_back() -> None:
    assert decode(encode(LINE), "bass") == LINE
    assert decode([REST, *encode(LINE)], "bass")[0] == Note(12, 24, "bass", 48)
    assert decode([REST, REST], "bass") == []
    held = encode(LINE)[1]
    assert decode([held, held, encode([Note(0, 12, "bass", 50)])[0]], "alto") == [
        Note(0, 24, "alto", 48), Note(24, 12, "alto", 50)
    ]  # fmt: skip


def test_the_chorales_come_back_but_for_what_is_off_the_grid(pieces: list[Piece]) -> None:
    for piece, harmony in zip(pieces, harmonies(pieces)):
        for voice, line in (("soprano", harmony.melody), ("bass", harmony.bass)):
            notes = [note for note in piece.notes if note.instrument == voice]
            back = decode(line.tolist(), voice)
            on_grid = {(n.start, n.duration, n.pitch) for n in notes if n.start % 12 == 0 == n.duration % 12}
            assert on_grid <= {(n.start, n.duration, n.pitch) for n in back}
            assert len(on_grid) > 0.9 * len(notes)
        assert len(harmony.melody) == len(harmony.bass)
        assert harmony.held_out == piece.held_out


def test_every_key_of_every_line_is_a_token(pieces: list[Piece]) -> None:
    for harmony in harmonies(pieces):
        for semitones in KEYS:
            other = harmony.transposed(semitones)
            for before, after in ((harmony.melody, other.melody), (harmony.bass, other.bass)):
                assert torch.equal(pitches(after), torch.where(pitches(before) > 0, pitches(before) + semitones, 0))
                assert torch.equal(begins(after), begins(before))
                assert int(after.max()) < VOCABULARY
    assert torch.equal(transpose(torch.tensor([PAD, START, END, REST]), 3), torch.tensor([PAD, START, END, REST]))


def test_notes_that_no_token_says_are_refused() -> None:
    for pitch, name in ((BASS_PITCHES[0] - 1, "F#1"), (MELODY_PITCHES[-1] + 1, "E6")):
        with pytest.raises(ValueError, match=f"a note must be from G1 to D#6, got {name}"):
            encode([Note(0, 12, "bass", pitch)])


def line(*tokens: int) -> torch.Tensor:
    return torch.tensor(tokens)


def test_a_batch_is_padded_and_shifted() -> None:
    batch = Batch.of([Harmony("a", line(10, 11, 12), line(20, 21, 22), False), Harmony("b", line(13), line(23), False)])
    assert batch.source.tolist() == [[10, 11, 12], [13, PAD, PAD]]
    assert batch.padding.tolist() == [[False] * 3, [False, True, True]]
    assert batch.target.tolist() == [[START, 20, 21, 22], [START, 23, PAD, PAD]]
    assert batch.following.tolist() == [[20, 21, 22, END], [23, END, PAD, PAD]]


def test_batches_are_decided_by_their_generator_and_are_of_like_lengths(pieces: list[Piece]) -> None:
    found = harmonies(pieces)

    def first(seed: int, **changes: bool) -> list[Batch]:
        made = Batches(found, 100, 3, torch.Generator().manual_seed(seed), **{"transpose": True, **changes})
        return [batch for batch, _ in zip(made, range(6))]

    one, again, other = first(1), first(1), first(2)
    assert all(torch.equal(a.source, b.source) and torch.equal(a.target, b.target) for a, b in zip(one, again))
    assert not all(a.source.shape == b.source.shape and torch.equal(a.source, b.source) for a, b in zip(one, other))
    assert max(batch.source.shape[1] for batch in one) == 100
    originals = [h.melody.tolist() for h in found]
    for batch in first(3, transpose=False):
        for row, pad in zip(batch.source, batch.padding):
            melody = row[~pad].tolist()
            assert any(melody == o[i : i + len(melody)] for o in originals for i in range(len(o) - len(melody) + 1))
    with pytest.raises(ValueError, match="harmonies must be at least one, got none"):
        Batches([], 100, 3, torch.Generator(), transpose=True)


def test_the_baselines_are_counts() -> None:
    c, d, e = (encode([Note(0, 12, "bass", pitch)])[0] for pitch in (48, 50, 52))
    learnt = [Harmony("a", line(e, e, e, d, REST), line(c, c, d, d, d), False), Harmony("b", line(c), line(d), False)]
    of_all, given = Baseline(learnt, given_melody=False), Baseline(learnt, given_melody=True)
    assert of_all(line(c, d, e, REST)).tolist() == [50] * 4
    assert given(line(e, d, c, REST)).tolist() == [48, 50, 50, 50]
    assert given(encode_tensor(55)).tolist() == [50]  # a melody note that it has not met: the one of all


def encode_tensor(pitch: int) -> torch.Tensor:
    return torch.tensor(encode([Note(0, 12, "bass", pitch)]))


def test_agreement_counts_the_steps_that_sound_and_those_that_begin() -> None:
    bass = torch.tensor(encode([Note(0, 24, "bass", 48), Note(36, 24, "bass", 50)]))  # C c - D d
    harmony = Harmony("a", bass, bass, True)
    assert Agreement.of([line(48, 48, 0, 50, 50)], [harmony]) == Agreement(1.0, 1.0)
    assert Agreement.of([line(48, 50, 48, 50, 48)], [harmony]) == Agreement(0.5, 1.0)
    assert Agreement.of([line(48)], [harmony]) == Agreement(0.25, 0.5)
    both = Agreement.of([line(48), line(48, 48, 0, 50, 50)], [harmony, harmony])
    assert both == Agreement(0.625, 0.75)


def test_what_is_foretold_is_that_of_each_alone(pieces: list[Piece]) -> None:
    """Of lines side by side, padded; and the likeliest tokens are greedy's where the bass so far is its own."""
    torch.manual_seed(0)
    config = Config(VOCABULARY, VOCABULARY, encoder_layers=1, decoder_layers=1, heads=2, width=16, hidden=16)
    model = Transformer(config).double().eval()
    some = [harmony.excerpt(0, steps) for harmony, steps in zip(harmonies(pieces), (20, 7, 31, 12))]
    together = next_tokens(model, some)
    alone = [next_tokens(model, [harmony]) for harmony in some]
    for found, each in zip(together.pitches, alone):
        assert torch.equal(found, each.pitches[0])
    counts = [len(harmony.bass) + 1 for harmony in some]
    assert together.bits == pytest.approx(sum(a.bits * n for a, n in zip(alone, counts)) / sum(counts))
    assert together.right == pytest.approx(sum(a.right * n for a, n in zip(alone, counts)) / sum(counts))
    written = harmonise(model, [harmony.melody for harmony in some], beams=1, alpha=0.6)
    own = [Harmony("", h.melody[: len(w)], w, True) for h, w in zip(some, written)]
    for harmony, steps, whole in zip(own, written, some):
        if len(steps) == len(whole.melody):
            assert torch.equal(next_tokens(model, [harmony]).pitches[0], pitches(steps))


def test_the_melody_of_a_file_is_its_soprano(tmp_path: Path) -> None:
    path = tmp_path / "song.mid"
    soprano = [Note(0, 24, "soprano", 72), Note(24, 12, "soprano", 74)]
    write_midi([*soprano, Note(0, 36, "flute", 84)], path)
    notes, tokens = read_melody(path)
    assert notes == soprano
    assert tokens == encode(soprano)


def test_or_the_highest_that_sounds(tmp_path: Path) -> None:
    path = tmp_path / "song.mid"
    write_midi(
        [Note(0, 48, "piano", 60), Note(0, 24, "piano", 72), Note(12, 36, "strings", 76), Note(48, 12, "piano", 64),
         Note(48, 12, "drums", 80)],
        path,
    )  # fmt: skip
    notes, _ = read_melody(path)
    assert [(n.start, n.duration, n.pitch) for n in notes] == [(0, 12, 72), (12, 36, 76), (48, 12, 64)]
    assert {n.instrument for n in notes} == {"soprano"}


def test_a_file_without_a_melody_is_named(tmp_path: Path) -> None:
    path = tmp_path / "song.mid"

    def why(*notes: Note) -> str:
        write_midi(notes, path)
        with pytest.raises(ValueError, match=r"song\.mid") as refused:
            read_melody(path)
        return str(refused.value).removeprefix(f"{path}: ")

    assert why(Note(0, 24, "drums", 60)) == "must have a melody, but has only drums"
    assert why(Note(0, 24, "piano", 88)) == "its melody must be from E3 to D#6, but has a E6"
    assert why(Note(0, 24, "soprano", 51)) == "its melody must be from E3 to D#6, but has a D#3"
    off_beat = "its melody must sound when an eighth note begins, but every note lies between two"
    assert why(Note(2, 5, "piano", 60), Note(14, 5, "piano", 62)) == off_beat
    with pytest.raises(ValueError, match=r"absent\.mid: there is no such file"):
        read_melody(tmp_path / "absent.mid")
