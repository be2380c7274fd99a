"""The command line of all models."""

from __future__ import annotations

import sys

import pytest
from typer.testing import CliRunner

from models.__main__ import application, main
from models.registry import COMMANDS, MODELS


def test_list_names_every_model_and_its_commands() -> None:
    result = CliRunner().invoke(application(), ["list"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for model in MODELS:
        assert model.name in result.output
    assert "compare, train, sample" in result.output


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("model", [model.name for model in MODELS])
def test_every_command_explains_itself(command: str, model: str) -> None:
    result = CliRunner().invoke(application(), [command, model, "--help"])
    assert result.exit_code == 0
    assert "--seed" in result.output


def test_a_mistake_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["models", "sample", "musenet", "--checkpoint", "no/such.safetensors"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: no/such.safetensors: there is no such file\n"
