"""``python -m models sample musenet``."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
from rich.progress import Progress
from typer import Option

from .. import commands, report
from ..atomic import replacing, writable
from .tokens import Vocabulary


def sample(
    checkpoint: Annotated[Path | None, Option(help="What `train` wrote.")] = None,
    untrained: Annotated[bool, Option("--untrained", help="Random weights: noise, to try things out.")] = False,
    prompt: Annotated[Path | None, Option(help="A MIDI file to go on with.")] = None,
    out: Annotated[Path, Option(help="Where to write: OUT.mid and OUT.png.")] = Path("runs/chorale"),
    length: Annotated[
        int | None, Option(help="Tokens at most, the model may end sooner; 400, or what the context holds.")
    ] = None,
    temperature: Annotated[float, Option(help="Below 1 plays safe, above takes risks; 0 is the likeliest.")] = 0.95,
    top_k: Annotated[int | None, Option(help="Draw from the k likeliest tokens only.")] = 32,
    tempo: Annotated[float, Option(help="Quarter notes a minute, 4 to 1000.")] = 80.0,
    seed: commands.Seed = 0,
) -> None:
    """Let MuseNet write a piece: a MIDI file to listen to and a piano roll to look at."""
    from .midi import FASTEST, SLOWEST, write_midi
    from .model import MuseNet, preset
    from .pianoroll import draw_piano_roll
    from .places import Placer
    from .sampling import sample as draw
    from .tokens import CHORALES, TICKS_PER_BEAT
    from .training import load_model

    console = report.console()
    if out.name in ("", ".."):
        raise ValueError(f"{out}: can't be written (it is a folder)")
    if (checkpoint is None) is not untrained:
        raise ValueError("one of --checkpoint PATH and --untrained must be given")
    if length is not None and length < 1:
        raise ValueError(f"length must be at least 1 token, got {length}")
    if not SLOWEST <= tempo <= FASTEST:
        raise ValueError(f"tempo must be from {SLOWEST} to {FASTEST}, got {tempo}")
    if checkpoint is not None:
        model, vocabulary = load_model(checkpoint)
        title = f"MuseNet, {checkpoint}, seed {seed}"
    else:
        torch.manual_seed(seed)
        model, vocabulary = MuseNet(preset("tiny", len(CHORALES))).eval(), CHORALES
        title = f"MuseNet with random weights, seed {seed}"
        console.print("[yellow]These weights are random: what comes out is noise, not music.[/]")
    context = model.config.context
    begun = [vocabulary.start] if prompt is None else _opening(prompt, vocabulary, context)
    room = context - len(begun) + 1  # the last token drawn needs no place in the context
    if length is None:
        length = min(400, room)
    if length > room:
        raise ValueError(f"length must be at most the {room} tokens that the context of {context} leaves, got {length}")
    name = out.name.removesuffix(".mid").removesuffix(".png")
    midi, picture = out.with_name(f"{name}.mid"), out.with_name(f"{name}.png")
    writable(midi)
    writable(picture)
    generator, placer = torch.Generator().manual_seed(seed), Placer(vocabulary)
    drawn = draw(model, begun, temperature=temperature, top_k=top_k, generator=generator, placer=placer)
    tokens = []
    with Progress(transient=True, console=console) as bar:
        for token in bar.track(islice(drawn, length), total=length, description="composing"):
            tokens.append(token)
            if token == vocabulary.end:
                break
    if not vocabulary.decode(tokens):
        raise ValueError(f"there is not one note in the {len(tokens)} tokens drawn; try another --seed or --length")
    notes = vocabulary.decode([*begun, *tokens])
    with replacing(midi) as music, replacing(picture) as drawing:  # neither is there until both are whole
        draw_piano_roll(notes, drawing, title=title)
        write_midi(notes, music, beats_per_minute=tempo)
    beats = max(note.end for note in notes) / TICKS_PER_BEAT
    ended = "ended by itself" if tokens[-1] == vocabulary.end else "cut at --length"
    console.print(f"{len(notes)} notes, {beats:.0f} beats, {len(tokens)} tokens, {ended}")
    console.print(f"to listen to: {midi}\nto look at:   {picture}", soft_wrap=True)


def _opening(path: Path, vocabulary: Vocabulary, context: int) -> list[int]:
    """The tokens of a MIDI file that a model is to go on with.

    Raises:
        ValueError: naming the file, if it can't be read, the vocabulary can't say it, or it leaves no room.
    """
    from .midi import read_midi

    music = read_midi(path, vocabulary.instruments)
    try:
        tokens = vocabulary.encode(music.notes, tempos=music.tempos)[:-1]  # all but end
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if len(tokens) >= context:
        raise ValueError(f"{path}: must have fewer tokens than the context, {context}, but has {len(tokens)}")
    return tokens
