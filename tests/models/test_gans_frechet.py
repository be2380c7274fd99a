"""The distance of two Gaussians, and what the judge of digits says of good and bad ones."""

from __future__ import annotations

import pytest
import torch
from scipy.linalg import sqrtm

from models import checkpoint
from models.cache import cache_directory
from models.gans import classifier
from models.gans.classifier import digits_classifier
from models.gans.data import Digits
from models.gans.frechet import DigitsJudge, Gaussian, frechet_distance


def test_of_one_dimension_it_is_known() -> None:
    a, b = (Gaussian(torch.tensor([m]).double(), torch.tensor([[s**2]]).double()) for m, s in ((1.0, 3.0), (3.0, 0.5)))
    assert frechet_distance(a, b) == pytest.approx((1 - 3) ** 2 + (3 - 0.5) ** 2)


@pytest.mark.parametrize("count", [40, 5])
def test_of_many_it_is_scipy_s(count: int) -> None:
    """Of 5 samples in 8 dimensions the covariances have no full rank."""
    a, b = torch.randn(count, 8), 0.5 * torch.randn(count, 8) + 1
    ours, theirs = Gaussian.of(a), Gaussian.of(b)
    root = torch.from_numpy(sqrtm(ours.covariance.numpy() @ theirs.covariance.numpy()).real)
    expected = (ours.mean - theirs.mean).square().sum() + (ours.covariance + theirs.covariance - 2 * root).trace()
    assert frechet_distance(ours, theirs) == pytest.approx(expected.item(), rel=1e-5)
    assert frechet_distance(theirs, ours) == pytest.approx(frechet_distance(ours, theirs), rel=1e-8)
    assert frechet_distance(ours, ours) == pytest.approx(0, abs=1e-6)


def test_moments_are_those_of_the_features() -> None:
    features = torch.randn(30, 4)
    found = Gaussian.of(features)
    torch.testing.assert_close(found.mean, features.double().mean(0))
    centred = features.double() - found.mean
    torch.testing.assert_close(found.covariance, centred.T @ centred / 29)
    with pytest.raises(ValueError, match=r"features must be \(2 or more, F\), got shape \(1, 4\)"):
        Gaussian.of(features[:1])


def test_the_classifier_knows_digits_and_is_kept() -> None:
    before = torch.get_rng_state()
    found = digits_classifier()
    assert torch.equal(before, torch.get_rng_state())
    held_out = Digits(16, "held out")
    right = (found(held_out.images).argmax(1) == held_out.labels).double().mean().item()
    assert right > 0.97
    assert found.accuracy.item() == pytest.approx(right)
    (kept,) = cache_directory().glob("digits-classifier*")
    written = kept.stat().st_mtime_ns
    again = digits_classifier()
    assert kept.stat().st_mtime_ns == written
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), again.parameters()))


def test_the_judge_tells_good_from_bad() -> None:
    judge, digits = DigitsJudge(), Digits(32)
    good = judge.scores(digits.images, digits.labels)
    assert good.frechet < 10  # none, but for the way from 32×32 back to 16×16
    assert good.hits is not None
    assert good.hits > 0.98
    assert judge.unseen < 60
    noise = judge.scores(torch.randn(500, 1, 16, 16), None)
    assert noise.hits is None
    assert noise.frechet > 5 * judge.unseen
    blurred = judge.scores(torch.nn.functional.avg_pool2d(digits.images, 5, 1, 2), digits.labels)
    assert good.frechet < blurred.frechet < noise.frechet
    shifted = judge.scores(digits.images, digits.labels.roll(1))
    assert shifted.hits is not None
    assert shifted.hits < 0.3
    assert str(shifted) == f"Fréchet distance {shifted.frechet:.2f}, asked class hit by {shifted.hits:.1%}"


@pytest.mark.parametrize("damage", ["other settings", "cut off"])
def test_a_kept_classifier_that_is_no_good_is_trained_again(monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    good = digits_classifier()
    (kept,) = cache_directory().glob("digits-classifier*")
    if damage == "cut off":
        kept.write_bytes(kept.read_bytes()[:-100])
    else:
        checkpoint.save(kept, classifier.KIND, good.state_dict(), classifier.TRAINED | {"steps": 1})
    monkeypatch.setattr(classifier, "trained", lambda: good)
    assert digits_classifier() is good
    assert checkpoint.load(kept, classifier.KIND)[1] == classifier.TRAINED
