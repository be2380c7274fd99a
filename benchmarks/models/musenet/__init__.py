"""MuseNet: writing a token at a time, and training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ...cases import Deferred
from ...results import Bar, Result
from . import decoding, training


def cases(device: torch.device, quick: bool) -> Iterator[Deferred]:
    yield from decoding.cases(device, quick)
    yield from training.cases(device, quick)


def bars(results: Sequence[Result]) -> list[Bar]:
    return [*decoding.bars(results), *training.bars(results)]
