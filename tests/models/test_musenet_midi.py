"""MIDI files."""

from __future__ import annotations

from pathlib import Path

import pytest
import symusic

from models.musenet.midi import read_midi, write_midi
from models.musenet.tokens import Note

NOTES = [
    Note(0, 24, "bass", 48),
    Note(0, 24, "soprano", 72, 100),
    Note(6, 11, "drums", 36),
    Note(24, 1, "soprano", 72),
    Note(30, 48, "strings", 60),
]


def test_reading_undoes_writing(tmp_path: Path) -> None:
    path = tmp_path / "new" / "piece.mid"
    write_midi(NOTES, path, beats_per_minute=96)
    assert read_midi(path) == sorted(NOTES)
    score = symusic.Score(path)
    assert score.tempos[0].qpm == pytest.approx(96, rel=1e-4)
    assert [track.name for track in score.tracks][:2] == ["soprano", "bass"]
    assert [file.name for file in path.parent.iterdir()] == ["piece.mid"]


def test_another_resolution_is_rounded_to_the_grid(tmp_path: Path) -> None:
    score = symusic.Score(480)
    track = symusic.Track(name="Violin I", program=40)
    track.notes.append(symusic.Note(241, 479, 67, 70))  # half a beat and a bit, for a beat less a bit
    track.notes.append(symusic.Note(960, 1, 69, 70))  # shorter than the grid can say
    score.tracks.append(track)
    path = tmp_path / "violin.mid"
    path.write_bytes(score.dumps_midi())
    assert read_midi(path) == [Note(12, 24, "strings", 67, 70), Note(48, 1, "strings", 69, 70)]


def whole() -> bytes:
    score = symusic.Score(24)
    track = symusic.Track()
    track.notes.extend([symusic.Note(0, 24, 60, 80), symusic.Note(24, 24, 62, 80)])
    score.tracks.append(track)
    return score.dumps_midi()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "empty"),
        (b"this is a letter, not a piece of music", "not a whole MIDI file"),
        (whole()[:-9], "not a whole MIDI file"),
        (whole()[:10], "not a whole MIDI file"),
        (symusic.Score(24).dumps_midi(), "without a single note"),
    ],
    ids=["empty", "text", "cut off", "cut off in the header", "no notes"],
)
def test_a_file_that_is_no_music_is_named_with_the_reason(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "odd.mid"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=why) as error:
        read_midi(path)
    assert str(path) in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.mid: there is no such file"):
        read_midi(tmp_path / "absent.mid")


def test_nothing_is_written_when_there_is_nothing_to_write(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one"):
        write_midi([], tmp_path / "silence.mid")
    with pytest.raises(ValueError, match="beats_per_minute"):
        write_midi(NOTES, tmp_path / "silence.mid", beats_per_minute=0)
    assert not list(tmp_path.iterdir())
