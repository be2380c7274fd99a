"""The benchmark of positional_embedding, at sizes for a test: what its cases compute and count."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.images import BACKWARD, COMPILED, EAGER, FORWARD, OURS, TRAINING
from benchmarks.ops import positional_embedding as benchmark
from benchmarks.passes import Passes
from benchmarks.runner import run
from benchmarks.timing import Plan

CPU = torch.device("cpu")
SMALL = benchmark.Size("small", 2, 9, 5, 6)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "ROTATED_BYTES", 1e3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("passes", [FORWARD, BACKWARD, TRAINING], ids=lambda passes: passes.name)
def test_a_case_end_to_end(passes: Passes, dtype: torch.dtype) -> None:
    case = benchmark.case(SMALL, dtype, CPU, passes)
    names = [contestant.name for contestant in case.contestants]
    assert names == ([EAGER, benchmark.COMPUTED, COMPILED, OURS] if passes.forward else [EAGER, OURS])
    # Without torch.compile, which takes seconds.
    chosen = [contestant for contestant in case.contestants if contestant.name != COMPILED]
    result = run("positional_embedding", dataclasses.replace(case, contestants=chosen), Plan(0, 3, 3))
    for row in result.rows:
        assert row.status == ("unavailable" if row.backend == "reference" else "timed"), (row.contestant, row.reason)
    asked = benchmark.bars([result])
    assert [bar.at_most for bar in asked] == ([False, True] if passes == FORWARD else [False])


@pytest.mark.parametrize(("passes", "rows_moved"), [(FORWARD, 2 * 18), (BACKWARD, 18 + 5), (TRAINING, 3 * 18 + 5)])
def test_traffic(passes: Passes, rows_moved: int) -> None:
    """Rows of 6 numbers for each of 18 tokens and of 5 rows of the table, and the tokens, 8 bytes each."""
    walks = passes.forward + passes.backward
    assert benchmark.case(SMALL, torch.float32, CPU, passes).task.bytes == rows_moved * 6 * 4 + walks * 18 * 8
