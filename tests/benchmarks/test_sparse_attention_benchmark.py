"""The benchmark of sparse_attention, at sizes for a test: what its rows compute, count and are checked against."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from benchmarks.cases import Case, Contestant
from benchmarks.ceilings import Ceiling
from benchmarks.ops import sparse_attention
from benchmarks.ops.sparse_attention import decode, grid
from benchmarks.ops.sparse_attention.attention import block_mask, in_chunks, masked
from benchmarks.ops.sparse_attention.decode import Step
from benchmarks.ops.sparse_attention.patterns import Pattern, causal, fixed, local, strided
from benchmarks.ops.sparse_attention.problem import (
    BACKWARD,
    FLEX,
    FORWARD,
    OURS,
    SDPA,
    TRAINING,
    Mode,
    Problem,
    Size,
    sampled,
)
from benchmarks.results import Bar, Result, Row
from benchmarks.runner import run
from benchmarks.tables import bars_table, result_table
from benchmarks.timing import Plan
from gdl_kernels import layouts

CPU = torch.device("cpu")
PLAN = Plan(seconds=0, min_rounds=3, max_rounds=3)
FOURTH = sparse_attention.local_and_every_fourth_block(100, 64)
PATTERNS = [causal(), local(100), fixed(32, 8), strided(32), FOURTH]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_attention, "SIZE", Size(1, 2, 512, 16))
    monkeypatch.setattr(sparse_attention, "WINDOW", 128)
    monkeypatch.setattr(decode, "ROTATED_BYTES", 1e6)


def _low(dtype: torch.dtype, device: torch.device) -> Ceiling:
    return Ceiling("add", lambda: torch.ones(8) + 1, 8.0)


def _run(case: Case) -> Result:
    """Without FlexAttention, which takes half a minute to compile.

    The seed is fixed: the largest error of as few values as here is by chance beyond its bound now and then, and the
    kernels' accuracy has tests of its own.
    """
    generator = torch.Generator().manual_seed(0)
    contestants = [contestant for contestant in case.contestants if contestant.name != FLEX]
    inputs = case.inputs
    case = dataclasses.replace(case, contestants=contestants, inputs=lambda _: inputs(generator))
    return run("sparse_attention", case, PLAN)


def _quickly(case: Case, *contestants: Contestant) -> Case:
    return dataclasses.replace(case, ceiling=_low, contestants=contestants or case.contestants)


def _timed(result: Result) -> None:
    for row in result.rows:
        served_by_reference = row.backend == "reference"
        assert row.status == ("unavailable" if served_by_reference else "timed"), (row.contestant, row.reason)


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.name)
def test_formula_layout_and_flex_mask_are_one_pattern(pattern: Pattern) -> None:
    n, block_size = 512, 64
    kept, layout = pattern.positions(n, CPU), pattern.layout(n, block_size)
    assert torch.equal(layout.to_mask(), kept)
    assert torch.equal(pattern.kept_keys(n, CPU), kept[-1].nonzero().squeeze(1))
    ours = block_mask(pattern.keep, layout)
    theirs = create_block_mask(
        lambda b, h, i, j: pattern.keep(i, j), None, None, n, n, device="cpu", BLOCK_SIZE=block_size
    )
    for name in ("kv", "full_kv", "q", "full_q"):
        counts = getattr(theirs, f"{name}_num_blocks")[0, 0]
        assert torch.equal(getattr(ours, f"{name}_num_blocks")[0, 0], counts), name
        for line, count in enumerate(counts.tolist()):
            mine, right = (getattr(mask, f"{name}_indices")[0, 0, line, :count] for mask in (ours, theirs))
            assert torch.equal(mine, right), (name, line)


def test_a_layout_that_flex_does_not_walk_in_natural_order_is_refused() -> None:
    with pytest.raises(ValueError, match="layout must be in natural order and the same for all heads, got Layout"):
        block_mask(causal().keep, layouts.strided(512, 32))


def test_in_chunks_is_masked() -> None:
    query, key, value = (torch.randn(2, 4, 300, 8).double() for _ in range(3))
    pattern = fixed(32, 8)
    whole = masked(pattern.positions(300, CPU))(query, key, value)
    torch.testing.assert_close(in_chunks(pattern.keep)(query, key, value), whole)
    rows = torch.tensor([5, 130, 299])
    torch.testing.assert_close(in_chunks(pattern.keep, rows)(query[:, :, rows], key, value), whole[:, :, rows])
    key, value = key[:, :2], value[:, :2]
    shared = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(in_chunks(causal().keep)(query, key, value), shared)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", [FORWARD, TRAINING, BACKWARD], ids=lambda mode: mode.name)
def test_passes_end_to_end(dtype: torch.dtype, mode: Mode) -> None:
    case = _quickly(sparse_attention.case(CPU, dtype, 64, mode, quick=False).build())
    result = _run(case)
    _timed(result)
    assert {row.contestant for row in result.rows if row.yardstick} == {SDPA}
    claims = sparse_attention.bars([result])
    assert len(claims) == (2 if mode is FORWARD else 1)
    assert all(result.case in bar.claim for bar in claims)
    assert result_table(result).row_count == len(result.rows) + 1
    assert bars_table(claims).row_count == len(claims)


@pytest.mark.parametrize("mode", [FORWARD, TRAINING], ids=lambda mode: mode.name)
def test_dense_causal_is_measured_against_a_rival_and_no_yardstick(mode: Mode) -> None:
    result = _run(_quickly(sparse_attention.dense_case(CPU, torch.float32, mode, 16, quick=True).build()))
    _timed(result)
    assert not any(row.yardstick for row in result.rows)
    (bar,) = sparse_attention.bars([result])
    assert bar.asked == 1.0
    assert bar.measured == result.speed_up(result.row(SDPA))


@pytest.mark.parametrize("mode", [FORWARD, BACKWARD], ids=lambda mode: mode.name)
def test_a_wrong_sparse_attention_has_no_time(mode: Mode) -> None:
    """Dense causal attention, passed off as the sparse one."""
    case = sparse_attention.case(CPU, torch.bfloat16, 64, mode, quick=True).build()
    impostor = mode.contestant("impostor", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    (row,) = _run(_quickly(case, impostor)).rows
    assert (row.status, row.samples_ms) == ("wrong", [])


def test_operations_are_counted_over_kept_blocks() -> None:
    case = sparse_attention.case(CPU, torch.float32, 64, FORWARD, quick=True).build()
    # Of its 8 block rows, row r keeps the three blocks that the last 128 keys lie in, and of the earlier every fourth.
    kept = sum(len({c for c in range(r + 1) if r - c <= 2 or (r - c) % 4 == 0}) for r in range(8))
    assert case.task.flops == 4 * 64**2 * 16 * kept * 2
    backward = sparse_attention.case(CPU, torch.float32, 64, BACKWARD, quick=True).build()
    assert backward.task.flops == 2.5 * case.task.flops
    training = sparse_attention.case(CPU, torch.float32, 64, TRAINING, quick=False).build()
    assert training.task.flops == 3.5 * case.task.flops


def test_memory_is_fitted_over_the_growth_cases() -> None:
    results = []
    for positions in (512, 1024, 2048):
        case = sparse_attention.growth_case(CPU, positions).build()
        row = Row(OURS, case.task.flops, 0.0, ours=True, peak_bytes=positions * 100)
        results.append(Result("sparse_attention", case.name, case.shape, "float32", case.growth, 0, row, [row]))
    (bar,) = sparse_attention.bars(results)
    assert bar.measured == pytest.approx(1.0)
    assert bar.met


@pytest.mark.parametrize(("positions", "count"), [(65_536, 256), (1000, 7), (40, 40)])
def test_one_row_is_drawn_from_each_stretch(positions: int, count: int) -> None:
    edges = [positions * stretch // count for stretch in range(count + 1)]
    rows = sampled(positions, count).tolist()
    assert len(rows) == count
    assert all(low <= row < high for row, low, high in zip(rows, edges, edges[1:]))


def test_rows_are_drawn_anew_every_time() -> None:
    assert len({tuple(sampled(65_536, 256).tolist()) for _ in range(3)}) == 3


def test_sampled_rows_see_a_wrong_region() -> None:
    problem = Problem(local(100), Size(2, 2, 512, 16), torch.float32, 64, CPU, checked_rows=16)

    def almost(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = in_chunks(local(100).keep)(query, key, value)
        out[1, :, 128:192] = 0  # a block row of one sample
        return out

    contestants = [Contestant("wrong", almost), Contestant("right", in_chunks(local(100).keep)), problem.ours()]
    case = problem.case("grid", lambda: contestants).build()
    assert "16 rows checked" in case.shape
    result = _run(_quickly(case))
    assert [row.status for row in result.rows[:2]] == ["wrong", "timed"]
    _timed(dataclasses.replace(result, rows=result.rows[2:]))


def _grid_result(name: str, dtype: str, flex_ms: float | None, ours_ms: float | None) -> Result:
    rows = [
        Row(FLEX, 100.0, 0.0, status="unavailable" if flex_ms is None else "timed"),
        Row(OURS, 100.0, 0.0, ours=True, status="wrong" if ours_ms is None else "timed"),
    ]
    for row, time in zip(rows, (flex_ms, ours_ms)):
        row.samples_ms = [] if time is None else [time]
    ceiling = Row("ceiling", 100.0, 0.0, samples_ms=[1.0])
    return Result("sparse_attention", f"grid, {name}", "", dtype, None, 0, ceiling, rows)


def _the_bar(bars: list[Bar], *parts: str) -> Bar:
    (bar,) = (bar for bar in bars if all(part in bar.claim for part in parts))
    return bar


def test_the_grid_is_judged_by_its_mean_and_by_its_least_row() -> None:
    results = [
        _grid_result("a, fp32, blocks of 128", "float32", 16.0, 2.0),
        _grid_result("b, fp32, blocks of 64", "float32", 8.0, 4.0),
        _grid_result("c, fp32, blocks of 64", "float32", None, 1.25),
        _grid_result("d, bf16, blocks of 32", "bfloat16", 9.0, 3.0),
    ]
    bars = grid.bars(results)
    mean = _the_bar(bars, "fp32", "mean of 2 rows")
    assert mean.measured == pytest.approx(4.0)
    assert mean.met
    assert _the_bar(bars, "every row", "b, fp32", "over").measured == 2.0
    assert _the_bar(bars, "bf16", "mean of 1 rows").met is False
    assert grid.bars([]) == []


def test_a_row_of_the_grid_in_which_ours_has_no_time_leaves_its_bars_unmeasured() -> None:
    results = [
        _grid_result("a, fp32, blocks of 128", "float32", 16.0, 2.0),
        _grid_result("b, fp32, blocks of 128", "float32", 8.0, None),
    ]
    assert [bar.measured for bar in grid.bars(results)] == [None] * 6


def test_a_row_of_the_grid_end_to_end() -> None:
    case = grid.case(fixed(32, 8), Size(2, 2, 256, 16), torch.float32, 32, CPU).build()
    assert [contestant.name for contestant in case.contestants] == [FLEX, OURS]
    _timed(_run(_quickly(case)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("pattern", "kept"), [(causal(), 512), (local(100), 100), (fixed(32, 8), 15 * 8 + 32)])
@pytest.mark.parametrize("step", [Step(1, 2, 2, 16), Step(2, 4, 2, 16)], ids=str)
def test_decoding_end_to_end(dtype: torch.dtype, pattern: Pattern, kept: int, step: Step) -> None:
    case = decode.case(pattern, 32, step, 512, dtype, CPU).build()
    read = 2 * step.batch * step.kv_heads * kept * 16 * dtype.itemsize
    assert case.task.bytes == read
    assert case.input_sets * read >= decode.ROTATED_BYTES
    result = _run(case)
    _timed(result)
    assert result.ceiling.bytes == pytest.approx(read, abs=2048)
    (bar,) = decode.bars([result])
    share = result.share_of_ceiling(result.ours)
    assert bar.measured == (None if share is None else 1 / share)
    assert bar.at_most


def test_a_step_that_attends_to_other_keys_has_no_time() -> None:
    case = decode.case(local(100), 32, Step(1, 2, 2, 16), 512, torch.float32, CPU).build()
    impostor = Contestant("impostor", F.scaled_dot_product_attention)
    (row,) = _run(_quickly(case, impostor)).rows
    assert row.status == "wrong"


@pytest.mark.parametrize(("power", "met"), [(0.0, True), (0.5, False)])
def test_time_of_a_token_is_fitted_over_the_cached_keys(power: float, met: bool) -> None:
    results = []
    for cached in (4096, 16_384, 65_536):
        row = Row(OURS, 0.0, 1.0, ours=True, samples_ms=[cached**power])
        growth = decode.LOCAL_GROWTH, cached
        results.append(Result("sparse_attention", "growth", "", "float32", growth, 0, row, [row]))
    (bar,) = decode.bars(results)
    assert bar.measured == pytest.approx(power, abs=1e-9)
    assert bar.met == met


def test_growth_of_fixed_is_over_the_keys_that_it_keeps() -> None:
    assert [case.build().growth for case in decode.growth_cases(CPU, quick=True)] == [
        (decode.LOCAL_GROWTH, 4096),
        (decode.LOCAL_GROWTH, 16_384),
        (decode.FIXED_GROWTH, 31 * 32 + 128),
        (decode.FIXED_GROWTH, 127 * 32 + 128),
    ]
