"""The steps of ``make gpu``, as far as a machine without a GPU can tell."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.gpu import PUBLISHED, steps
from models.__main__ import application


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run the whole model here")
@pytest.mark.parametrize("model", PUBLISHED)
def test_each_comparison_is_a_command_that_lacks_nothing_but_a_gpu(model: str, tmp_path: Path) -> None:
    _python, _m, module, *arguments = steps(tmp_path)[f"compare {model}"]
    assert module == "models"
    result = CliRunner().invoke(application(), arguments)
    assert isinstance(result.exception, ValueError), result.output
    assert str(result.exception).startswith("device must be one that this machine has, got 'cuda'")


def test_every_step_has_a_command_but_those_of_a_sanitizer_that_is_not_here(tmp_path: Path) -> None:
    for name, command in steps(tmp_path).items():
        assert command or name.startswith("compute-sanitizer")
