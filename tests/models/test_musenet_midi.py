"""MIDI files."""

from __future__ import annotations

from pathlib import Path

import pytest
import symusic

from models.musenet.midi import FAMILIES, PROGRAMS, Music, read_midi, write_midi
from models.musenet.tokens import DRUMS, GENERAL, Note, Tempo

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
    music = read_midi(path)
    assert music.notes == sorted(NOTES)
    assert music.tempos == [Tempo(0, pytest.approx(96, rel=1e-4))]
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
    assert read_midi(path) == Music(
        [Note(12, 24, "strings", 67, 70), Note(48, 1, "strings", 69, 70)],
        [Tempo(0, 120)],  # which is the standard's where a file says none
    )


def test_changes_of_tempo_are_read_and_written(tmp_path: Path) -> None:
    path = tmp_path / "piece.mid"
    tempos = [Tempo(0, 60), Tempo(24, 90), Tempo(30, 240)]
    write_midi(NOTES, path, tempos=tempos)
    found = read_midi(path).tempos
    assert [tempo.start for tempo in found] == [0, 24, 30]
    assert [tempo.beats_per_minute for tempo in found] == pytest.approx([60, 90, 240], rel=1e-4)
    write_midi(NOTES, path, beats_per_minute=50, tempos=tempos[1:])
    assert read_midi(path).tempos[0] == Tempo(0, pytest.approx(50, rel=1e-4))


def test_of_tempos_at_one_tick_of_the_grid_the_last_counts(tmp_path: Path) -> None:
    score = symusic.Score(480)
    track = symusic.Track()
    track.notes.append(symusic.Note(0, 480, 60, 80))
    score.tracks.append(track)
    score.tempos.extend([symusic.Tempo(0, qpm=60), symusic.Tempo(1, qpm=90), symusic.Tempo(480, qpm=30)])
    path = tmp_path / "piece.mid"
    path.write_bytes(score.dumps_midi())
    assert [tempo.start for tempo in read_midi(path).tempos] == [0, 24]
    assert read_midi(path).tempos[0].beats_per_minute == pytest.approx(90, rel=1e-4)


def test_a_beat_of_no_length_is_no_tempo(tmp_path: Path) -> None:
    path = tmp_path / "piece.mid"
    write_midi(NOTES, path, tempos=[Tempo(24, 60)])
    content, second = path.read_bytes(), bytes.fromhex("ff51030f4240")  # a million microseconds
    assert content.count(second) == 1
    path.write_bytes(content.replace(second, bytes.fromhex("ff5103000000")))
    assert read_midi(path).tempos == [Tempo(0, pytest.approx(80, rel=1e-4))]


def test_a_voice_is_one_only_where_there_are_voices(tmp_path: Path) -> None:
    score = symusic.Score(24)
    track = symusic.Track(name=" Bass ", program=33)
    track.notes.append(symusic.Note(0, 24, 40, 80))
    score.tracks.append(track)
    path = tmp_path / "piece.mid"
    path.write_bytes(score.dumps_midi())
    assert read_midi(path).notes == [Note(0, 24, "bass", 40)]
    assert read_midi(path, GENERAL.instruments).notes == [Note(0, 24, "bass_guitar", 40)]


def test_the_general_vocabulary_has_every_family_and_plays_it_as_one_of_its_own() -> None:
    assert {*FAMILIES, DRUMS} == set(GENERAL.instruments)
    assert all(FAMILIES[PROGRAMS[family] // 8] == family for family in FAMILIES)


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
    with pytest.raises(ValueError, match=r"can't be read \(Is a directory\)"):
        read_midi(tmp_path)
    with pytest.raises(ValueError, match=r"absent\.mid: there is no such file"):
        read_midi(tmp_path / "absent.mid")


def test_nothing_is_written_when_there_is_nothing_to_write(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one"):
        write_midi([], tmp_path / "silence.mid")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tempo", [0, 3.9, 1000.5, float("nan"), float("inf")])
def test_a_tempo_that_midi_can_not_say_is_refused(tmp_path: Path, tempo: float) -> None:
    with pytest.raises(ValueError, match="beats_per_minute must be from 4 to 1000"):
        write_midi(NOTES, tmp_path / "piece.mid", beats_per_minute=tempo)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tempo", [Tempo(0, 3), Tempo(-1, 60), Tempo(24, float("nan"))])
def test_a_change_to_a_tempo_that_midi_can_not_say_is_refused(tmp_path: Path, tempo: Tempo) -> None:
    with pytest.raises(ValueError, match="tempos must be from 4 to 1000"):
        write_midi(NOTES, tmp_path / "piece.mid", tempos=[tempo])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tempo", [4, 1000])
def test_the_slowest_and_fastest_tempo_are_written_right(tmp_path: Path, tempo: float) -> None:
    write_midi(NOTES, tmp_path / "piece.mid", beats_per_minute=tempo)
    assert symusic.Score(tmp_path / "piece.mid").tempos[0].qpm == pytest.approx(tempo, rel=1e-4)


@pytest.mark.parametrize(
    ("note", "what"),
    [
        (Note(-1, 24, "bass", 60), "start"), (Note(0, 0, "bass", 60), "last"), (Note(0, 24, "bass", 128), "pitch"),
        (Note(0, 24, "bass", -1), "pitch"), (Note(0, 24, "bass", 60, 200), "velocity"),
    ],
)  # fmt: skip
def test_a_note_that_midi_can_not_say_is_refused(tmp_path: Path, note: Note, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        write_midi([*NOTES, note], tmp_path / "piece.mid")
    assert not list(tmp_path.iterdir())


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "piece.mid"
    write_midi(NOTES[:3], path)
    content = path.read_bytes()
    assert content.count(b"MTrk") >= 3
    for kept in range(len(content)):
        path.write_bytes(content[:kept])
        with pytest.raises(ValueError, match=r"piece\.mid: (cut off: \d of its|not a whole MIDI|the file is empty)"):
            read_midi(path)
    path.write_bytes(content + b"XTRA\0\0\0\3abc")  # a chunk that the standard says to pass over
    assert len(read_midi(path).notes) == 3
