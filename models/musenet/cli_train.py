"""``python -m models train musenet``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from .. import commands, report


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
