"""Greedy decoding and beam search, against the whole forward pass and against trying everything."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from models.transformer.decoding import beam_search, greedy, length_penalty
from models.transformer.model import Config, Transformer

START, END = 0, 1
FORBIDDEN = (START,)


def model_of(vocabulary: int, *, sharpness: float = 3.0, end: float = 0.0) -> Transformer:
    """Random weights whose logits differ: by more with ``sharpness``; ``end`` is added to the logit of ending."""
    config = Config(vocabulary, vocabulary, encoder_layers=1, decoder_layers=2, heads=2, width=16, hidden=24,
                    dropout=0.0, shared="none", final_norm=True)  # fmt: skip
    model = Transformer(config).double().eval()
    assert model.output is not None
    with torch.no_grad():
        model.output.mul_(sharpness)
        norm = model.body.decoder_norm
        norm.weight[0], norm.bias[0] = 0.0, 1.0  # type: ignore[index, operator]
        model.output[:, 0] = 0.0
        model.output[END, 0] = end
    return model


def log_probabilities(model: Transformer, source: Tensor, padding: Tensor, targets: list[list[int]]) -> list[float]:
    """Of each target, by one pass over the whole of it."""
    count = len(targets)
    target = torch.nn.utils.rnn.pad_sequence([torch.tensor([START, *t]) for t in targets], batch_first=True)
    with torch.no_grad():
        logits = model(source.expand(count, -1), target[:, :-1], padding.expand(count, -1))
    each = logits.log_softmax(-1).gather(2, target[:, 1:, None]).squeeze(2)
    return [float(row[: len(t)].sum()) for row, t in zip(each, targets)]


def sources(batch: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    padding = torch.arange(6) >= torch.randint(2, 7, (batch, 1))
    return torch.randint(vocabulary, (batch, 6)), padding


OPTIONS: dict[str, Any] = {"start": START, "end": END, "forbidden": FORBIDDEN}


def test_greedy_takes_the_likeliest_token_of_the_whole_forward_pass() -> None:
    cut = set()
    for end in (-20.0, 1.0, 4.0):
        model = model_of(9, end=end)
        source, padding = sources(4, 9)
        found = greedy(model, source, padding=padding, max_length=8, **OPTIONS)
        cut |= {len(tokens) == 8 for tokens in found}
        for tokens, one, pad in zip(found, source, padding):
            so_far = [START]
            for token in [*tokens, END][:8]:
                with torch.no_grad():
                    logits = model(one[None], torch.tensor([so_far]), pad[None])[0, -1]
                logits[START] = -math.inf
                assert int(logits.argmax()) == token
                so_far.append(token)
    assert cut == {True, False}


def test_one_beam_is_greedy() -> None:
    ended = set()
    for end in (-20.0, 1.0, 4.0):
        model = model_of(9, end=end)
        source, padding = sources(8, 9)
        found = beam_search(model, source, padding=padding, max_length=8, beams=1, **OPTIONS)
        assert [h.tokens for (h,) in found] == greedy(model, source, padding=padding, max_length=8, **OPTIONS)
        ended |= {h.ended for (h,) in found}
    assert ended == {True, False}


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
def test_beams_find_what_trying_everything_finds(alpha: float) -> None:
    model = model_of(5, end=1.0)
    source, padding = sources(3, 5)
    words, longest = [2, 3, 4], 4
    targets = [[*stem, END] for length in range(longest) for stem in itertools.product(words, repeat=length)] + [
        list(whole) for whole in itertools.product(words, repeat=longest)
    ]  # those that are cut
    found = beam_search(model, source, padding=padding, max_length=longest, beams=len(targets), alpha=alpha, **OPTIONS)
    for one, pad, hypotheses in zip(source, padding, found):
        scored = {
            tuple(target): log_p / ((5 + len(target)) / 6) ** alpha
            for target, log_p in zip(targets, log_probabilities(model, one, pad, targets))
        }
        expected = sorted(scored, key=lambda target: -scored[target])
        got = [tuple([*h.tokens, END] if h.ended else h.tokens) for h in hypotheses]
        assert len(got) == len(expected)
        for place in range(len(got)):  # of two lists as long as these pytest takes a minute to show the difference
            assert got[place] == expected[place]
        assert [h.score for h in hypotheses] == pytest.approx([scored[t] for t in expected], abs=1e-10)


def test_a_few_beams_find_better_than_greedy_and_never_better_than_everything() -> None:
    torch.manual_seed(0)  # with other weights a few beams may find no more
    model = model_of(5, end=0.5)
    source, _ = sources(15, 5)
    best, few, one = (
        [h[0].score for h in beam_search(model, source, max_length=4, beams=beams, **OPTIONS)] for beams in (121, 4, 1)
    )
    assert all(b >= f - 1e-12 for b, f in zip(best, few))
    assert sum(few) > sum(one)
    assert sum(f == pytest.approx(b) for f, b in zip(few, best)) > 10


def test_ended_beams_stay_as_they_are() -> None:
    """Each hypothesis has the score of its own tokens, though others went on, and moved the caches, after it ended."""
    lengths = set()
    for end in (-3.0, 0.0, 2.0, 4.0):
        model = model_of(7, end=end)
        source, padding = sources(4, 7)
        found = beam_search(model, source, padding=padding, max_length=10, beams=5, **OPTIONS)
        for one, pad, hypotheses in zip(source, padding, found):
            assert len(hypotheses) == 5
            assert len({tuple(h.tokens) for h in hypotheses}) == 5
            assert sorted(hypotheses, key=lambda h: -h.score) == hypotheses
            targets = [[*h.tokens, END] if h.ended else h.tokens for h in hypotheses]
            for h, tokens, log_p in zip(hypotheses, targets, log_probabilities(model, one, pad, targets)):
                assert h.ended or len(tokens) == 10
                assert START not in tokens
                assert END not in h.tokens
                lengths.add(len(tokens))
                assert h.score == pytest.approx(log_p / ((5 + len(tokens)) / 6) ** 0.6, abs=1e-10)
    assert len(lengths) > 3


def test_sources_side_by_side_are_as_each_alone() -> None:
    model = model_of(9, end=0.7)
    source, padding = sources(5, 9)
    together = beam_search(model, source, padding=padding, max_length=7, beams=3, **OPTIONS)
    for one, pad, hypotheses in zip(source, padding, together):
        (alone,) = beam_search(model, one[None, ~pad], max_length=7, beams=3, **OPTIONS)
        assert [h.tokens for h in alone] == [h.tokens for h in hypotheses]
        assert [h.score for h in alone] == pytest.approx([h.score for h in hypotheses], abs=1e-10)


def test_the_length_penalty_is_the_papers() -> None:
    lengths = torch.tensor([1.0, 7.0, 13.0], dtype=torch.float64)
    torch.testing.assert_close(length_penalty(lengths, 0.6), torch.tensor([1, 2**0.6, 3**0.6], dtype=torch.float64))
    torch.manual_seed(0)
    model = model_of(9, sharpness=2.0)
    source, _ = sources(8, 9)
    short, long = (
        sum(len(h[0].tokens) for h in beam_search(model, source, max_length=12, beams=8, alpha=alpha, **OPTIONS))
        for alpha in (0.0, 2.0)
    )
    assert short < long


def test_no_sources_have_no_targets() -> None:
    model = model_of(9)
    none = torch.zeros(0, 6, dtype=torch.int64)
    assert greedy(model, none, max_length=4, **OPTIONS) == []
    assert beam_search(model, none, max_length=4, **OPTIONS) == []


@pytest.mark.parametrize("search", [greedy, beam_search])
def test_bad_arguments_are_refused(search: Any) -> None:
    model, source = model_of(9), torch.zeros(1, 4, dtype=torch.int64)
    good = {"max_length": 4, **OPTIONS}
    for change, why in (
        ({"start": 9}, "start must be from 0 to 8, got 9"),
        ({"end": -1}, "end must be from 0 to 8, got -1"),
        ({"forbidden": (0, 9)}, "forbidden must be from 0 to 8, got 9"),
        ({"forbidden": (END,)}, "forbidden must not have the token that ends a target, 1"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=f"^{why}$"):
            search(model, source, **{**good, **change})
    with pytest.raises(ValueError, match="model must be in evaluation mode"):
        search(model.train(), source, **good)


def test_bad_beams_are_refused() -> None:
    model, source = model_of(9), torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="beams must be at least 1, got 0"):
        beam_search(model, source, max_length=4, beams=0, **OPTIONS)
    for alpha in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match="alpha must be 0 or more, got"):
            beam_search(model, source, max_length=4, alpha=alpha, **OPTIONS)


@pytest.mark.parametrize("search", [greedy, beam_search])
def test_a_model_that_has_diverged_decodes_nothing(search: Any) -> None:
    model = model_of(9)
    with torch.no_grad():
        model.target_embedding[START] = math.nan
    with pytest.raises(ValueError, match="the model's logits are not finite"):
        search(model, torch.ones(1, 4, dtype=torch.int64), max_length=4, **OPTIONS)
