"""BERT on text, with masked tokens to tell: dense at its own length, and sparse at a longer one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from models.bert.comparison import pairs_of_segments, problem
from models.bert.model import Config, preset
from models.compare import Problem

from .. import model_cases
from ..cases import Deferred
from ..language import variant
from ..results import Bar, Result


def _build(config: Config, dtype: torch.dtype, device: str) -> Problem:
    return problem(config, *pairs_of_segments(config, 1), dtype, device, seed=0)


#: The first is what ``python -m models compare bert`` compares.
VARIANTS = (
    variant(_build, preset("base")),
    variant(_build, preset("mini", context=2048, attention={"pattern": "local", "window": 256})),
)
QUICK = (variant(_build, preset("tiny", context=256, attention={"pattern": "local", "window": 64})),)


def cases(device: torch.device, quick: bool) -> Iterator[Deferred]:
    yield from model_cases.cases(QUICK if quick else VARIANTS, device, quick)


def bars(results: Sequence[Result]) -> list[Bar]:
    return model_cases.bars(results, VARIANTS)
