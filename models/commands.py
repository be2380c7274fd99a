"""What the command lines of all models share."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from typer import Option

from . import compare, report
from .atomic import replacing, writable
from .checkout import commit
from .training import Run

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

Seed = Annotated[int, Option(min=0, max=2**63 - 1)]  # all that a generator's state tells apart
Dtype = Annotated[str, Option(help=", ".join(DTYPES))]
Device = Annotated[str, Option(help="cpu, cuda or cuda:N.")]
Backend = Annotated[str, Option(help="What serves our side: auto, cpu, cuda, triton.")]
Repetitions = Annotated[int, Option(help="Timed runs of each.")]
JsonPath = Annotated[Path | None, Option("--json", help="Also write the figures here.")]
Out = Annotated[Path, Option(help="Folder for the checkpoint and the logs.")]
Steps = Annotated[int, Option(help="Steps in all, those before a resumption included.")]
Resume = Annotated[bool, Option("--resume", help="Go on with the checkpoint in --out.")]
SaveEvery = Annotated[int, Option(help="Steps between checkpoints.")]

#: What --resume takes from the command line; all else is the checkpoint's.
RESUMABLE = {"out", "steps", "save_every", "resume"}


def check_device(device: str) -> None:
    """Raise a ValueError if ``device`` is not a CPU or GPU that torch can compute on."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {device!r}")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device must be one that this machine has, got {device!r}: {error}") from error


def checkpoint_path(
    ctx: typer.Context, out: Path, *, steps: int, save_every: int, resume: bool, resumable: Collection[str] = RESUMABLE
) -> Path:
    """The checkpoint of a run in ``out``, once all is well with going on from it, or with beginning it.

    Raises:
        ValueError: if a number makes no sense, an option was typed that the checkpoint decides, a run that begins finds
            a checkpoint there, or none could be written.
    """
    path = out / "checkpoint.safetensors"
    if steps < 1 or save_every < 1:
        raise ValueError(f"steps and save-every must be at least 1, got {steps} and {save_every}")
    if resume:
        for name in ctx.params:
            if name not in resumable and _typed(ctx, name):
                raise ValueError(f"--{name.replace('_', '-')} can't be given with --resume: {path} decides it")
    elif path.exists():
        raise ValueError(f"{path}: is there already; --resume goes on with it, another --out leaves it be")
    if path.exists() or not resume:
        writable(path)
    return path


def _typed(ctx: typer.Context, name: str) -> bool:
    """Whether an option was typed, and is not a default."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def follow(run: Run, path: Path, *, steps: int, save_every: int, console: Console) -> None:
    """Let a run train, with a progress bar, TensorBoard logs beside the checkpoint ``path``, and checkpoints.

    Ctrl-C ends the run after a whole step, with a checkpoint and exit code 130; a second one is as always.

    Raises:
        ValueError: if the run has done ``steps`` already, or diverges.
    """
    from torch.utils.tensorboard import SummaryWriter

    if steps <= run.step:
        raise ValueError(f"steps must be more than the {run.step} that {path} has done, got {steps}")
    if run.step:
        console.print(f"Going on after step {run.step} with {path}", soft_wrap=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with (
        SummaryWriter(str(path.parent), purge_step=run.step + 1) as log,
        Bar(*columns, console=console) as bar,
        _asked_to_stop() as stop,
    ):
        task = bar.add_task("training", total=steps, completed=run.step)
        for done in run.run(steps):
            for tag, value in done.scalars.items():
                log.add_scalar(tag, value, done.step)
            for tag, image in done.images.items():
                log.add_image(tag, image, done.step)
            if done.said is not None:
                bar.console.print(done.said, highlight=False)
            bar.update(task, completed=done.step, description=done.shown)
            if done.step % save_every == 0 or done.step >= steps or stop:
                run.save(path)
            if stop:
                break
    if stop and run.step < steps:
        console.print(f"Stopped after step {run.step}; --resume goes on from there.")
        raise typer.Exit(130)
    logs = f"logs: tensorboard --logdir {path.parent}"
    console.print(f"{run.step} steps done. Checkpoint in {path}; {logs}", soft_wrap=True)


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


def check_comparison(*, dtype: str, device: str, backend: str, json_path: Path | None) -> torch.dtype:
    """What ``compare`` asks before it reads any data. Returns the dtype of that name.

    Raises:
        ValueError: if there is no such dtype, device or backend here, or no file could be written at ``json_path``.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    check_device(device)
    compare.check_backend(backend)
    if json_path is not None:
        writable(json_path)
    return DTYPES[dtype]


def compare_and_show(
    build: compare.Build,
    title: str,
    about: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    device: str,
    backend: str,
    repetitions: int,
    json_path: Path | None,
    kinks: bool = False,
) -> None:
    """Run a model on our kernels and in plain PyTorch, and print how they compare. Exits with 1 if the numbers differ.

    Args:
        build: see :func:`models.compare.compare`, as for the arguments not told here.
        title: what ran; the number of parameters goes where it says ``{parameters}``.
        about: what the figures in ``json_path`` begin with: model, configuration.
    """
    console = report.console()
    with console.status("starting") as status:
        comparison = compare.compare(
            build, dtype=dtype, device=device, backend=backend, repetitions=repetitions, kinks=kinks,
            say=status.update,
        )  # fmt: skip
    report.show(comparison, console, title.format(parameters=f"{report.count(comparison.parameters)} parameters"))
    if json_path is not None:
        with replacing(json_path) as temporary:
            date = datetime.now(timezone.utc).isoformat(timespec="seconds")
            written = {**about, "date": date, **commit(), **comparison.as_json()}
            temporary.write_text(json.dumps(written, indent=2) + "\n")
        console.print(f"figures in {json_path}", soft_wrap=True)
    if not comparison.agree:
        raise typer.Exit(1)
