"""Benchmarks of image ops, at sizes for a test: what their cases compute, count and are checked against."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

import gdl_kernels
from benchmarks import images
from benchmarks.cases import Case, Contestant
from benchmarks.ceilings import memory_copy
from benchmarks.images import (
    BACKWARD,
    COMPILED,
    EAGER,
    FORWARD,
    OURS,
    TRAINING,
    ImageOp,
    case,
    copies,
    grown,
    is_of,
    over,
)
from benchmarks.ops import minibatch_stddev, pixel_norm
from benchmarks.passes import Passes
from benchmarks.results import Result, Row
from benchmarks.runner import run
from benchmarks.timing import Plan

CPU = torch.device("cpu")
PLAN = Plan(seconds=0, min_rounds=3, max_rounds=3)
SHAPE = (4, 6, 5, 3)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "ROTATED_BYTES", 1e4)


def _run(case: Case, *contestants: Contestant) -> Result:
    """Without torch.compile, which takes seconds; a fixed seed, for a bound on the largest of few errors is chance."""
    generator = torch.Generator().manual_seed(0)
    chosen = contestants or [contestant for contestant in case.contestants if contestant.name != COMPILED]
    inputs = case.inputs
    return run("image", dataclasses.replace(case, contestants=chosen, inputs=lambda _: inputs(generator)), PLAN)


@pytest.mark.parametrize(("dtype", "channels_last"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
@pytest.mark.parametrize("passes", [FORWARD, BACKWARD, TRAINING], ids=lambda passes: passes.name)
@pytest.mark.parametrize("op", [pixel_norm.OP, minibatch_stddev.OP], ids=lambda op: op.name)
def test_a_case_end_to_end(op: ImageOp, passes: Passes, dtype: torch.dtype, channels_last: bool) -> None:
    built = case(op, [SHAPE], dtype, CPU, passes, channels_last=channels_last)
    inputs = built.inputs(torch.Generator())
    assert inputs[0].is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    names = [contestant.name for contestant in built.contestants]
    assert names == ([EAGER, COMPILED, OURS] if passes.forward else [EAGER, OURS])
    result = _run(built)
    for row in result.rows:
        assert row.status == ("unavailable" if row.backend == "reference" else "timed"), (row.contestant, row.reason)
    assert result.ours is not None
    assert images.is_of(result, passes)
    assert images.pixels(result) == 15
    assert result.ceiling.bytes == 2 * inputs[0].nbytes


def test_several_inputs_are_counted_and_differentiated() -> None:
    op = ImageOp("scale", torch.mul, torch.mul, (1, 3), explain=lambda x, scale: gdl_kernels.explain("pixel_norm", x))
    shapes = [(2, 3, 4), (1, 3, 1)]
    for passes, elements, operations in (
        (FORWARD, 24 + 3 + 24, 1), (BACKWARD, 2 * (24 + 3) + 24, 3), (TRAINING, 3 * 27 + 2 * 24, 1 + 3)
    ):  # fmt: skip
        built = case(op, shapes, torch.float32, CPU, passes)
        assert (built.task.flops, built.task.bytes) == (24 * operations, 4 * elements)
        result = _run(built)
        assert {row.status for row in result.rows} <= {"timed", "unavailable"}
    gradients = built.task.truth(*(t.double() for t in built.inputs(torch.Generator())))
    assert [tuple(g.shape) for g in gradients] == [(2, 3, 4), *shapes]


def test_an_output_with_more_channels() -> None:
    op = ImageOp("twice", lambda x: torch.cat([x, x], 1), lambda x: torch.cat([x, x], 1), (0, 1), added_channels=3)
    built = case(op, [(2, 3, 4)], torch.float32, CPU, TRAINING)
    assert built.inputs(torch.Generator())[1].shape == (2, 6, 4)
    assert built.task.bytes == 4 * (24 + 48 + 24 + 48 + 24)


@pytest.mark.parametrize("passes", [FORWARD, BACKWARD], ids=lambda passes: passes.name)
def test_a_wrong_op_has_no_time(passes: Passes) -> None:
    wrong = functools.partial(gdl_kernels.pixel_norm, eps=0.1)
    (row,) = _run(case(pixel_norm.OP, [SHAPE], torch.float32, CPU, passes), passes.contestant("wrong", wrong)).rows
    assert (row.status, row.samples_ms) == ("wrong", [])


def test_memory_copy_goes_through_all_its_stretches() -> None:
    ceiling = memory_copy(1000, 5)(torch.bfloat16, CPU)
    assert (ceiling.name, ceiling.bytes) == ("copy of 0.001 MB", 2000)
    targets = [ceiling.call() for _ in range(5)]
    assert len({t.data_ptr() for t in targets}) == 5
    assert {t.nbytes for t in targets} == {1000}


def _result(passes: Passes, width: int, ours_ms: float, rival_ms: float) -> Result:
    rows = [Row(rival, 0.0, 200.0, samples_ms=[rival_ms]) for rival in (EAGER, COMPILED)]
    rows.append(Row(OURS, 0.0, 200.0, ours=True, samples_ms=[ours_ms]))
    ceiling = Row("copy", 0.0, 200.0, samples_ms=[1.0])
    return Result("image", f"{passes.name}, 8×16×{width}×{width}, fp32", "", "float32", None, 0, ceiling, rows)


def test_bars() -> None:
    result = _result(FORWARD, 64, 2.0, 8.0)
    assert over(result, COMPILED, 3.0).measured == 4.0
    assert copies(result, 2.5).measured == pytest.approx(2.0)
    assert copies(result, 2.5).met
    assert not copies(_result(FORWARD, 64, 3.0, 8.0), 2.5).met


def test_what_is_asked_of_pixel_norm() -> None:
    bars = pixel_norm.bars([_result(passes, 64, 2.0, 8.0) for passes in (FORWARD, BACKWARD, TRAINING)])
    assert [(bar.asked, bar.met) for bar in bars] == [(3.0, True), (2.5, True), (5.0, False)]
    assert pixel_norm.bars([_result(FORWARD, 32, 2.0, 8.0)]) == []
    (unmeasured, *_) = pixel_norm.bars([dataclasses.replace(_result(FORWARD, 64, 2.0, 8.0), rows=[])])
    assert unmeasured.measured is None


def test_a_point_of_a_curve_is_ours_and_eager_and_no_bar_of_it_is_asked() -> None:
    points = [grown(case(pixel_norm.OP, [(n, *SHAPE[1:])], torch.float32, CPU, FORWARD), "batch", n) for n in (1, 4)]
    results = [_run(point) for point in points]
    assert [[row.contestant for row in result.rows] for result in results] == [[EAGER, OURS]] * 2
    assert [result.growth for result in results] == [("forward over batch", 1), ("forward over batch", 4)]
    assert not any(is_of(result, passes) for result in results for passes in (FORWARD, BACKWARD, TRAINING))
