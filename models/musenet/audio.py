"""MIDI files to sound, by FluidSynth where it is installed."""

from __future__ import annotations

import shutil
import subprocess
import wave
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

#: Where distributions put soundfonts. A folder's own default comes first, then whatever else it has.
FOLDERS = tuple(
    Path(share) / folder for share in ("/usr/local/share", "/usr/share") for folder in
    ("sounds/sf2", "soundfonts", "sounds/sf3")
)  # fmt: skip
DEFAULTS = ("default-GM.sf2", "default.sf2", "default-GM.sf3", "default.sf3")

HOW = "for audio: apt-get install fluidsynth timgm6mb-soundfont, or --soundfont FILE.sf2"

RATE = 44_100


@dataclass(frozen=True)
class Synthesizer:
    """FluidSynth with the sounds that it plays by."""

    program: str
    soundfont: Path

    def render(self, midi: Path, wav: Path) -> None:
        """Write what a MIDI file sounds like, as a WAV file.

        Raises:
            ValueError: if FluidSynth fails, or writes no sound; the message has its own.
        """
        command = [self.program, "-ni", "-q", "-T", "wav", "-O", "s16", "-r", str(RATE), "-F", str(wav)]
        done = subprocess.run([*command, str(self.soundfont), str(midi)], capture_output=True, text=True)
        try:
            with wave.open(str(wav)) as sound:
                length = sound.getnframes()
        except (wave.Error, EOFError, OSError):
            length = 0
        # Its exit code is 0 after most errors.
        if done.returncode or not length:
            why = "; ".join((done.stderr or done.stdout).split("\n")).strip("; ")
            raise ValueError(f"{self.program} made no sound of {midi}: {why or f'exit code {done.returncode}'}")


def synthesizer(soundfont: Path | None = None, folders: Iterable[Path] = FOLDERS) -> Synthesizer | str:
    """The synthesizer of this machine, or why it has none.

    Args:
        soundfont: what to play by; else the first that is found in ``folders``.

    Raises:
        ValueError: if ``soundfont`` is given and is none, or there is no FluidSynth to play it.
    """
    program = shutil.which("fluidsynth")
    if soundfont is not None:
        _check(soundfont)
        if program is None:
            raise ValueError(f"{soundfont} needs FluidSynth, which is not installed: apt-get install fluidsynth")
        return Synthesizer(program, soundfont)
    if program is None:
        return f"FluidSynth is not installed ({HOW})"
    found = next(_found(folders), None)
    return f"FluidSynth is there, but no soundfont ({HOW})" if found is None else Synthesizer(program, found)


def _found(folders: Iterable[Path]) -> Iterator[Path]:
    for folder in folders:
        usual = [folder / name for name in DEFAULTS]
        yield from (path for path in [*usual, *sorted(folder.glob("*.sf[23]"))] if path.is_file())


def _check(soundfont: Path) -> None:
    """FluidSynth would play by another one, without a word."""
    try:
        with soundfont.open("rb") as file:
            head = file.read(12)
    except FileNotFoundError as error:
        raise ValueError(f"{soundfont}: there is no such soundfont") from error
    except OSError as error:
        raise ValueError(f"{soundfont}: can't be read ({error.strerror})") from error
    if head[:4] != b"RIFF" or head[8:] != b"sfbk":
        raise ValueError(f"{soundfont}: not a soundfont (an .sf2 or .sf3 file)")
