"""What ``python -m models ... transformer`` takes and prints."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from typer import Option

from .. import commands, report
from ..atomic import replacing, writable
from ..musenet.tokens import TICKS_PER_BEAT
from .accuracy import Agreement, harmonise, measure
from .harmony import VOCABULARY, Harmony, decode, harmonies, pitches
from .model import Config
from .model import preset as shape
from .training import Recipe, Training, load_model

#: Of the table after training, as of the paper.
BEAMS, ALPHA = 4, 0.6


def compare(
    length: Annotated[int, Option(help="Eighth notes of chorales in a sample.")] = 1024,
    batch: int = 2,
    layers: Annotated[int, Option(help="Of the encoder, and of the decoder.")] = 2,
    heads: int = 8,
    width: int = 512,
    hidden: Annotated[int, Option(help="Width within each MLP.")] = 2048,
    norm: Annotated[str, Option(help="post or pre.")] = "post",
    dtype: commands.Dtype = "float32",
    device: commands.Device = "cpu",
    backend: commands.Backend = "auto",
    repetitions: commands.Repetitions = 3,
    seed: commands.Seed = 0,
    json_path: commands.JsonPath = None,
) -> None:
    """Run a Transformer on chorales with our kernels and in plain PyTorch. Exits with 1 if the numbers differ."""
    from .comparison import chorale_batch, problem

    if batch < 1 or length < 1:
        raise ValueError(f"batch and length must be at least 1, got {batch} and {length}")
    kind = commands.check_comparison(dtype=dtype, device=device, backend=backend, json_path=json_path)
    config = Config(
        VOCABULARY, VOCABULARY, encoder_layers=layers, decoder_layers=layers, heads=heads, width=width, hidden=hidden,
        norm=norm, dropout=0.0,  # type: ignore[arg-type]
    )  # fmt: skip
    commands.compare_and_show(
        partial(problem, config, chorale_batch(batch, length), kind, device, seed),
        f"Transformer: {layers} and {layers} layers, {heads} heads, width {width}, {{parameters}}; "
        f"{batch} × {length} eighth notes of melody and bass, {dtype}",
        {"model": "transformer", "config": vars(config), "batch": batch, "length": length},
        dtype=kind, device=device, backend=backend, repetitions=repetitions, json_path=json_path,
    )  # fmt: skip


def train(
    ctx: typer.Context,
    out: commands.Out = Path("runs/transformer"),
    steps: commands.Steps = 9000,
    resume: commands.Resume = False,
    save_every: commands.SaveEvery = 100,
    preset: Annotated[str, Option(help="tiny, base or big.")] = "tiny",
    encoder_layers: int | None = None,
    decoder_layers: int | None = None,
    heads: int | None = None,
    width: int | None = None,
    hidden: Annotated[int | None, Option(help="Width within each MLP.")] = None,
    dropout: float | None = None,
    norm: Annotated[str | None, Option(help="post or pre.")] = None,
    activation: Annotated[str | None, Option(help="relu or gelu.")] = None,
    shared: Annotated[str | None, Option(help="Weights that are one: all, output or none.")] = None,
    pieces: Annotated[int | None, Option(help="Chorales to read; all by default.")] = None,
    length: Annotated[int, Option(help="Eighth notes that are learnt from at once, at most.")] = Recipe.length,
    batch: Annotated[int, Option(help="Chorales in a step.")] = Recipe.batch,
    rate: Annotated[float, Option(help="What the paper's learning rate is multiplied by.")] = Recipe.rate,
    warmup: Annotated[int, Option(help="Steps until it is highest.")] = Recipe.warmup,
    smoothing: Annotated[float, Option(help="Of the labels.")] = Recipe.smoothing,
    forget: Annotated[float, Option(help="Share of the bass so far that is hidden while it learns.")] = Recipe.forget,
    evaluate: Annotated[int, Option(help="Steps between measurements on held-out pieces.")] = Recipe.evaluate,
    transpose: Annotated[bool, Option(help="Play each piece in a random key.")] = True,
    seed: commands.Seed = 0,
) -> None:
    """Train a Transformer to write the bass below the melody of Bach's chorales."""
    from ..musenet.data import chorales

    console = report.console()
    path = commands.checkpoint_path(ctx, out, steps=steps, save_every=save_every, resume=resume)
    if resume:
        run = Training.resumed(path, chorales)
    else:
        config = shape(
            preset, VOCABULARY, VOCABULARY, encoder_layers=encoder_layers, decoder_layers=decoder_layers, heads=heads,
            width=width, hidden=hidden, dropout=dropout, norm=norm, activation=activation, shared=shared,
        )  # fmt: skip
        recipe = Recipe(
            pieces=pieces, length=length, batch=batch, rate=rate, warmup=warmup, smoothing=smoothing,
            forget=forget, evaluate=evaluate, transpose=transpose, seed=seed,
        )  # fmt: skip
        run = Training(config, recipe, chorales(pieces))
    parameters = report.count(sum(p.numel() for p in run.model.parameters()))
    console.print(f"{parameters} parameters, {len(run.training)} chorales to learn from, {run.recipe.batch} a step")
    commands.follow(run, path, steps=steps, save_every=save_every, console=console)
    _show(run, console)


def _show(run: Training, console: Console) -> None:
    """How well a trained model does on what was held out, beside the baselines."""
    run.model.eval()
    with console.status("harmonising what was held out"):
        forced, rows = measure(run.model, run.training, run.held_out, beams=BEAMS, alpha=ALPHA)
    table = Table(title=f"The right bass pitch, on {len(run.held_out)} chorales held out", title_justify="left")
    table.add_column("")
    for column in ("of all eighths", "where a bass note begins"):
        table.add_column(column, justify="right")
    for name, agreement in rows.items():
        table.add_row(name, f"{agreement.sounding:.1%}", f"{agreement.begun:.1%}")
    table.caption = f"given Bach's bass so far: {forced.bits:.3f} bits per token, {forced.right:.1%} of tokens foretold"
    console.print(table)


def sample(
    checkpoint: Annotated[Path, Option(help="What `train` wrote.")],
    melody: Annotated[Path | None, Option(help="A MIDI file to harmonise.")] = None,
    piece: Annotated[str | None, Option(help="A chorale whose melody to harmonise, as bwv269.")] = None,
    out: Annotated[Path, Option(help="Where to write: OUT.mid and OUT.png.")] = Path("runs/harmony"),
    beams: Annotated[int, Option(help="Beams of the search; 1 takes the likeliest note each time.")] = BEAMS,
    alpha: Annotated[float, Option(help="Length penalty of the search.")] = ALPHA,
    tempo: Annotated[float, Option(help="Quarter notes a minute, 4 to 1000.")] = 80.0,
    seed: Annotated[
        int, Option(min=0, max=2**63 - 1, help="Draws a held-out chorale where neither --melody nor --piece is given.")
    ] = 0,
) -> None:
    """Let a Transformer write a bass: a MIDI file of it and the melody, and a piano roll of both."""
    from ..musenet.midi import FASTEST, SLOWEST, write_midi
    from ..musenet.pianoroll import draw_piano_roll
    from .melody import VOICE, read_melody

    console = report.console()
    if out.name in ("", ".."):
        raise ValueError(f"{out}: can't be written (it is a folder)")
    if melody is not None and piece is not None:
        raise ValueError("one of --melody PATH and --piece NAME may be given, got both")
    if beams < 1:
        raise ValueError(f"beams must be at least 1, got {beams}")
    if not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha must be 0 or more, got {alpha}")
    if not SLOWEST <= tempo <= FASTEST:
        raise ValueError(f"tempo must be from {SLOWEST} to {FASTEST}, got {tempo}")
    model = load_model(checkpoint)
    name = out.name.removesuffix(".mid").removesuffix(".png")
    midi, picture = out.with_name(f"{name}.mid"), out.with_name(f"{name}.png")
    writable(midi)
    writable(picture)
    bach: Harmony | None = None
    if melody is not None:
        above, tokens = read_melody(melody)
        title = str(melody)
    else:
        bach = _chorale(piece, seed)
        tokens = bach.melody.tolist()
        above = decode(tokens, VOICE)
        title = f"{bach.name}, {'held out' if bach.held_out else 'which it has learnt from'}"
    with console.status("harmonising"):
        bass = harmonise(model, [torch.tensor(tokens)], beams=beams, alpha=alpha)[0]
    below = decode(bass.tolist(), "bass")
    notes = [*above, *below]
    with replacing(midi) as music, replacing(picture) as drawing:  # neither is there until both are whole
        draw_piano_roll(notes, drawing, title=f"Transformer, {checkpoint}: a bass for {title}")
        write_midi(notes, music, beats_per_minute=tempo)
    beats = max(note.end for note in notes) / TICKS_PER_BEAT
    console.print(f"{title}: {len(above)} notes of melody, {len(below)} of bass, {beats:.0f} beats", soft_wrap=True)
    if bach is not None:
        agreement = Agreement.of([pitches(bass)], [bach])
        console.print(f"{agreement.sounding:.1%} of the eighths have the pitch of Bach's bass")
    console.print(f"to listen to: {midi}\nto look at:   {picture}", soft_wrap=True)


def _chorale(name: str | None, seed: int) -> Harmony:
    """The chorale of that name, or one that was held out, by chance."""
    from ..musenet.data import chorales

    found = harmonies(chorales())
    if name is None:
        held_out = [harmony for harmony in found if harmony.held_out]
        return held_out[int(torch.randint(len(held_out), (), generator=torch.Generator().manual_seed(seed)))]
    for harmony in found:
        if harmony.name == name:
            return harmony
    raise ValueError(f"piece must be one of the {len(found)} chorales, such as {found[0].name}, got {name!r}")
