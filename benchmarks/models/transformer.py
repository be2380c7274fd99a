"""The Transformer on chorales: attention over the melody, over the bass so far, and from one to the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from models.compare import Problem
from models.transformer.comparison import chorale_batch, problem
from models.transformer.harmony import VOCABULARY
from models.transformer.model import Config

from .. import model_cases
from ..cases import Deferred
from ..model_cases import Variant
from ..results import Bar, Result


def variant(layers: int, heads: int, width: int, batch: int, length: int) -> Variant:
    config = Config(
        VOCABULARY, VOCABULARY, encoder_layers=layers, decoder_layers=layers, heads=heads, width=width,
        hidden=4 * width, dropout=0.0,
    )  # fmt: skip
    return Variant(
        f"{batch}×{length}",
        f"{layers} and {layers} layers, {heads} heads, width {width}; {batch} × {length} eighth notes",
        partial(_build, config, batch, length),
        kinks=True,
        # Of the decoder's pairs with itself, those of later positions.
        left_out=batch * width * layers * length * (length - 1) // 2,
    )


def _build(config: Config, batch: int, length: int, dtype: torch.dtype, device: str) -> Problem:
    return problem(config, chorale_batch(batch, length), dtype, device, seed=0)


#: What ``python -m models compare transformer`` compares.
VARIANTS = (variant(layers=2, heads=8, width=512, batch=2, length=1024),)
QUICK = (variant(layers=1, heads=4, width=64, batch=2, length=128),)


def cases(device: torch.device, quick: bool) -> Iterator[Deferred]:
    yield from model_cases.cases(QUICK if quick else VARIANTS, device, quick)


def bars(results: Sequence[Result]) -> list[Bar]:
    return model_cases.bars(results, VARIANTS)
