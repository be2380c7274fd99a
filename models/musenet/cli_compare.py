"""``python -m models compare musenet``."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Annotated, cast

import torch
import typer
from typer import Option

from .. import report
from ..atomic import replacing, writable

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

#: All that a generator's state tells apart.
Seed = Annotated[int, Option(min=0, max=2**63 - 1)]


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


def _check_device(device: str) -> None:
    """Raise a ValueError if ``device`` is not a CPU or GPU that torch can compute on."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {device!r}")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device must be one that this machine has, got {device!r}: {error}") from error
