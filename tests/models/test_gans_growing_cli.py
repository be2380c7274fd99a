"""``python -m models ... progan`` and ``... stylegan``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from models.__main__ import application

TINY = ["--size", "8", "--latent", "6", "--capacity", "32", "--widest", "6"]
SHAPES = {"progan": TINY, "stylegan": [*TINY, "--style", "5", "--mapping-layers", "2"]}
RECIPE = ["--batch", "4", "--fade", "8", "--stable", "8", "--evaluate", "100", "--scored", "10"]

both = pytest.mark.parametrize("name", SHAPES)


def invoked(*arguments: object) -> Result:
    return CliRunner().invoke(application(), [str(argument) for argument in arguments])


@pytest.fixture(scope="module", params=SHAPES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A model's name and its checkpoint after three steps, the last of them resumed."""
    out = tmp_path_factory.mktemp(request.param)
    first = invoked("train", request.param, *SHAPES[request.param], *RECIPE, "--out", out, "--steps", 2)
    assert first.exit_code == 0, first.output
    assert "untrained: Fréchet distance" in first.output
    assert "seed 0" in first.output
    second = invoked("train", request.param, "--out", out, "--resume", "--steps", 3)
    assert second.exit_code == 0, second.output
    assert ("grown to 8×8" in second.output) is (request.param == "progan")
    return request.param, out / "checkpoint.safetensors"


@pytest.mark.parametrize(
    ("picture", "rows", "columns"),
    [("samples", 2, 3), ("interpolation", 2, 3), ("truncation", 5, 3), ("mixing", 1 + 2 * 2, 4), ("noise", 2, 4)],
)
def test_it_draws(trained: tuple[str, Path], picture: str, rows: int, columns: int, tmp_path: Path) -> None:
    name, checkpoint = trained
    out = tmp_path / "picture.png"
    result = invoked("sample", name, "--checkpoint", checkpoint, "--picture", picture, "--out", out, "--rows", 2,
                     "--columns", 3)  # fmt: skip
    if name == "progan" and picture not in ("samples", "interpolation"):
        assert f"picture must be one of samples, interpolation, got '{picture}'" in str(result.exception)
        return
    assert result.exit_code == 0, result.output
    with Image.open(out) as image:
        assert image.size == (columns * 72 - 8, rows * 72 - 8)


def test_what_can_not_be_drawn_is_named(trained: tuple[str, Path]) -> None:
    name, checkpoint = trained
    other = next(other for other in SHAPES if other != name)
    wrong = invoked("sample", other, "--checkpoint", checkpoint)
    assert f"its kind must be 'gdl_kernels.{other}.1', got 'gdl_kernels.{name}.1'" in str(wrong.exception)
    truncated = invoked("sample", name, "--checkpoint", checkpoint, "--truncation", "nan")
    if name == "stylegan":
        assert str(truncated.exception) == "psi must be finite, got nan"
    else:
        assert "No such option" in truncated.output


@both
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--size", 12, "size must be a power of two"),
        ("--batch", 6, "batch must be a multiple of accumulate"),
        ("--capacity", 4, "capacity must be at least the size, 8, got 4"),
        ("--stable", 0, "stable must be a whole number of at least 1, got 0"),
    ],
)
def test_what_can_not_be_trained_is_named(name: str, option: str, value: int, message: str, tmp_path: Path) -> None:
    result = invoked("train", name, *SHAPES[name], *RECIPE, option, value, "--out", tmp_path)
    assert isinstance(result.exception, ValueError), result.output
    assert str(result.exception).startswith(message)
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_stylegan_begins_at_8() -> None:
    result = invoked("train", "stylegan", "--size", 4)
    assert str(result.exception) == "size must be a power of two of at least 8, got 4"


@both
def test_compare_agrees(name: str, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    result = invoked("compare", name, *SHAPES[name], "--batch", 4, "--repetitions", 1, "--json", figures)
    assert result.exit_code == 0, result.output
    found = json.loads(figures.read_text())
    assert found["agree"] is True
    assert found["config"]["size"] == 8
    assert set(found["backends"]) == {"pixel_norm", "minibatch_stddev"} | (
        {"style_epilogue"} if name == "stylegan" else set()
    )
