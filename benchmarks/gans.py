"""GANs as :mod:`benchmarks.model_cases` wants them: both networks together, on scikit-learn's digits."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch

from models.compare import Problem
from models.gans.cli import fitted
from models.gans.comparison import problem, real_images
from models.gans.data import Batch
from models.gans.model import Config, Gan

from .model_cases import Variant


def variant(gan: type[Gan], config: Config, batch: int, **asked: Any) -> Variant:
    """``asked`` are fields of the variant. Both networks have ReLUs, leaky or not."""
    about = f"{gan.title}, {batch} images of {config.size}×{config.size}"
    name = f"{batch}×{config.size}×{config.size}"
    return Variant(name, about, partial(_build, gan, config, batch), kinks=True, **asked)


def _build(gan: type[Gan], config: Config, batch: int, dtype: torch.dtype, device: str) -> Problem:
    shape, real = _fitted(gan, config, batch)
    return problem(gan, shape, real, dtype, device, seed=0)


@cache
def _fitted(gan: type[Gan], config: Config, batch: int) -> tuple[Config, Batch]:
    """The configuration for the digits, and a batch of them."""
    recipe = gan.recipe
    shape = fitted(config, recipe)
    return shape, real_images(recipe.data, shape, batch, grey=recipe.grey, conditional=recipe.conditional, seed=0)
