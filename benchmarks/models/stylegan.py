"""StyleGAN: the logistic loss with R1, which is differentiated twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from models.stylegan.cli import TINY
from models.stylegan.model import Stylegan, StyleganConfig

from .. import gans, model_cases
from ..cases import Deferred
from ..results import Bar, Result

#: What ``python -m models compare stylegan`` compares; and what ``train`` trains on digits unless it is told otherwise.
VARIANTS = (
    gans.variant(Stylegan, StyleganConfig(size=256, capacity=4096, widest=128), 8, asked=1.5),
    gans.variant(Stylegan, TINY, 64, asked=1.5),
)
QUICK = (gans.variant(Stylegan, TINY, 8),)


def cases(device: torch.device, quick: bool) -> Iterator[Deferred]:
    yield from model_cases.cases(QUICK if quick else VARIANTS, device, quick)


def bars(results: Sequence[Result]) -> list[Bar]:
    return model_cases.bars(results, VARIANTS)
