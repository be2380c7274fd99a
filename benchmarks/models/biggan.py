"""BigGAN: SAGAN's parts, with a penalty on all of the generator's weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from models.biggan.cli import DIGITS
from models.biggan.config import BigganConfig
from models.biggan.model import Biggan

from .. import gans, model_cases
from ..cases import Deferred
from ..results import Bar, Result

#: What ``python -m models compare biggan`` compares; and what ``train`` trains on digits unless it is told otherwise.
VARIANTS = (
    gans.variant(Biggan, BigganConfig(width=16), 4, asked=1.3, less_memory=True),
    gans.variant(Biggan, DIGITS, 64, asked=1.3),
)
QUICK = (gans.variant(Biggan, DIGITS, 8),)


def cases(device: torch.device, quick: bool) -> Iterator[Deferred]:
    yield from model_cases.cases(QUICK if quick else VARIANTS, device, quick)


def bars(results: Sequence[Result]) -> list[Bar]:
    return model_cases.bars(results, VARIANTS)
