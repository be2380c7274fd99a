"""Adversarial losses and gradient penalties.

A loss gives named terms, each a number, and what is descended is their sum. ``score`` is the discriminator: it takes a
:class:`~models.gans.data.Batch` to scores ``(N,)``, real above fake. Penalties differentiate it twice, so they run
eagerly, and in float32 also where the rest is in less.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import Batch
from .twice import towards_images

Score = Callable[[Batch], Tensor]
Terms = dict[str, Tensor]


class Loss(Protocol):
    """What the adversarial loop descends."""

    def discriminator(self, score: Score, real: Batch, fake: Batch) -> Terms:
        """The discriminator's terms. ``fake`` carries no gradient to a generator."""

    def generator(self, fake: Tensor) -> Terms:
        """The generator's terms, of the scores of what it made."""


@dataclass(frozen=True)
class Hinge:
    """The hinge loss (SAGAN, arXiv 1805.08318, equation 4).

    Discriminator: ``mean(relu(1 - D(real))) + mean(relu(1 + D(fake)))``; generator: ``-mean(D(fake))``. Real and fake
    images are scored in one pass, so that a spectral norm is the same for both.
    """

    def discriminator(self, score: Score, real: Batch, fake: Batch) -> Terms:
        labels = None if real.labels is None or fake.labels is None else torch.cat([real.labels, fake.labels])
        both = score(Batch(torch.cat([real.images, fake.images]), labels))
        of_real, of_fake = both.split([len(real.images), len(fake.images)])
        return {"hinge": F.relu(1 - of_real).mean() + F.relu(1 + of_fake).mean()}

    def generator(self, fake: Tensor) -> Terms:
        return {"hinge": -fake.mean()}


@dataclass(frozen=True)
class Wasserstein:
    """WGAN-GP with drift (ProGAN, arXiv 1710.10196, appendix A.1).

    Discriminator: ``mean(D(fake)) - mean(D(real)) + penalty * mean((||∇D(mixed)|| - 1)²) + drift * mean(D(real)²)``,
    where ``mixed = t * real + (1 - t) * fake`` with ``t`` uniform for each image; generator: ``-mean(D(fake))``.
    """

    penalty: float = 10.0
    drift: float = 1e-3

    def discriminator(self, score: Score, real: Batch, fake: Batch) -> Terms:
        of_real = score(real)
        return {
            "wasserstein": score(fake).mean() - of_real.mean(),
            "gradient penalty": self.penalty * gradient_penalty(score, real, fake),
            "drift": self.drift * of_real.square().mean(),
        }

    def generator(self, fake: Tensor) -> Terms:
        return {"wasserstein": -fake.mean()}


@dataclass(frozen=True)
class Logistic:
    """The non-saturating logistic loss with R1 (StyleGAN, arXiv 1812.04948, appendix C; arXiv 1801.04406).

    Discriminator: ``mean(softplus(-D(real))) + mean(softplus(D(fake))) + gamma / 2 * mean(||∇D(real)||²)``;
    generator: ``mean(softplus(-D(fake)))``.
    """

    gamma: float = 10.0

    def discriminator(self, score: Score, real: Batch, fake: Batch) -> Terms:
        of_real, gradients = _differentiated(score, real)  # in one pass, which R1 needs in any case
        return {
            "logistic": F.softplus(-of_real).mean() + F.softplus(score(fake)).mean(),
            "r1": self.gamma / 2 * gradients.square().flatten(1).sum(1).mean(),
        }

    def generator(self, fake: Tensor) -> Terms:
        return {"logistic": F.softplus(-fake).mean()}


def gradient_penalty(score: Score, real: Batch, fake: Batch) -> Tensor:
    """``mean((||∇D(mixed)||₂ - 1)²)`` between pairs of real and fake images, with the classes of the real ones."""
    # Drawn in float32 whatever the images are: one seed gives the same places in every dtype.
    t = torch.rand(len(real.images), 1, 1, 1, device=real.images.device).to(real.images.dtype)
    mixed = torch.lerp(fake.images.to(real.images.dtype), real.images, t)  # autocast makes images of fewer bits
    _, gradients = _differentiated(score, Batch(mixed, real.labels))
    return (gradients.flatten(1).norm(dim=1) - 1).square().mean()


def _differentiated(score: Score, batch: Batch) -> tuple[Tensor, Tensor]:
    """Scores, and their gradients with respect to the images, both to be differentiated."""
    images = batch.images.detach().requires_grad_()
    with torch.autocast(images.device.type, enabled=False), towards_images():
        scores = score(Batch(images, batch.labels))
        (gradients,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
    return scores, gradients
