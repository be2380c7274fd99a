"""What ``python -m models ... bert`` takes and prints."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Annotated

from typer import Option

from .. import commands
from ..language import read_attention


def compare(
    preset: Annotated[str, Option(help="tiny, mini, small, medium, base or large.")] = "base",
    layers: Annotated[int | None, Option(help="Those of the preset by default.")] = None,
    context: Annotated[int, Option(help="Bytes of text, and positions in the model's table.")] = 512,
    batch: int = 1,
    attention: Annotated[
        str | None, Option(help='{"pattern": "local", "window": 256} or the like, or a list of one a layer.')
    ] = None,
    dtype: commands.Dtype = "float32",
    device: commands.Device = "cpu",
    backend: commands.Backend = "auto",
    repetitions: commands.Repetitions = 3,
    seed: commands.Seed = 0,
    json_path: commands.JsonPath = None,
) -> None:
    """Run BERT on text with our kernels and in plain PyTorch. Exits with 1 if the numbers differ."""
    from .comparison import pairs_of_segments, problem
    from .model import preset as shape

    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    kind = commands.check_comparison(dtype=dtype, device=device, backend=backend, json_path=json_path)
    config = shape(
        preset, layers=layers, context=context, attention=read_attention(attention), dropout=0.0, attention_dropout=0.0
    )
    text = pairs_of_segments(config, batch)
    config.layouts(context)  # a mistake in a pattern is told here, before a side has started
    commands.compare_and_show(
        partial(problem, config, *text, kind, device, seed),
        f"BERT {preset}: {config.layers} layers, {config.heads} heads, width {config.width}, {{parameters}}; "
        f"{config.patterns()} attention, {batch} × {context} bytes of Python's reference, {dtype}",
        {"model": "bert", "config": asdict(config), "batch": batch},
        dtype=kind, device=device, backend=backend, repetitions=repetitions, json_path=json_path,
    )  # fmt: skip
