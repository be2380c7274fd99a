"""ProGAN: WGAN-GP, whose penalty is differentiated twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from models.gans.growing import GrowingConfig
from models.progan.cli import TINY
from models.progan.model import Progan

from .. import gans, model_cases
from ..cases import Deferred
from ..results import Bar, Result

#: What ``python -m models compare progan`` compares; and what ``train`` trains on digits unless it is told otherwise.
VARIANTS = (
    gans.variant(Progan, GrowingConfig(size=256, capacity=4096, widest=128), 8, asked=1.1),
    gans.variant(Progan, TINY, 64, asked=1.1),
)
QUICK = (gans.variant(Progan, TINY, 8),)


def cases(device: torch.device, quick: bool) -> Iterator[Deferred]:
    yield from model_cases.cases(QUICK if quick else VARIANTS, device, quick)


def bars(results: Sequence[Result]) -> list[Bar]:
    return model_cases.bars(results, VARIANTS)
