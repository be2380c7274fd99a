"""A folder of MIDI files."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
import symusic

from models.musenet import folder as folders
from models.musenet.data import Piece, encoded
from models.musenet.folder import midi_files, read_folder, vocabulary_of
from models.musenet.midi import write_midi
from models.musenet.tokens import GENERAL, Note, Tempo


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GDL_KERNELS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tune(seed: int) -> list[Note]:
    return [Note(24 * place, 24, "piano", 40 + (seed * 7 + place * 5) % 40, 80) for place in range(20)]


@pytest.fixture
def music(tmp_path: Path) -> Path:
    """Twelve tunes, of two composers and of none."""
    root = tmp_path / "music"
    for place in range(12):
        below = ("bach/organ", "satie", ".")[place % 3]
        suffix = ("mid", "midi", "MID")[place % 3]
        write_midi(tune(place), root / below / f"{place}.{suffix}", tempos=[Tempo(48, 60 + place)])
    (root / "readme.txt").write_text("not music")
    return root


def test_every_file_becomes_a_piece_with_its_composer(music: Path) -> None:
    pieces = {piece.name: piece for piece in read_folder(music)}
    assert len(pieces) == 12
    assert pieces["bach/organ/0.mid"].composer == "bach"
    assert pieces["satie/1.midi"].composer == "satie"
    assert pieces["2.MID"].composer is None
    for name, piece in pieces.items():
        number = int(Path(name).stem)
        assert list(piece.notes) == tune(number)
        assert [tempo.start for tempo in piece.tempos] == [0, 48]
        assert piece.tempos[1].beats_per_minute == pytest.approx(60 + number, rel=1e-4)
    vocabulary = vocabulary_of(music)
    assert vocabulary.composers == ("bach", "satie")
    names = [vocabulary.name(token) for token in encoded(pieces["satie/1.midi"], vocabulary).tolist()]
    assert names[:4] == ["start", "by:satie", "with:piano", "tempo:78"]


def test_held_out_are_the_same_whatever_else_is_there(music: Path) -> None:
    def held_out() -> set[str]:
        return {piece.name for piece in read_folder(music) if piece.held_out}

    for place in range(12, 40):
        write_midi(tune(place), music / f"{place}.mid")
    expected = {
        name
        for name in (path.relative_to(music).as_posix() for path in midi_files(music))
        if zlib.crc32(name.encode()) % 10 == 0
    }
    assert 0 < len(expected) < 12
    assert held_out() == expected
    gone = next(path for path in midi_files(music) if path.relative_to(music).as_posix() not in expected)
    gone.unlink()
    assert held_out() == expected
    assert [piece.name for piece in read_folder(music, 5)] == [piece.name for piece in read_folder(music)][:5]


@pytest.mark.parametrize("by_name", [False, True], ids=["none by name", "all by name"])
def test_of_few_files_one_is_held_out(tmp_path: Path, by_name: bool) -> None:
    names = [f"{place}.mid" for place in range(100)]
    few = [name for name in names if (zlib.crc32(name.encode()) % 10 == 0) == by_name][:3]
    for place, name in enumerate(few):
        write_midi(tune(place), tmp_path / "few" / name)
    assert [piece.held_out for piece in read_folder(tmp_path / "few")] == [True, False, False]


def spoil(root: Path) -> dict[Path, str]:
    """Files that can't be played, and why."""
    (root / "text.mid").write_bytes(b"a letter")
    (root / "empty.mid").write_bytes(b"")
    (root / "silent.mid").write_bytes(symusic.Score(24).dumps_midi())
    whole = (root / "2.MID").read_bytes()
    (root / "cut.mid").write_bytes(whole[:-9])
    return {
        root / "text.mid": "not a whole MIDI file", root / "empty.mid": "the file is empty",
        root / "silent.mid": "without a single note", root / "cut.mid": "not a whole MIDI file",
    }  # fmt: skip


def test_what_can_not_be_played_is_named_and_passed_over(music: Path) -> None:
    spoilt, said = spoil(music), []
    assert len(list(read_folder(music, say=said.append))) == 12
    assert len(said) == len(spoilt) + 1
    for path, why in spoilt.items():
        (line,) = (line for line in said if str(path) in line)
        assert line.startswith("passed over ")
        assert why in line
    assert said[-1].startswith(f"12 MIDI files in {music}; 4 passed over as they can't be played, 0 as copies")


def test_strict_stops_at_what_can_not_be_played(music: Path) -> None:
    spoilt = spoil(music)
    while spoilt:
        with pytest.raises(ValueError, match=str(music)) as error:
            list(read_folder(music, strict=True))
        (named,) = (path for path in spoilt if str(path) in str(error.value))
        assert spoilt.pop(named) in str(error.value)
        named.unlink()
    assert len(list(read_folder(music, strict=True))) == 12


def test_of_copies_one_is_taken(music: Path) -> None:
    (music / "copy.mid").write_bytes((music / "2.MID").read_bytes())
    said: list[str] = []
    names = {piece.name for piece in read_folder(music, say=said.append)}
    assert len(names) == 12
    assert len(names & {"copy.mid", "2.MID"}) == 1
    assert "1 as copies of others" in said[-1]


def test_parsed_music_is_kept_by_content(music: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = list(read_folder(music))
    parsed = []
    read_midi = folders.read_midi
    monkeypatch.setattr(folders, "read_midi", lambda path, known: parsed.append(path.name) or read_midi(path, known))
    (music / "2.MID").rename(music / "renamed.mid")
    after = list(read_folder(music))
    assert not parsed
    assert {piece.notes for piece in after} == {piece.notes for piece in before}
    damaged = next(cache.rglob("*.json"))
    damaged.write_text(damaged.read_text()[:-20])
    assert list(read_folder(music)) == after
    assert len(parsed) == 1
    write_midi(tune(99), music / "renamed.mid")
    assert tuple(tune(99)) in {piece.notes for piece in read_folder(music)}
    assert parsed[1:] == ["renamed.mid"]
    assert not list(cache.rglob("*.part"))


def test_many_files_are_parsed_in_processes(music: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(music)
    said: list[str] = []
    monkeypatch.setattr(folders, "PARSED_ALONE", 5)
    pieces = list(read_folder(music, processes=1, say=said.append))
    assert {piece.notes for piece in pieces} == {tuple(tune(place)) for place in range(12)}
    assert len(said) == 5


def test_a_folder_without_music_is_refused(tmp_path: Path) -> None:
    def why(folder: Path) -> str:
        with pytest.raises(ValueError, match=str(folder)) as error:
            list(read_folder(folder))
        return str(error.value)

    assert why(tmp_path / "absent").endswith("there is no such folder")
    (tmp_path / "file.mid").write_bytes(b"")
    assert why(tmp_path / "file.mid").endswith("is no folder")
    (tmp_path / "bare").mkdir()
    assert "there is no MIDI file in it" in why(tmp_path / "bare")
    (tmp_path / "bare" / "text.mid").write_bytes(b"a letter")
    assert why(tmp_path / "bare").endswith("none of its 1 MIDI files can be played")
    with pytest.raises(ValueError, match="limit must be at least 1"):
        list(read_folder(tmp_path, 0))


def test_a_cache_that_can_not_be_written_is_named(music: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GDL_KERNELS_CACHE", "/dev/null/cache")
    with pytest.raises(ValueError, match=r"^/dev/null/cache/.*: can't be written"):
        list(read_folder(music))


def test_every_instrument_of_a_file_has_its_tokens(tmp_path: Path) -> None:
    score = symusic.Score(24)
    for program in range(128):
        track = symusic.Track(name="Bass", program=program)
        track.notes.append(symusic.Note(program, 24, 40, 80))
        score.tracks.append(track)
    drums = symusic.Track(is_drum=True)
    drums.notes.append(symusic.Note(0, 24, 36, 80))
    score.tracks.append(drums)
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "all.mid").write_bytes(score.dumps_midi())
    (piece,) = read_folder(tmp_path / "all")
    assert isinstance(piece, Piece)
    assert {note.instrument for note in GENERAL.decode(encoded(piece, GENERAL).tolist())} == set(GENERAL.instruments)
