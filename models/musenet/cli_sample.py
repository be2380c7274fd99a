"""``python -m models sample musenet``."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
from rich.console import Console
from rich.progress import Progress
from typer import Option

from .. import commands, report
from ..atomic import replacing, writable
from ..drawing import SEEDS, Drawing, streams
from .tokens import TICKS_PER_BEAT, Note, Tempo, Vocabulary

if TYPE_CHECKING:
    from .model import MuseNet
    from .statistics import Statistics

#: What is written of a piece, and what its file's name ends in.
SUFFIXES = {"music": ".mid", "picture": ".png", "sound": ".wav"}


def sample(
    checkpoint: Annotated[Path | None, Option(help="What `train` wrote.")] = None,
    untrained: Annotated[bool, Option("--untrained", help="Random weights: noise, to try things out.")] = False,
    prompt: Annotated[Path | None, Option(help="A MIDI file to go on with.")] = None,
    composer: Annotated[str | None, Option(help="In whose manner, of those that the checkpoint knows.")] = None,
    instrument: Annotated[
        list[str] | None, Option(help="What is to play, of what the checkpoint knows; may be given again.")
    ] = None,
    tempo: Annotated[
        float | None, Option(help="Quarter notes a minute, 4 to 1000; by default what the model writes, else 80.")
    ] = None,
    out: Annotated[Path, Option(help="Where to write: OUT.mid, OUT.png and OUT.wav.")] = Path("runs/chorale"),
    pieces: Annotated[int, Option(help="How many to write at once: OUT-1.mid, OUT-2.mid ...")] = 1,
    length: Annotated[
        int | None, Option(help="Tokens at most, the model may end sooner; 400, or what the context holds.")
    ] = None,
    temperature: Annotated[float, Option(help="Below 1 plays safe, above takes risks; 0 is the likeliest.")] = 0.95,
    top_k: Annotated[int | None, Option(help="Draw from the k likeliest tokens only.")] = 32,
    top_p: Annotated[float, Option(help="Draw from the likeliest tokens that have this share of the weight.")] = 1.0,
    soundfont: Annotated[Path | None, Option(help="An .sf2 or .sf3 file to play the music by.")] = None,
    seed: commands.Seed = 0,
) -> None:
    """Let MuseNet write music: MIDI files and, with FluidSynth, sound to listen to, and piano rolls to look at."""
    from .audio import synthesizer
    from .midi import FASTEST, SLOWEST, write_midi
    from .model import MuseNet, preset
    from .pianoroll import draw_piano_roll
    from .tokens import CHORALES
    from .training import load_model

    console = report.console()
    if out.name in ("", ".."):
        raise ValueError(f"{out}: can't be written (it is a folder)")
    if (checkpoint is None) is not untrained:
        raise ValueError("one of --checkpoint PATH and --untrained must be given")
    if pieces < 1:
        raise ValueError(f"pieces must be at least 1, got {pieces}")
    if length is not None and length < 1:
        raise ValueError(f"length must be at least 1 token, got {length}")
    if tempo is not None and not SLOWEST <= tempo <= FASTEST:
        raise ValueError(f"tempo must be from {SLOWEST} to {FASTEST}, got {tempo}")
    if prompt is not None and instrument:
        raise ValueError("--instrument can't be given with --prompt: its own instruments go on")
    drawing, synth = Drawing(temperature, top_k, top_p), synthesizer(soundfont)
    if checkpoint is not None:
        model, vocabulary, corpus = load_model(checkpoint)
        title = f"MuseNet, {checkpoint}"
    else:
        torch.manual_seed(seed)
        model, vocabulary, corpus = MuseNet(preset("tiny", len(CHORALES))).eval(), CHORALES, None
        title = "MuseNet with random weights"
        console.print("[yellow]These weights are random: what comes out is noise, not music.[/]")
    context = model.config.context
    if prompt is None:
        begun = _beginning(vocabulary, composer, instrument, tempo)
    else:
        begun = _opening(prompt, vocabulary, composer, tempo)
        if len(begun) >= context:
            raise ValueError(f"{prompt}: must have fewer tokens than the context, {context}, but has {len(begun)}")
    room = context - len(begun) + 1  # the last token drawn needs no place in the context
    if length is None:
        length = min(400, room)
    if length > room:
        raise ValueError(f"length must be at most the {room} tokens that the context of {context} leaves, got {length}")
    files = [_files(name, sound=not isinstance(synth, str)) for name in _names(out, pieces)]
    for paths in files:
        for path in paths.values():
            writable(path)
    composed = _composed(model, vocabulary, begun, drawing, streams(seed, pieces), length, console)
    silent = [not vocabulary.decode(tokens) for tokens in composed]
    if all(silent):
        raise ValueError(
            f"there is not one note in the {max(map(len, composed))} tokens drawn; try another --seed or --length"
        )
    with ExitStack() as stack:  # no file is there until all are whole
        for place, (tokens, paths) in enumerate(zip(composed, files)):
            if silent[place]:
                continue
            whole = [*begun, *tokens]
            notes, tempos = vocabulary.decode(whole), vocabulary.decode_tempos(whole)
            parts = {kind: stack.enter_context(replacing(path)) for kind, path in paths.items()}
            draw_piano_roll(notes, parts["picture"], title=f"{title}, seed {(seed + place) % SEEDS}")
            write_midi(notes, parts["music"], beats_per_minute=80.0 if tempo is None else tempo, tempos=tempos)
            if not isinstance(synth, str):
                synth.render(parts["music"], parts["sound"])
    for place, (tokens, paths) in enumerate(zip(composed, files)):
        if silent[place]:
            console.print(f"piece {place + 1}: not one note in {len(tokens)} tokens; nothing is written of it")
        else:
            notes = vocabulary.decode([*begun, *tokens])
            beats = max(note.end for note in notes) / TICKS_PER_BEAT
            ended = "ended by itself" if tokens[-1] == vocabulary.end else "cut at --length"
            console.print(f"{len(notes)} notes, {beats:.0f} beats, {len(tokens)} tokens, {ended}")
            _tell_statistics(notes, corpus, console)
            for kind, path in paths.items():
                console.print(f"  {kind + ':':8} {path}", soft_wrap=True)
    if isinstance(synth, str):
        console.print(f"no audio: {synth}", soft_wrap=True, markup=False)


def _beginning(
    vocabulary: Vocabulary, composer: str | None, instruments: list[str] | None, tempo: float | None
) -> list[int]:
    """The tokens that a new piece begins with."""
    conditions = vocabulary.conditions(composer=composer, instruments=instruments or None)
    said = [] if tempo is None or not vocabulary.tempos else [vocabulary.tempo_token(tempo)]
    return [vocabulary.start, *conditions, *said]


def _opening(path: Path, vocabulary: Vocabulary, composer: str | None, tempo: float | None) -> list[int]:
    """The tokens of a MIDI file that a model is to go on with, at another tempo where one is given.

    Raises:
        ValueError: naming the file, if it can't be read or the vocabulary can't say it.
    """
    from .midi import read_midi

    music = read_midi(path, vocabulary.instruments)
    vocabulary.conditions(composer=composer)  # whose error has nothing to do with the file
    try:
        tempos = music.tempos if tempo is None else [Tempo(0, tempo)]
        return vocabulary.encode(music.notes, tempos=tempos, composer=composer)[:-1]  # all but end
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _names(out: Path, pieces: int) -> list[Path]:
    """The files of each piece, without their suffixes."""
    name = out.name
    for suffix in SUFFIXES.values():
        name = name.removesuffix(suffix)
    return [out.with_name(name if pieces == 1 else f"{name}-{place + 1}") for place in range(pieces)]


def _files(name: Path, *, sound: bool) -> dict[str, Path]:
    return {kind: name.with_name(name.name + end) for kind, end in SUFFIXES.items() if sound or kind != "sound"}


def _composed(
    model: MuseNet, vocabulary: Vocabulary, begun: list[int], drawing: Drawing, generators: list[torch.Generator],
    length: int, console: Console,
) -> list[list[int]]:  # fmt: skip
    """What the model draws after ``begun``, ``length`` tokens of each piece at most."""
    from .sampling import sample as draw

    tokens: list[list[int]] = [[] for _ in generators]
    drawn = draw(model, vocabulary, begun, generators=generators, drawing=drawing, length=len(begun) + length)
    with Progress(transient=True, console=console) as bar:
        for step in bar.track(islice(drawn, length), total=length, description="composing"):
            for piece, token in step.items():
                tokens[piece].append(token)
    return tokens


def _tell_statistics(notes: list[Note], corpus: Statistics | None, console: Console) -> None:
    """What a piece counts like, beside the music that its model learned from."""
    from .statistics import has_pitch, key, measure

    if not has_pitch(notes):
        return
    piece = measure(notes)

    def said(name: str, form: str) -> str:
        own = format(getattr(piece, name), form)
        return own if corpus is None else f"{own} ({getattr(corpus, name):{form}})"

    beside = "" if corpus is None else "; in brackets the music learned from"
    console.print(
        f"  in {key(notes).name} {said('in_key', '.0%')}, beats a note {said('length', '.2f')}; entropies: "
        f"pitch classes {said('pitch_class_entropy', '.2f')}, lengths {said('length_entropy', '.2f')}{beside}",
        soft_wrap=True, highlight=False,
    )  # fmt: skip
