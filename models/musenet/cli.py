"""What ``python -m models ... musenet`` takes and prints."""

from __future__ import annotations

from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, cast

import torch
import typer
from rich.progress import Progress
from typer import Option

from .. import commands, report
from ..atomic import replacing, writable
from .tokens import Vocabulary


def compare(
    context: Annotated[int, Option(help="Tokens of music.")] = 4096,
    layers: int = 2,
    heads: int = 8,
    width: int = 512,
    batch: int = 1,
    attention: Annotated[str, Option(help="interleaved, merged, per_head or dense.")] = "merged",
    stride: Annotated[int, Option(help="l of the fixed pattern: the block.")] = 128,
    summary: Annotated[int, Option(help="c of the fixed pattern: summary columns in a block.")] = 32,
    recompute: Annotated[bool, Option(help="Recompute activations in the backward pass, on both sides.")] = False,
    dtype: commands.Dtype = "float32",
    device: commands.Device = "cpu",
    backend: commands.Backend = "auto",
    repetitions: commands.Repetitions = 3,
    seed: commands.Seed = 0,
    json_path: commands.JsonPath = None,
) -> None:
    """Run MuseNet on chorales with our kernels and in plain PyTorch. Exits with 1 if the numbers differ."""
    from .comparison import chorale_tokens, problem
    from .model import Config
    from .patterns import Attention
    from .tokens import CHORALES

    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    kind = commands.check_comparison(dtype=dtype, device=device, backend=backend, json_path=json_path)
    config = Config(
        vocabulary=len(CHORALES), context=context, layers=layers, heads=heads, width=width,
        attention=cast(Attention, attention), stride=stride, summary=summary, recompute=recompute,
    )  # fmt: skip
    commands.compare_and_show(
        partial(problem, config, chorale_tokens(context), batch, kind, device, seed),
        f"MuseNet: {layers} layers, {heads} heads, width {width}, {{parameters}}; "
        f"{attention} attention, {batch} × {context} tokens of chorales, {dtype}",
        {"model": "musenet", "config": vars(config), "batch": batch},
        dtype=kind, device=device, backend=backend, repetitions=repetitions, json_path=json_path,
    )  # fmt: skip


def train(
    ctx: typer.Context,
    out: commands.Out = Path("runs/musenet"),
    steps: commands.Steps = 500,
    resume: commands.Resume = False,
    save_every: commands.SaveEvery = 100,
    preset: Annotated[str, Option(help="tiny, small or musenet.")] = "tiny",
    attention: Annotated[str | None, Option(help="interleaved, merged, per_head or dense.")] = None,
    layers: int | None = None,
    heads: int | None = None,
    width: int | None = None,
    context: int | None = None,
    stride: int | None = None,
    summary: int | None = None,
    dropout: float | None = None,
    recompute: bool | None = None,
    pieces: Annotated[int | None, Option(help="Chorales to read; all by default.")] = None,
    length: Annotated[int | None, Option(help="Tokens in an excerpt; the context by default.")] = None,
    batch: int = 4,
    rate: Annotated[float, Option(help="Highest learning rate.")] = 1e-3,
    warmup: Annotated[int, Option(help="Steps until it is reached.")] = 50,
    evaluate: Annotated[int, Option(help="Steps between measurements on held-out pieces.")] = 50,
    held_out: Annotated[int, Option(help="Excerpts of held-out pieces to measure on.")] = 8,
    transpose: Annotated[bool, Option(help="Play each piece in a random key.")] = True,
    seed: commands.Seed = 0,
) -> None:
    """Train MuseNet on the Bach chorales, with losses in bits per token."""
    from .data import chorales
    from .model import preset as shape
    from .tokens import CHORALES
    from .training import Recipe, Training

    console = report.console()
    path = commands.checkpoint_path(ctx, out, steps=steps, save_every=save_every, resume=resume)
    if resume:
        run = Training.resumed(path, chorales)
    else:
        config = shape(
            preset, len(CHORALES), attention=attention, layers=layers, heads=heads, width=width, context=context,
            stride=stride, summary=summary, dropout=dropout, recompute=recompute,
        )  # fmt: skip
        recipe = Recipe(
            pieces=pieces, length=config.context if length is None else length, batch=batch, rate=rate, warmup=warmup,
            held_out=held_out, evaluate=evaluate, transpose=transpose, seed=seed,
        )  # fmt: skip
        run = Training(config, recipe, CHORALES, chorales(pieces))
    parameters = sum(p.numel() for p in run.model.parameters())
    excerpts = f"{run.recipe.batch} excerpts of {run.recipe.length} tokens a step"
    console.print(f"{report.count(parameters)} parameters, {run.config.attention} attention, {excerpts}")
    commands.follow(run, path, steps=steps, save_every=save_every, console=console)


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
    drawn = draw(model, begun, temperature=temperature, top_k=top_k, generator=torch.Generator().manual_seed(seed))
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

    notes = read_midi(path)
    try:
        tokens = vocabulary.encode(notes)[:-1]  # all but end
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if len(tokens) >= context:
        raise ValueError(f"{path}: must have fewer tokens than the context, {context}, but has {len(tokens)}")
    return tokens
