"""GANs as :mod:`benchmarks.model_cases` wants them: both networks together, on scikit-learn's digits."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch

from models.compare import Problem
from models.gans.comparison import problem, real_images
from models.gans.data import Batch, Digits
from models.gans.model import Config, Gan

from .model_cases import Variant


def variant(gan: type[Gan], config: Config, batch: int, **asked: Any) -> Variant:
    """``asked`` are fields of the variant. Both networks have ReLUs, leaky or not.

    torch.compile does not compete: it takes more than a minute, and gradient penalties can't be compiled at all.
    """
    about = f"{gan.title}, {batch} images of {config.size}×{config.size}"
    name = f"{batch}×{config.size}×{config.size}"
    return Variant(name, about, partial(_build, gan, config, batch), kinks=True, compiles=False, **asked)


def _build(gan: type[Gan], config: Config, batch: int, dtype: torch.dtype, device: str) -> Problem:
    shape, real = _fitted(config, batch, conditional=gan.recipe.conditional)
    return problem(gan, shape, real, dtype, device, seed=0)


@cache
def _fitted(config: Config, batch: int, *, conditional: bool) -> tuple[Config, Batch]:
    """The configuration for the digits, and a batch of them: resizing all of them takes a second."""
    images = Digits(config.size)
    shape = replace(config, channels=images.channels, classes=len(images.classes) if conditional else 0)
    return shape, real_images("digits", shape, batch, grey=False, conditional=conditional, seed=0)
