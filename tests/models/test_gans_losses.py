"""Losses against their formulas, and penalties of a discriminator whose gradient is known."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.gans.data import Batch
from models.gans.losses import Hinge, Logistic, Loss, Wasserstein, gradient_penalty

SHAPE = (3, 2, 4, 4)


class Linear:
    """``D(x) = <w, x> + b[label]``, whose gradient is ``w`` everywhere."""

    def __init__(self) -> None:
        self.weight = torch.randn(SHAPE[1:], dtype=torch.float64, requires_grad=True)
        self.offset = torch.randn(5, dtype=torch.float64)

    def __call__(self, batch: Batch) -> Tensor:
        scores = (batch.images * self.weight).sum((1, 2, 3))
        return scores if batch.labels is None else scores + self.offset[batch.labels]


def batches() -> tuple[Batch, Batch]:
    real, fake = torch.randn(2, *SHAPE, dtype=torch.float64)
    return Batch(real, torch.tensor([0, 4, 1])), Batch(fake, torch.tensor([2, 2, 3]))


@pytest.mark.parametrize("labelled", [True, False])
def test_hinge(labelled: bool) -> None:
    score, (real, fake) = Linear(), batches()
    if not labelled:
        real, fake = Batch(real.images, None), Batch(fake.images, None)
    of_real, of_fake = score(real).tolist(), score(fake).tolist()
    expected = sum(max(0, 1 - s) for s in of_real) / 3 + sum(max(0, 1 + s) for s in of_fake) / 3
    terms = Hinge().discriminator(score, real, fake)
    assert {name: term.item() for name, term in terms.items()} == {"hinge": pytest.approx(expected)}
    assert Hinge().generator(score(fake))["hinge"].item() == pytest.approx(-sum(of_fake) / 3)


def test_wasserstein() -> None:
    score, (real, fake) = Linear(), batches()
    norm = score.weight.norm().item()
    terms = Wasserstein(penalty=10, drift=1e-3).discriminator(score, real, fake)
    assert {name: term.item() for name, term in terms.items()} == {
        "wasserstein": pytest.approx((score(fake).mean() - score(real).mean()).item()),
        "gradient penalty": pytest.approx(10 * (norm - 1) ** 2),
        "drift": pytest.approx(1e-3 * score(real).square().mean().item()),
    }
    assert Wasserstein().generator(score(fake))["wasserstein"].item() == pytest.approx(-score(fake).mean().item())


def test_logistic() -> None:
    score, (real, fake) = Linear(), batches()
    of_real, of_fake = score(real).tolist(), score(fake).tolist()
    terms = Logistic(gamma=4).discriminator(score, real, fake)
    cost = sum(math.log1p(math.exp(-s)) for s in of_real) / 3 + sum(math.log1p(math.exp(s)) for s in of_fake) / 3
    assert {name: term.item() for name, term in terms.items()} == {
        "logistic": pytest.approx(cost),
        "r1": pytest.approx(2 * score.weight.square().sum().item()),
    }
    expected = sum(math.log1p(math.exp(-s)) for s in of_fake) / 3
    assert Logistic().generator(score(fake))["logistic"].item() == pytest.approx(expected)


def test_r1_takes_no_pass_of_its_own() -> None:
    real, fake = batches()
    seen: list[Tensor | None] = []

    def score(batch: Batch) -> Tensor:
        seen.append(batch.labels)
        return batch.images.square().sum((1, 2, 3))

    terms = Logistic(gamma=2).discriminator(score, real, fake)
    assert seen == [real.labels, fake.labels]
    assert terms["r1"].item() == pytest.approx(4 * real.images.square().sum().item() / len(real.images))


def test_penalties_reach_the_weights() -> None:
    score, (real, fake) = Linear(), batches()
    r1 = Logistic(gamma=2).discriminator(score, real, fake)["r1"]
    (gradient,) = torch.autograd.grad(r1, score.weight)
    torch.testing.assert_close(gradient, 2 * score.weight.detach())
    norm = score.weight.detach().norm()
    (gradient,) = torch.autograd.grad(gradient_penalty(score, real, fake), score.weight)
    torch.testing.assert_close(gradient, 2 * (norm - 1) * score.weight.detach() / norm)


def test_the_penalty_is_taken_between_pairs_with_the_classes_of_the_real_ones() -> None:
    real, fake = batches()
    seen: list[Batch] = []

    def score(batch: Batch) -> Tensor:
        seen.append(batch)
        return batch.images.square().sum((1, 2, 3))

    gradient_penalty(score, real, fake)
    (mixed,) = seen
    t = (mixed.images - fake.images) / (real.images - fake.images)
    assert mixed.labels is real.labels
    assert ((t > 0) & (t < 1)).all()
    torch.testing.assert_close(t, t[:, :1, :1, :1].expand_as(t))  # one place for all pixels of an image
    assert t[:, 0, 0, 0].unique().numel() == 3


@pytest.mark.parametrize("loss", [Wasserstein(), Logistic()], ids=["wasserstein", "logistic"])
def test_penalties_are_in_float32_under_autocast(loss: Loss) -> None:
    weight = torch.randn(SHAPE[2] * SHAPE[3] * SHAPE[1], 1, requires_grad=True)

    def score(batch: Batch) -> Tensor:
        return F.linear(batch.images.flatten(1), weight.T)[:, 0]

    real, fake = (Batch(b.images.float(), None) for b in batches())
    fake = fake._replace(images=fake.images.bfloat16())  # as a generator makes them under autocast
    with torch.autocast("cpu", torch.bfloat16):
        terms = loss.discriminator(score, real, fake)
    norm = weight.detach().norm().double()
    exact = {"gradient penalty": 10 * (norm - 1) ** 2, "r1": 5 * norm**2}
    (name,) = exact.keys() & terms.keys()
    torch.testing.assert_close(terms[name].double(), exact[name], rtol=1e-5, atol=0)  # bfloat16 has 1e-2
