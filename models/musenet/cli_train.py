"""``python -m models train musenet``."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from .. import commands, report
from .recipe import Recipe

if TYPE_CHECKING:
    from .data import Piece

#: What --resume takes from the command line besides: where the pieces and the processor are now.
RESUMABLE = commands.RESUMABLE | {"data", "strict", "device"}


def train(
    ctx: typer.Context,
    data: Annotated[Path | None, Option(help="A folder of MIDI files; the Bach chorales by default.")] = None,
    strict: Annotated[bool, Option("--strict", help="Stop at a MIDI file that can't be played.")] = False,
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
    pieces: Annotated[int | None, Option(help="Chorales or files to read; all by default.")] = None,
    length: Annotated[int | None, Option(help="Tokens in an excerpt; the context by default.")] = None,
    batch: Annotated[int, Option(help="Excerpts in a step.")] = 4,
    accumulate: Annotated[int, Option(help="Parts that a step's batch is gone through in.")] = 1,
    precision: Annotated[str, Option(help="float32, or bfloat16 with float32 weights.")] = "float32",
    rate: Annotated[float, Option(help="Highest learning rate.")] = 1e-3,
    warmup: Annotated[int, Option(help="Steps until it is reached.")] = 50,
    ema: Annotated[float, Option(help="Decay of the moving average of weights; 0 is none.")] = 0.999,
    drop: Annotated[float, Option(help="How often a piece is met without composer, instruments, length.")] = 0.25,
    evaluate: Annotated[int, Option(help="Steps between measurements on held-out pieces.")] = 50,
    held_out: Annotated[int, Option(help="Excerpts of held-out pieces to measure on.")] = 8,
    transpose: Annotated[bool, Option(help="Play each piece in a random key.")] = True,
    device: commands.Device = "cpu",
    seed: commands.Seed = 0,
) -> None:
    """Train MuseNet on the Bach chorales or on MIDI files, with losses in bits per token."""
    from .data import chorales
    from .folder import read_folder, vocabulary_of
    from .model import preset as shape
    from .tokens import CHORALES
    from .training import Training

    console = report.console()
    path = commands.checkpoint_path(ctx, out, steps=steps, save_every=save_every, resume=resume, resumable=RESUMABLE)
    commands.check_device(device)

    def read(recipe: Recipe) -> Iterable[Piece]:
        if recipe.data is None:
            if data is not None:
                raise ValueError(f"--data can't be given with --resume: {path} was trained on the chorales")
            return chorales(recipe.pieces)
        folder = Path(recipe.data) if data is None else data
        return read_folder(
            folder,
            recipe.pieces,
            strict=strict,
            say=partial(console.print, soft_wrap=True, markup=False, highlight=False),
        )

    if resume:
        run = Training.resumed(path, read, device=device)
    else:
        vocabulary = CHORALES if data is None else vocabulary_of(data)
        config = shape(
            preset, len(vocabulary), attention=attention, layers=layers, heads=heads, width=width, context=context,
            stride=stride, summary=summary, dropout=dropout, recompute=recompute,
        )  # fmt: skip
        recipe = Recipe(
            data=None if data is None else str(data.resolve()), pieces=pieces,
            length=config.context if length is None else length, batch=batch, accumulate=accumulate,
            precision=precision, rate=rate, warmup=warmup, ema=ema, drop=drop, held_out=held_out, evaluate=evaluate,
            transpose=transpose, seed=seed,
        )  # fmt: skip
        run = Training(config, recipe, vocabulary, read(recipe), device=device)
    parameters = sum(p.numel() for p in run.model.parameters())
    excerpts = f"{run.recipe.batch} excerpts of {run.recipe.length} tokens a step"
    console.print(f"{report.count(parameters)} parameters, {run.config.attention} attention, {excerpts}")
    commands.follow(run, path, steps=steps, save_every=save_every, console=console)
    console.print(
        f"Held out: {run.last_held_out:.3f} bits per token; bigrams of the same pieces: {run.bigram_held_out:.3f}"
    )
