"""Music to listen to."""

from __future__ import annotations

import array
import shutil
import wave
from pathlib import Path

import pytest
from typer.testing import CliRunner

from models.__main__ import application
from models.musenet.audio import HOW, RATE, Synthesizer, synthesizer
from models.musenet.midi import write_midi
from models.musenet.tokens import Note

FOUND = synthesizer()


@pytest.fixture
def synth() -> Synthesizer:
    if isinstance(FOUND, str):
        pytest.skip(FOUND)
    return FOUND


@pytest.fixture
def soundfont(tmp_path: Path) -> Path:
    """What passes for one at first sight."""
    path = tmp_path / "sounds.sf2"
    path.write_bytes(b"RIFF\x04\x00\x00\x00sfbk")
    return path


def loudness(path: Path) -> list[float]:
    """Of each tenth of a second, the mean of the samples' sizes."""
    with wave.open(str(path)) as sound:
        assert (sound.getframerate(), sound.getsampwidth(), sound.getnchannels()) == (RATE, 2, 2)
        samples = array.array("h", sound.readframes(sound.getnframes()))
    tenth = 2 * RATE // 10
    return [sum(map(abs, samples[i : i + tenth])) / tenth for i in range(0, len(samples), tenth)]


def test_a_note_sounds_when_it_is_played(synth: Synthesizer, tmp_path: Path) -> None:
    """A rest of two seconds, then a second of piano."""
    music, sound = tmp_path / "note.mid", tmp_path / "note.wav.part"
    write_midi([Note(48, 24, "piano", 69, 127)], music, beats_per_minute=60)
    synth.render(music, sound)
    loud = loudness(sound)
    assert max(loud[:19]) < 0.02 * max(loud)
    assert min(loud[21:29]) > 0.1 * max(loud)


def test_what_is_no_midi_makes_no_sound(synth: Synthesizer, tmp_path: Path) -> None:
    path = tmp_path / "letter.mid"
    path.write_text("a letter")
    with pytest.raises(ValueError, match=f"made no sound of {path}: "):
        synth.render(path, tmp_path / "letter.wav")


def test_a_synthesizer_that_fails_is_quoted(soundfont: Path, tmp_path: Path) -> None:
    failing = tmp_path / "fluidsynth"
    failing.write_text("#!/bin/sh\necho 'no card' >&2\nexit 3\n")
    failing.chmod(0o755)
    with pytest.raises(ValueError, match=r"made no sound of x\.mid: no card"):
        Synthesizer(str(failing), soundfont).render(Path("x.mid"), tmp_path / "x.wav")


def test_the_command_writes_sound(synth: Synthesizer, tmp_path: Path) -> None:
    arguments = ["sample", "musenet", "--untrained", "--length", "60", "--out", str(tmp_path / "piece")]
    result = CliRunner().invoke(application(), [*arguments, "--soundfont", str(synth.soundfont)])
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["piece.mid", "piece.png", "piece.wav"]
    assert str(tmp_path / "piece.wav") in result.output
    assert max(loudness(tmp_path / "piece.wav")) > 0


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, soundfont: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda program: "/bin/fluidsynth")
    assert synthesizer(folders=[tmp_path / "absent"]) == f"FluidSynth is there, but no soundfont ({HOW})"
    assert synthesizer(folders=[tmp_path / "absent", tmp_path]) == Synthesizer("/bin/fluidsynth", soundfont)
    monkeypatch.setattr(shutil, "which", lambda program: None)
    assert synthesizer(folders=[tmp_path]) == f"FluidSynth is not installed ({HOW})"
    with pytest.raises(ValueError, match=r"sounds\.sf2 needs FluidSynth, which is not installed"):
        synthesizer(soundfont)
    result = CliRunner().invoke(
        application(), ["sample", "musenet", "--untrained", "--length", "60", "--out", str(tmp_path / "out" / "piece")]
    )
    assert f"no audio: FluidSynth is not installed ({HOW})" in result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["piece.mid", "piece.png"]


def test_the_usual_soundfont_of_a_folder_comes_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, soundfont: Path
) -> None:
    monkeypatch.setattr(shutil, "which", lambda program: "/bin/fluidsynth")
    (tmp_path / "another.sf2").write_bytes(soundfont.read_bytes())
    found = synthesizer(folders=[tmp_path])
    assert isinstance(found, Synthesizer)
    assert found.soundfont.name == "another.sf2"
    (tmp_path / "default-GM.sf3").write_bytes(soundfont.read_bytes())
    found = synthesizer(folders=[tmp_path])
    assert isinstance(found, Synthesizer)
    assert found.soundfont.name == "default-GM.sf3"


def test_what_is_no_soundfont_is_refused(tmp_path: Path) -> None:
    absent = tmp_path / "absent.sf2"
    with pytest.raises(ValueError, match=r"absent\.sf2: there is no such soundfont"):
        synthesizer(absent)
    with pytest.raises(ValueError, match=f"{tmp_path}: can't be read"):
        synthesizer(tmp_path)
    absent.write_text("a letter")
    with pytest.raises(ValueError, match=r"absent\.sf2: not a soundfont"):
        synthesizer(absent)
