"""GPT-2 on text: dense at its own length, and sparse at a longer one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from models.compare import Problem
from models.gpt2.comparison import bytes_of_text, problem
from models.gpt2.model import Config, preset

from .. import model_cases
from ..cases import Deferred
from ..language import variant
from ..results import Bar, Result


def _build(config: Config, dtype: torch.dtype, device: str) -> Problem:
    return problem(config, bytes_of_text(config, 1), dtype, device, seed=0)


SPARSE = {"pattern": "fixed", "stride": 128, "summary": 32}

#: The first is a third of what ``python -m models compare gpt2`` compares, or its float64 would take half a minute.
VARIANTS = (
    variant(_build, preset("small", layers=4)),
    variant(_build, preset("tiny", layers=4, heads=4, width=256, hidden=1024, context=2048, attention=SPARSE)),
)
QUICK = (variant(_build, preset("tiny", vocabulary=256, context=256, attention={"pattern": "local", "window": 64})),)


def cases(device: torch.device, quick: bool) -> Iterator[Deferred]:
    yield from model_cases.cases(QUICK if quick else VARIANTS, device, quick)


def bars(results: Sequence[Result]) -> list[Bar]:
    return model_cases.bars(results, VARIANTS)
