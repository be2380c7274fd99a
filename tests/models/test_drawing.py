"""Drawing tokens by their logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.drawing import SEEDS, Drawing, streams


def expected(logits: Tensor, drawing: Drawing) -> Tensor:
    """Probabilities as the definition has them, one token after the other."""
    ranked = sorted(range(len(logits)), key=lambda token: -float(logits[token]))[: drawing.top_k]
    weights = (logits[ranked].double() / drawing.temperature).softmax(0)
    kept, mass = [], 0.0
    for token, weight in zip(ranked, weights.tolist()):
        kept.append((token, weight))
        mass += weight
        if mass >= drawing.top_p:
            break
    found = torch.zeros(len(logits), dtype=torch.float64)
    for token, weight in kept:
        found[token] = weight / mass
    return found


@pytest.mark.parametrize(
    "drawing",
    [
        Drawing(),
        Drawing(temperature=0.5, top_k=3),
        Drawing(temperature=2.0, top_k=2),
        Drawing(top_p=0.7),
        Drawing(temperature=1.5, top_k=4, top_p=0.8),
        Drawing(top_p=1e-9),  # the likeliest, which has more than that by itself
    ],
    ids=str,
)
def test_tokens_come_as_often_as_defined(drawing: Drawing) -> None:
    """Each row by its own logits, 4000 times over."""
    logits = torch.tensor([[0.3, 2.0, -1.0, 1.2, 0.7], [1.0, -2.0, 1.1, 0.2, -0.1]])
    draws = 4000
    tokens = drawing.draw(logits.repeat(draws, 1), streams(0, 2 * draws)).view(draws, 2)
    for row in range(2):
        shares = tokens[:, row].bincount(minlength=5).double() / draws
        wanted = expected(logits[row], drawing)
        torch.testing.assert_close(shares, wanted, rtol=0, atol=0.032)  # four standard deviations of a share
        assert torch.equal(shares > 0, wanted > 0)


def test_a_row_draws_the_same_whatever_the_others_are() -> None:
    logits = torch.randn(6, 50)
    for drawing in (Drawing(), Drawing(top_k=9), Drawing(top_p=0.6)):
        together = drawing.draw(logits, streams(3, 6))
        alone = [drawing.draw(logits[i : i + 1], streams(3 + i, 1)) for i in range(6)]
        assert torch.equal(together, torch.cat(alone))


def test_a_stream_goes_on() -> None:
    logits = torch.zeros(1, 1000)
    (generator,) = streams(SEEDS - 1, 1)
    drawn = [int(Drawing().draw(logits, [generator])) for _ in range(20)]
    assert len(set(drawn)) > 10
    again = streams(SEEDS - 2, 2)[1]
    assert drawn == [int(Drawing().draw(logits, [again])) for _ in range(20)]


@pytest.mark.parametrize("temperature", [0.0, 1e-5, 1e-38, 1e-320])
def test_the_lowest_temperatures_draw_the_likeliest(temperature: float) -> None:
    logits = torch.tensor([[30.0, -50.0, 90.0, 89.9]]).repeat(20, 1)
    for top_k in (None, 4):
        assert set(Drawing(temperature, top_k).draw(logits, streams(0, 20)).tolist()) == {2}


def test_half_precision_draws_as_its_values_do() -> None:
    logits = torch.stack([torch.randperm(250) / 64 for _ in range(40)]).bfloat16()  # exact, and no two alike
    drawing = Drawing(top_k=20, top_p=0.9)
    assert torch.equal(drawing.draw(logits, streams(0, 40)), drawing.draw(logits.double(), streams(0, 40)))


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(temperature: float, wrong: float) -> None:
    logits = torch.zeros(2, 5)
    logits[1, 3] = wrong
    with pytest.raises(ValueError, match="logits are not finite"):
        Drawing(temperature).draw(logits, streams(0, 2))


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"temperature": -0.1}, "temperature must be 0 or more, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be 0 or more, got nan"),
        ({"temperature": float("inf")}, "temperature must be 0 or more, got inf"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.01}, "top_p must be above 0 and at most 1, got 1.01"),
        ({"top_p": float("nan")}, "top_p must be above 0 and at most 1, got nan"),
    ],
)
def test_what_is_out_of_range_is_refused(arguments: dict[str, float], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Drawing(**arguments)  # type: ignore[arg-type]


def test_more_than_there_is_can_not_be_drawn_from() -> None:
    with pytest.raises(ValueError, match="top_k must be from 1 to 5, got 6"):
        Drawing(top_k=6).draw(torch.zeros(1, 5), streams(0, 1))
    with pytest.raises(ValueError, match="generators must be one for each of the 2 rows, got 1"):
        Drawing().draw(torch.zeros(2, 5), streams(0, 1))
