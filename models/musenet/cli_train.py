"""``python -m models train musenet``."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from typer import Option

from .. import report
from ..atomic import writable

#: All that a generator's state tells apart.
Seed = Annotated[int, Option(min=0, max=2**63 - 1)]

#: What --resume takes from the command line; all else is the checkpoint's.
RESUMABLE = {"out", "steps", "save_every", "resume"}


def train(
    ctx: typer.Context,
    out: Annotated[Path, Option(help="Folder for the checkpoint and the logs.")] = Path("runs/musenet"),
    steps: Annotated[int, Option(help="Steps in all, those before a resumption included.")] = 500,
    resume: Annotated[bool, Option("--resume", help="Go on with the checkpoint in --out.")] = False,
    save_every: Annotated[int, Option(help="Steps between checkpoints.")] = 100,
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
    seed: Seed = 0,
) -> None:
    """Train MuseNet on the Bach chorales, with losses in bits per token."""
    from torch.utils.tensorboard import SummaryWriter

    from .data import chorales
    from .model import preset as shape
    from .tokens import CHORALES
    from .training import Recipe, Training

    console = report.console()
    path = out / "checkpoint.safetensors"
    if steps < 1 or save_every < 1:
        raise ValueError(f"steps and save-every must be at least 1, got {steps} and {save_every}")
    if resume:
        for name in ctx.params:
            if name not in RESUMABLE and _typed(ctx, name):
                raise ValueError(f"--{name.replace('_', '-')} can't be given with --resume: {path} decides it")
        if path.exists():
            writable(path)
        run = Training.resumed(path, chorales)
        if steps <= run.step:
            raise ValueError(f"steps must be more than the {run.step} that {path} has done, got {steps}")
        console.print(f"Going on after step {run.step} with {path}", soft_wrap=True)
    else:
        if path.exists():
            raise ValueError(f"{path}: is there already; --resume goes on with it, another --out leaves it be")
        config = shape(
            preset, len(CHORALES), attention=attention, layers=layers, heads=heads, width=width, context=context,
            stride=stride, summary=summary, dropout=dropout, recompute=recompute,
        )  # fmt: skip
        recipe = Recipe(
            pieces=pieces, length=config.context if length is None else length, batch=batch, rate=rate, warmup=warmup,
            held_out=held_out, evaluate=evaluate, transpose=transpose, seed=seed,
        )  # fmt: skip
        writable(path)
        run = Training(config, recipe, CHORALES, chorales(pieces))
    parameters = sum(p.numel() for p in run.model.parameters())
    excerpts = f"{run.recipe.batch} excerpts of {run.recipe.length} tokens a step"
    console.print(f"{report.count(parameters)} parameters, {run.config.attention} attention, {excerpts}")
    held: float | None = None
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with (
        SummaryWriter(str(out), purge_step=run.step + 1) as log,
        Progress(*columns, console=console) as bar,
        _asked_to_stop() as stop,
    ):
        task = bar.add_task("training", total=steps, completed=run.step)
        for done in run.run(steps):
            log.add_scalar("bits per token/training", done.loss, done.step)
            log.add_scalar("learning rate", done.rate, done.step)
            if done.held_out is not None:
                held = done.held_out
                log.add_scalar("bits per token/held out", held, done.step)
                bar.console.print(f"step {done.step}: {done.loss:.3f} bits per token, held out {held:.3f}")
            shown = "" if held is None else f", held out {held:.3f}"
            bar.update(task, completed=done.step, description=f"{done.loss:.3f} bits per token{shown}")
            if done.step % save_every == 0 or done.step >= steps or stop:
                run.save(path)
            if stop:
                break
    if stop and run.step < steps:
        console.print(f"Stopped after step {run.step}; --resume goes on from there.")
        raise typer.Exit(130)
    console.print(f"{run.step} steps done. Checkpoint in {path}; logs: tensorboard --logdir {out}", soft_wrap=True)


def _typed(ctx: typer.Context, name: str) -> bool:
    """Whether an option was typed, and is not a default."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


@contextmanager
def _asked_to_stop() -> Iterator[list[Any]]:
    """A list that is empty until Ctrl-C, so that a step is never left half done; a second Ctrl-C is as always."""
    asked: list[Any] = []
    usual = signal.getsignal(signal.SIGINT)

    def ask(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, usual)
