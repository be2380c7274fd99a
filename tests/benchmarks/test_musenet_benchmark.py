"""MuseNet's benchmark: its plain PyTorch computes what the model does, and its cases are right at a small size."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.models.musenet import bars, decoding, plain, training
from benchmarks.results import Result, Row
from benchmarks.runner import run
from benchmarks.timing import Plan
from gdl_kernels import _native
from models.musenet.model import Config, MuseNet
from models.musenet.model import bits_per_token as loss

CPU = torch.device("cpu")
PLAN = Plan(seconds=0, min_rounds=3, max_rounds=3)
TINY = Config(1122, context=192, layers=2, heads=4, width=32, stride=32, summary=16)


@pytest.fixture
def model() -> MuseNet:
    return MuseNet(TINY).double().eval()


def tokens(count: int) -> torch.Tensor:
    return torch.randint(TINY.vocabulary, (1, count))


def test_the_kept_keys_are_the_layouts(model: MuseNet) -> None:
    mask = model.attention[0].layout.dense_mask()
    for last in (0, 31, 32, 77, 191):
        begin = last // 32 * 32
        kept = plain.kept_keys(4, begin, last + 1, 32, 16)
        assert [sorted(set(row.tolist())) for row in kept] == [row[last].nonzero()[:, 0].tolist() for row in mask]


@pytest.mark.parametrize("count", [192, 75])  # the second ends within a run
def test_run_by_run_is_the_model(model: MuseNet, count: int) -> None:
    music, attention = tokens(count), plain.run_by_run(32, 16)
    with torch.no_grad():
        whole = model(music)[:, -1]
        torch.testing.assert_close(plain.last_logits(model, music, attention), whole)
        mask = model.attention[0].layout.dense_mask()[:, :count, :count]
        torch.testing.assert_close(plain.last_logits(model, music, plain.masked(mask)), whole)
    ours, theirs = loss(model, music), plain.bits_per_token(model, music, attention)
    torch.testing.assert_close(theirs, ours)
    parameters = list(model.parameters())
    for found, wanted in zip(torch.autograd.grad(theirs, parameters), torch.autograd.grad(ours, parameters)):
        torch.testing.assert_close(found, wanted)


@torch.no_grad()
def test_the_dense_cache_is_dense_attention(model: MuseNet) -> None:
    music, cache = tokens(50), plain.DenseCache(model, 64)
    cache.next_logits(model, music[:, :40])
    for place in range(40, 50):
        logits = cache.next_logits(model, music[:, place : place + 1])
        torch.testing.assert_close(logits, plain.last_logits(model, music[:, : place + 1], plain.dense))


@pytest.mark.skipif(bool(_native.missing("cpu")), reason="ours would not be timed")
def test_cases_are_right_at_a_small_size() -> None:
    results = [run("musenet", decoding.case(lambda: MuseNet(TINY).eval(), 150), PLAN)]
    results.append(run("musenet", training.case(dataclasses.replace(TINY, context=96), CPU), PLAN))
    for result in results:
        assert len(result.rows) == 4
        assert all(row.status == "timed" for row in result.rows), [(r.contestant, r.reason) for r in result.rows]
        assert result.ours is not None
        assert result.ours.backend == "cpu"
    claims = [bar.claim.partition(" positions: ")[2] for bar in bars(results)]
    assert claims == [
        "over recomputed, eager", "over recomputed, SDPA", "over eager, masked", "memory of eager, masked over ours"
    ]  # fmt: skip


def test_scores_that_no_memory_holds_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sysconf", lambda name: 1000)  # a megabyte in all
    eager, sdpa, runs, _ = training.case(dataclasses.replace(TINY, context=384), CPU).contestants
    for masked in (eager, sdpa):
        with pytest.raises(MemoryError, match=r"needs 0\.0 GB for the scores of a layer, 0\.0 GB a head; there are 0"):
            masked.function(tokens(385))
    assert runs.function(tokens(385))[0] > 0


def test_tokens_a_second_at_both_ends_are_told() -> None:
    def result(positions: int, ours: float, dense: float) -> Result:
        rows = [
            Row(decoding.DENSE, 1, 1, yardstick=True, samples_ms=[dense] * 3),
            Row(decoding.OURS, 1, 1, ours=True, samples_ms=[ours] * 3),
        ]
        growth = ("decoding, summary 32, fp32 over positions", positions)
        name = f"decoding, summary 32, fp32, {positions} positions"
        return Result("musenet", name, "", "float32", growth, 0, Row("read", 0, 1), rows)

    found = {bar.claim: bar.measured for bar in bars([result(1024, 2.0, 3.0), result(16_384, 2.5, 10.0)])}
    assert found == {
        "decoding, summary 32, fp32, 1024 positions: over dense, cached": 1.5,
        "decoding, summary 32, fp32, 16384 positions: over dense, cached": 4.0,
        "decoding, summary 32, fp32: tokens a second at 16,384 positions, of those at 1,024": 0.8,
    }


def test_a_model_is_chosen_by_name() -> None:
    wrong = CliRunner().invoke(app, ["--model", "abacus"])
    assert wrong.exit_code == 2
    assert "progan, sagan, stylegan, transformer, got 'abacus'" in " ".join(wrong.output.replace("│", " ").split())
