"""How far samples are from digits: the Fréchet distance of features, and how many are of the class that was asked for.

As the Fréchet inception distance (arXiv 1706.08500), in the features of :mod:`models.gans.classifier` instead. Its
figures compare with each other and with no published one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .classifier import Classifier, digits_classifier
from .data import Digits


@dataclass(frozen=True)
class Gaussian:
    """Mean ``(F,)`` and covariance ``(F, F)``, float64."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Gaussian:
        """The Gaussian with the moments of features ``(N, F)``, of which there must be two or more."""
        if features.dim() != 2 or len(features) < 2:
            raise ValueError(f"features must be (2 or more, F), got shape {tuple(features.shape)}")
        features = features.double()
        return cls(features.mean(0), features.T.cov())


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """``||m_a - m_b||² + tr(S_a + S_b - 2 (S_a S_b)^½)``.

    The trace of the root is that of ``(S_a^½ S_b S_a^½)^½``, which is symmetric: its eigenvalues are real, and those
    that rounding makes negative are 0.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    shared = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp_min(0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * shared
    return max(0.0, float(distance))


@dataclass(frozen=True)
class Scores:
    """Fréchet distance to the digits trained on, and the share of samples of the asked class, if one was asked."""

    frechet: float
    hits: float | None

    def scalars(self) -> dict[str, float]:
        """For TensorBoard."""
        hits = {} if self.hits is None else {"scores/asked class hit": self.hits}
        return {"scores/Fréchet distance": self.frechet, **hits}

    def __str__(self) -> str:
        hits = "" if self.hits is None else f", asked class hit by {self.hits:.1%}"
        return f"Fréchet distance {self.frechet:.2f}{hits}"


class DigitsJudge:
    """Scores samples against the digits that models are trained on.

    Attributes:
        unseen: the distance of the digits held out: what a generator has that writes as well as people do.
    """

    def __init__(self) -> None:
        self.classifier: Classifier = digits_classifier()
        size = self.classifier.size
        self.digits = Gaussian.of(self.classifier.features(Digits(size).images))
        self.unseen = frechet_distance(
            Gaussian.of(self.classifier.features(Digits(size, "held out").images)), self.digits
        )

    @torch.no_grad()
    def scores(self, images: Tensor, labels: Tensor | None) -> Scores:
        """Of samples ``(N, 1, H, W)`` and the classes that they were to be of."""
        features = self.classifier.features(images)
        hits = None
        if labels is not None:
            hits = (self.classifier.head(features).argmax(1) == labels.cpu()).double().mean().item()
        return Scores(frechet_distance(Gaussian.of(features), self.digits), hits)
