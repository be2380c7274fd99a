"""The cases of all ops and models: their names cost nothing, and their curves are over one thing."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import benchmarks.models
import benchmarks.ops
from benchmarks.__main__ import names
from benchmarks.cases import Benchmark, Candidate, Case

CPU = torch.device("cpu")
OPS, MODELS = ([f"{of.__name__}.{name}" for name in names(of)] for of in (benchmarks.ops, benchmarks.models))


class Untouched(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} ran")


def _cases(module: str, quick: bool) -> Iterator[Candidate]:
    benchmark: Benchmark = importlib.import_module(module)  # type: ignore[assignment]
    return benchmark.cases(CPU, quick)


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("module", [*OPS, *MODELS])
def test_names_are_unique_and_known_before_there_is_any_tensor(module: str, quick: bool) -> None:
    cases = _cases(module, quick)
    with Untouched():
        found = [candidate.name for candidate in cases]
    assert len(set(found)) == len(found) > 0


@pytest.mark.parametrize("module", OPS)  # of models their own tests look
def test_a_case_is_built_under_its_name_and_has_a_place_on_the_roofline(module: str) -> None:
    for candidate in _cases(module, quick=True):
        case = candidate.build()
        assert case.name == candidate.name
        assert case.task.flops > 0
        assert case.task.bytes > 0


def _curves(module: str, quick: bool) -> dict[tuple[str, torch.dtype], list[Case]]:
    """By name and dtype, as on the page. Of what has to be built, those that are called growth."""
    curves: dict[tuple[str, torch.dtype], list[Case]] = {}
    for candidate in _cases(module, quick):
        if isinstance(candidate, Case) or candidate.name.startswith("growth"):
            case = candidate.build()
            if case.growth:
                curves.setdefault((case.growth[0], case.dtype), []).append(case)
    return curves


@pytest.mark.parametrize("quick", [True, False])
def test_a_curve_is_over_one_thing_and_all_else_is_fixed(quick: bool) -> None:
    there_are = {"adain": 2, "minibatch_self_attention": 2, "sparse_attention": 3}
    for module in OPS:
        name, curves = module.rpartition(".")[2], _curves(module, quick)
        assert len(curves) == there_are.get(name, 0)
        for (curve, _), points in curves.items():
            sizes = [point.growth[1] for point in points if point.growth]
            assert len(set(sizes)) == len(points) >= 2, f"{name}: {curve}"
            # The names of its points differ in one number, which may be there twice, as the side of a square is.
            texts, numbers = zip(*((re.split(r"\d+", point.name), re.findall(r"\d+", point.name)) for point in points))
            assert all(text == texts[0] for text in texts)
            varying = {values for values in zip(*numbers) if len(set(values)) > 1}
            assert len(varying) == 1, f"{name}: {curve}: {[point.name for point in points]}"
            assert " over " in curve
