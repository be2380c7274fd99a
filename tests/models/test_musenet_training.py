"""Training, and going on with it."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from models import checkpoint
from models.__main__ import application
from models.musenet.data import Piece
from models.musenet.model import Config
from models.musenet.tokens import CHORALES, Vocabulary
from models.musenet.training import KIND, Recipe, Training, load_model
from models.training import Progress

CONFIG = Config(
    vocabulary=len(CHORALES), context=96, layers=2, heads=2, width=32, stride=32, summary=16,
    dropout=0.1, recompute=True,
)  # fmt: skip
RECIPE = Recipe(length=80, batch=2, warmup=3, evaluate=4, held_out=2)
TINY = ["--layers", "1", "--heads", "2", "--width", "16", "--context", "64", "--batch", "1", "--pieces", "4"]


TRAINING, HELD_OUT = "bits per token/training", "bits per token/held out"


def losses(done: list[Progress]) -> list[tuple[int, dict[str, float]]]:
    return [(p.step, dict(p.scalars)) for p in done]


def test_a_resumed_run_has_the_same_losses_to_the_bit(pieces: list[Piece], tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    whole = losses(list(Training(CONFIG, RECIPE, CHORALES, pieces).run(9)))
    first = Training(CONFIG, RECIPE, CHORALES, pieces)
    before = losses(list(first.run(4)))
    first.save(path)
    torch.manual_seed(99)  # what happens in between has no say
    torch.rand(10)
    resumed = Training.resumed(path, lambda limit: pieces)
    after = losses(list(resumed.run(9)))
    assert before + after == whole
    assert [step for step, scalars in whole if HELD_OUT in scalars] == [4, 8, 9]


def test_it_learns(pieces: list[Piece]) -> None:
    recipe = replace(RECIPE, rate=3e-3, warmup=5, transpose=False)
    run = Training(replace(CONFIG, dropout=0.0, recompute=False), recipe, CHORALES, pieces)
    chance = math.log2(len(CHORALES))
    assert run.evaluate() == pytest.approx(chance, abs=0.5)  # it begins without an opinion
    done = list(run.run(60))
    assert done[-1].scalars[HELD_OUT] < chance - 1.5
    assert done[-1].scalars[TRAINING] < chance - 3


def test_a_saved_model_is_the_trained_one(pieces: list[Piece], tmp_path: Path) -> None:
    run = Training(CONFIG, RECIPE, CHORALES, pieces)
    list(run.run(2))
    run.save(tmp_path / "checkpoint.safetensors")
    model, vocabulary = load_model(tmp_path / "checkpoint.safetensors")
    assert vocabulary == CHORALES
    with torch.no_grad():
        assert torch.equal(model(run.held_out[:, :-1]), run.model.eval()(run.held_out[:, :-1]))


def test_a_damaged_description_is_named(pieces: list[Piece], tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    run = Training(CONFIG, RECIPE, CHORALES, pieces)
    list(run.run(1))
    run.save(path)
    tensors, about = checkpoint.load(path, KIND)
    for damaged in ({**about, "config": {"layers": 3}}, {**about, "recipe": None}, {"step": 3}):
        checkpoint.save(path, KIND, tensors, damaged)
        with pytest.raises(ValueError, match=r"checkpoint\.safetensors: its description"):
            Training.resumed(path, lambda limit: pieces)
    other = {**about, "vocabulary": {**about["vocabulary"], "longest_wait": 95}}
    checkpoint.save(path, KIND, tensors, other)
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors: its model has 1122 tokens and its vocabulary 1121"):
        load_model(path)
    checkpoint.save(path, KIND, {n: t for n, t in tensors.items() if n != "random.data"}, about)
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors: its random state"):
        Training.resumed(path, lambda limit: pieces)
    checkpoint.save(path, KIND, {n: t for n, t in tensors.items() if "norm.bias" not in n or "model" in n}, about)
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors: the optimiser's state is missing"):
        Training.resumed(path, lambda limit: pieces)


def test_a_run_that_diverges_ends_and_leaves_its_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["train", "musenet", *TINY, "--out", str(out), "--rate", "1e30", "--warmup", "1", "--evaluate", "100"]
    result = CliRunner().invoke(application(), [*arguments, "--steps", "5"])
    assert isinstance(result.exception, ValueError), result.output
    assert "diverged" in str(result.exception)
    assert "try a lower rate" in str(result.exception)
    assert not (out / "checkpoint.safetensors").exists()


def test_no_step_is_made_of_numbers_that_are_not_finite(pieces: list[Piece], monkeypatch: pytest.MonkeyPatch) -> None:
    run = Training(CONFIG, RECIPE, CHORALES, pieces)
    before = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    poison = run.model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(ValueError, match=r"norm of the gradients is (inf|nan) after 0 steps"):
        next(run.run(2))
    poison.remove()
    with monkeypatch.context() as patch:
        patch.setattr("models.musenet.training.bits_per_token", lambda model, tokens: torch.tensor(float("nan")))
        with pytest.raises(ValueError, match="loss is nan after 0 steps"):
            next(run.run(2))
    assert all(torch.equal(weight, before[name]) for name, weight in run.model.state_dict().items())
    monkeypatch.setattr(run, "evaluate", lambda: float("nan"))
    with pytest.raises(ValueError, match="held-out loss is nan after 1 steps"):
        next(run.run(1))


@pytest.mark.parametrize(
    ("field", "value"), [("length", 0), ("batch", -1), ("rate", float("nan")), ("clip", 0.0), ("weight_decay", -0.1)]
)
def test_a_recipe_that_makes_no_sense_is_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{field} must"):
        replace(RECIPE, **{field: value})


def test_a_run_that_can_not_be_is_refused(pieces: list[Piece]) -> None:
    with pytest.raises(ValueError, match="length must be at most the context, 96, got 97"):
        Training(CONFIG, replace(RECIPE, length=97), CHORALES, pieces)
    with pytest.raises(ValueError, match="got 0 and 1"):
        Training(CONFIG, RECIPE, CHORALES, pieces[:1])
    with pytest.raises(ValueError, match="vocabulary"):
        Training(CONFIG, RECIPE, Vocabulary(("piano",)), pieces)


def test_the_command_trains_and_resumes(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "run"), "--save-every", "2"]
    run = CliRunner()
    first = run.invoke(application(), ["train", "musenet", *TINY, *out, "--steps", "2"])
    assert first.exit_code == 0, first.output
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert "checkpoint.safetensors" in files
    assert any(name.startswith("events.out.tfevents") for name in files)
    assert not any(name.endswith(".part") for name in files)
    resumed = run.invoke(application(), ["train", "musenet", *out, "--resume", "--steps", "3"])
    assert resumed.exit_code == 0, resumed.output
    assert "step 3:" in resumed.output
    assert checkpoint.load(tmp_path / "run" / "checkpoint.safetensors", KIND)[1]["step"] == 3

    again = run.invoke(application(), ["train", "musenet", *TINY, *out, "--steps", "2"])
    assert isinstance(again.exception, ValueError)
    assert "--resume goes on with it" in str(again.exception)
    fewer = run.invoke(application(), ["train", "musenet", *out, "--resume", "--steps", "3"])
    assert "steps must be more than the 3" in str(fewer.exception)
    other = run.invoke(application(), ["train", "musenet", *out, "--resume", "--rate", "0.1"])
    assert isinstance(other.exception, ValueError)
    assert "--rate can't be given with --resume" in str(other.exception)


def test_ctrl_c_ends_after_a_whole_step(tmp_path: Path, pieces: list[Piece]) -> None:
    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "models",
        "train",
        "musenet",
        *TINY,
        "--steps",
        "100000",
        "--save-every",
        "3",
        "--out",
    ]
    with subprocess.Popen([*command, str(out)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        deadline = time.monotonic() + 120
        while not (out / "checkpoint.safetensors").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "--resume goes on from there" in output
    _, about = checkpoint.load(out / "checkpoint.safetensors", KIND)
    assert f"Stopped after step {about['step']};" in output
    more = ["train", "musenet", "--out", str(out), "--resume", "--steps", str(about["step"] + 1)]
    resumed = CliRunner().invoke(application(), more)
    assert resumed.exit_code == 0, resumed.output
    assert checkpoint.load(out / "checkpoint.safetensors", KIND)[1]["step"] == about["step"] + 1
