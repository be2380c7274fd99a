"""The command line of all models."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from models.__main__ import application, main
from models.musenet.data import chorales
from models.registry import COMMANDS, MODELS


def test_list_names_every_model_and_its_commands() -> None:
    result = CliRunner().invoke(application(), ["list"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for model in MODELS:
        assert model.name in result.output
    assert "compare, train, sample" in result.output


@pytest.mark.parametrize(
    ("model", "command"), [(model.name, name) for model in MODELS for name in COMMANDS if model.command(name)]
)
def test_every_command_explains_itself(command: str, model: str) -> None:
    result = CliRunner().invoke(application(), [command, model, "--help"])
    assert result.exit_code == 0
    assert "--seed" in result.output


@pytest.mark.parametrize("seed", ["-1", str(2**63)])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_seed_that_no_generator_takes_is_refused(command: str, seed: str) -> None:
    result = CliRunner().invoke(application(), [command, "musenet", "--seed", seed])
    assert result.exit_code == 2
    assert "--seed" in result.output


def test_a_log_is_wide_enough_for_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    result = CliRunner().invoke(application(), ["list"])
    assert max(map(len, result.output.splitlines())) > 80
    assert "…" not in result.output


def test_a_mistake_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["models", "sample", "musenet", "--checkpoint", "no/such.safetensors"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: no/such.safetensors: there is no such file\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["sample", "musenet", "--untrained", "--out", "/dev/null/x"],
        ["sample", "musenet", "--untrained", "--out", "/proc/x"],
        ["sample", "musenet", "--untrained", "--out", "."],
        ["train", "musenet", "--out", "/dev/null/x"],
        ["train", "musenet", "--out", "{file}"],
        ["compare", "musenet", "--json", "/dev/null/x.json"],
        ["compare", "musenet", "--json", "{folder}"],
    ],
    ids=" ".join,
)
def test_where_nothing_can_be_written_nothing_is_begun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str]
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("work has begun")

    # data last: a module that is imported after it is patched would keep the patch.
    for place in ("comparison.chorales", "sampling.sample", "data.chorales"):
        monkeypatch.setattr(f"models.musenet.{place}", work)
    file = tmp_path / "file"
    file.write_text("old")
    monkeypatch.setattr(sys, "argv", ["models", *(a.format(file=file, folder=tmp_path) for a in arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "can't be written" in error
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_cache_that_can_not_be_written_is_named_before_a_piece_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(source: Path) -> None:
        raise AssertionError("a piece was parsed")

    monkeypatch.setenv("GDL_KERNELS_CACHE", "/dev/null/cache")
    monkeypatch.setattr("models.musenet.data._parse", parse)
    with pytest.raises(ValueError, match=r"^/dev/null/cache/.*: can't be written \(Not a directory\)$"):
        chorales(2)


def test_what_the_system_refuses_is_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused() -> None:
        raise OSError(28, "No space left on device", "full/checkpoint.safetensors")

    monkeypatch.setattr("models.__main__.application", lambda: refused)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: full/checkpoint.safetensors: No space left on device\n"
