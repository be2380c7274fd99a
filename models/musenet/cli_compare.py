"""``python -m models compare musenet``."""

from __future__ import annotations

from functools import partial
from typing import Annotated, cast

from typer import Option

from .. import commands


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
