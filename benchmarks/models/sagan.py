"""SAGAN: spectral norms, conditional batch norm, and attention in both networks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from models.sagan.cli import TINY
from models.sagan.model import Sagan, SaganConfig

from .. import gans, model_cases
from ..cases import Deferred
from ..results import Bar, Result

#: What ``python -m models compare sagan`` compares; and what ``train`` trains on digits unless it is told otherwise.
VARIANTS = (
    gans.variant(Sagan, SaganConfig(size=64, width=32), 16, asked=1.3, less_memory=True),
    gans.variant(Sagan, TINY, 64, asked=1.3),
)
QUICK = (gans.variant(Sagan, TINY, 8),)


def cases(device: torch.device, quick: bool) -> Iterator[Deferred]:
    yield from model_cases.cases(QUICK if quick else VARIANTS, device, quick)


def bars(results: Sequence[Result]) -> list[Bar]:
    return model_cases.bars(results, VARIANTS)
