"""BigGAN as the adversarial loop has it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor

import gdl_kernels

from ..gans.data import Batch
from ..gans.losses import Hinge, Terms
from ..gans.model import Gan
from ..gans.pictures import Picture, truncation_sweep
from ..gans.training import Recipe
from .config import BigganConfig
from .networks import Discriminator, Generator

#: Of the picture of truncations: those of the paper's second figure.
THRESHOLDS = (0.04, 0.5, 1.0, 2.0)


class Biggan(Gan):
    """BigGAN and BigGAN-deep: the hinge loss, and a generator whose weights are drawn to orthogonal ones.

    The recipe is the paper's but for the batch, which is 2048 there.
    """

    name = "biggan"
    title = "BigGAN"
    config_type = BigganConfig
    recipe = Recipe(
        generator_rate=5e-5, discriminator_rate=2e-4, beta1=0.0, beta2=0.999, discriminator_steps=2, ema=0.9999
    )
    truncates = True

    generator: Generator
    config: BigganConfig

    def __init__(self, config: BigganConfig) -> None:
        super().__init__(config)
        self.generator, self.discriminator, self.loss = Generator(config), Discriminator(config), Hinge()

    def latents(
        self, count: int, *, truncation: float | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Normal noise; of which values beyond ``truncation`` are drawn again."""
        if truncation is None:
            return super().latents(count, generator=generator)
        return gdl_kernels.truncated_normal((count, self.config.latent), truncation, generator=generator)

    @classmethod
    def pictures(cls) -> Mapping[str, Picture]:
        return {**super().pictures(), "truncation": partial(truncation_sweep, truncations=THRESHOLDS)}

    def generator_terms(self, fake: Batch) -> Terms:
        if not self.config.penalty:
            return super().generator_terms(fake)
        penalty = gdl_kernels.orthogonal_regularization(
            self.generator.regularized(),
            beta=self.config.penalty,
            gram=cast(Literal["columns", "rows"], self.config.gram),
        )
        return super().generator_terms(fake) | {"orthogonality": penalty}
