"""What ``python -m models ... musenet`` takes and prints."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from typer import Option

from .. import report
from ..atomic import replacing, writable
from .tokens import Vocabulary

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

#: All that a generator's state tells apart.
Seed = Annotated[int, Option(min=0, max=2**63 - 1)]

#: What --resume takes from the command line; all else is the checkpoint's.
RESUMABLE = {"out", "steps", "save_every", "resume"}


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
    dtype: Annotated[str, Option(help=", ".join(DTYPES))] = "float32",
    device: Annotated[str, Option(help="cpu, cuda or cuda:N.")] = "cpu",
    backend: Annotated[str, Option(help="What serves our side: auto, cpu, triton.")] = "auto",
    repetitions: Annotated[int, Option(help="Timed runs of each.")] = 3,
    seed: Seed = 0,
    json_path: Annotated[Path | None, Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Run MuseNet on chorales with our kernels and in plain PyTorch. Exits with 1 if the numbers differ."""
    from ..compare import check_backend
    from ..compare import compare as run
    from .comparison import chorale_tokens, problem
    from .model import Config
    from .patterns import Attention
    from .tokens import CHORALES

    console = report.console()
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    _check_device(device)
    check_backend(backend)
    config = Config(
        vocabulary=len(CHORALES), context=context, layers=layers, heads=heads, width=width,
        attention=cast(Attention, attention), stride=stride, summary=summary, recompute=recompute,
    )  # fmt: skip
    if json_path is not None:
        writable(json_path)
    tokens = chorale_tokens(context)
    with console.status("starting") as status:
        comparison = run(
            partial(problem, config, tokens, batch, DTYPES[dtype], device, seed),
            dtype=DTYPES[dtype], device=device, backend=backend, repetitions=repetitions, say=status.update,
        )  # fmt: skip
    title = (
        f"MuseNet: {layers} layers, {heads} heads, width {width}, {report.count(comparison.parameters)} parameters; "
        f"{attention} attention, {batch} × {context} tokens of chorales, {dtype}"
    )
    report.show(comparison, console, title)
    if json_path is not None:
        figures = {"model": "musenet", "config": vars(config), "batch": batch, **comparison.as_json()}
        with replacing(json_path) as temporary:
            temporary.write_text(json.dumps(figures, indent=2) + "\n")
        console.print(f"figures in {json_path}", soft_wrap=True)
    if not comparison.agree:
        raise typer.Exit(1)


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
    seed: Seed = 0,
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


def _typed(ctx: typer.Context, name: str) -> bool:
    """Whether an option was typed, and is not a default."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _check_device(device: str) -> None:
    """Raise a ValueError if ``device`` is not a CPU or GPU that torch can compute on."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {device!r}")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device must be one that this machine has, got {device!r}: {error}") from error


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
