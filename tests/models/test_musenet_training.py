"""Training, and going on with it."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from models import checkpoint
from models.__main__ import application
from models.musenet.data import Piece
from models.musenet.midi import write_midi
from models.musenet.model import Config, bits_per_token
from models.musenet.recipe import Recipe
from models.musenet.tokens import CHORALES, GENERAL, Note, Tempo, Vocabulary
from models.musenet.training import KIND, Training, load_model
from models.training import Progress

CONFIG = Config(
    vocabulary=len(CHORALES), context=96, layers=2, heads=2, width=32, stride=32, summary=16,
    dropout=0.1, recompute=True, elapsed=True, chord=True, part=True, countdown=True,
)  # fmt: skip
RECIPE = Recipe(length=80, batch=2, warmup=3, evaluate=4, held_out=2)
TINY = ["--layers", "1", "--heads", "2", "--width", "16", "--context", "64", "--batch", "1", "--pieces", "4"]


TRAINING, HELD_OUT = "bits per token/training", "bits per token/held out"


def losses(done: list[Progress]) -> list[tuple[int, dict[str, float]]]:
    return [(p.step, dict(p.scalars)) for p in done]


@pytest.mark.parametrize(
    "changes", [{}, {"accumulate": 2, "precision": "bfloat16", "drop": 0.5}], ids=["plain", "accumulated in bfloat16"]
)
def test_a_resumed_run_is_the_same_to_the_bit(pieces: list[Piece], tmp_path: Path, changes: dict[str, Any]) -> None:
    recipe = replace(RECIPE, **changes)
    whole = Training(CONFIG, recipe, CHORALES, pieces)
    uninterrupted = losses(list(whole.run(9)))
    whole.save(tmp_path / "whole.safetensors")
    first = Training(CONFIG, recipe, CHORALES, pieces)
    before = losses(list(first.run(4)))
    first.save(tmp_path / "first.safetensors")
    torch.manual_seed(99)  # what happens in between has no say
    torch.rand(10)
    resumed = Training.resumed(tmp_path / "first.safetensors", lambda recipe: pieces)
    after = losses(list(resumed.run(9)))
    assert before + after == uninterrupted
    assert [step for step, scalars in uninterrupted if HELD_OUT in scalars] == [4, 8, 9]
    resumed.save(tmp_path / "resumed.safetensors")
    (expected, about), (tensors, about_resumed) = (
        checkpoint.load(tmp_path / f"{name}.safetensors", KIND) for name in ("whole", "resumed")
    )
    assert about == about_resumed
    assert {name.partition(".")[0] for name in expected} == {"model", "average", "optimizer", "random"}
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name


@pytest.mark.parametrize("accumulate", [2, 4])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(pieces: list[Piece], accumulate: int) -> None:
    config = replace(CONFIG, dropout=0.0)
    sums = []
    for parts in (1, accumulate):
        run = Training(config, replace(RECIPE, batch=4, accumulate=parts), CHORALES, pieces)
        run.model.double()
        sums.append((run.accumulate(), {name: weight.grad for name, weight in run.model.named_parameters()}))
    (loss, gradients), (loss_in_parts, in_parts) = sums
    assert loss_in_parts == pytest.approx(loss, rel=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            in_parts[name], gradient, rtol=1e-9, atol=1e-13, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_bfloat16_computes_with_float32_weights(pieces: list[Piece]) -> None:
    config, computed = replace(CONFIG, dropout=0.0), []
    runs = [Training(config, replace(RECIPE, precision=name), CHORALES, pieces) for name in ("float32", "bfloat16")]
    for run in runs:
        run.model.blocks[0].mlp.register_forward_hook(lambda module, given, result: computed.append(result.dtype))
        run.loss = run.accumulate()
    assert set(computed[: len(computed) // 2]) == {torch.float32}
    assert set(computed[len(computed) // 2 :]) == {torch.bfloat16}
    exact, rounded = runs
    assert rounded.loss == pytest.approx(exact.loss, rel=1e-2)
    assert rounded.loss != exact.loss
    for (name, weight), other in zip(rounded.model.named_parameters(), exact.model.parameters()):
        assert weight.dtype == weight.grad.dtype == torch.float32
        assert (weight.grad - other.grad).norm() <= 0.1 * other.grad.norm() + 1e-6, name
    assert runs[1].evaluate() == pytest.approx(runs[0].evaluate(), rel=1e-2)


def test_averaged_weights_are_those_of_the_formula(pieces: list[Piece]) -> None:
    run = Training(CONFIG, replace(RECIPE, ema=0.3), CHORALES, pieces)
    average: dict[str, Tensor] = {}
    for done, _ in enumerate(run.run(6)):
        decay = min(0.3, (1 + done) / (10 + done)) if done else 0.0
        for name, weight in run.model.state_dict().items():
            average[name] = decay * average[name] + (1 - decay) * weight.clone() if done else weight.clone()
    assert decay == 0.3
    for name, weight in run.average.module.state_dict().items():
        torch.testing.assert_close(weight, average[name], rtol=1e-5, atol=1e-7)
    tokens, places = run.held_out
    with torch.no_grad():
        measured = bits_per_token(run.average, tokens, places).item()
    assert run.evaluate() == pytest.approx(measured, rel=1e-5)
    assert run.evaluate() != pytest.approx(bits_per_token(run.model.eval(), tokens, places).item(), rel=1e-5)


def test_other_pieces_than_it_was_trained_on_are_refused(pieces: list[Piece], tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    Training(CONFIG, RECIPE, CHORALES, pieces).save(path)
    for others in (pieces[:3], [pieces[0], *pieces[:0:-1]], [replace(pieces[0], notes=pieces[1].notes), *pieces[1:]]):
        with pytest.raises(ValueError, match=r"checkpoint\.safetensors: was trained on other pieces"):
            Training.resumed(path, lambda recipe, others=others: others)


def test_a_checkpoint_of_an_earlier_version_is_named(pieces: list[Piece], tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.save(path, "gdl_kernels.musenet.1", {"model.norm.bias": torch.zeros(3)}, {"step": 1})
    why = r"checkpoint\.safetensors: written by another version, as 'gdl_kernels\.musenet\.1'; .*: train anew"
    with pytest.raises(ValueError, match=why):
        load_model(path)
    with pytest.raises(ValueError, match=why):
        Training.resumed(path, lambda recipe: pieces)


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
    model, vocabulary, corpus = load_model(tmp_path / "checkpoint.safetensors")
    assert vocabulary == CHORALES
    assert corpus == run.corpus
    tokens, places = run.held_out
    with torch.no_grad():
        averaged = model(tokens[:, :-1], places=places.span(0, -1))
        assert torch.equal(averaged, run.average(tokens[:, :-1], places=places.span(0, -1)))
        assert not torch.equal(averaged, run.model.eval()(tokens[:, :-1], places=places.span(0, -1)))


def test_a_damaged_description_is_named(pieces: list[Piece], tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    run = Training(CONFIG, RECIPE, CHORALES, pieces)
    list(run.run(1))
    run.save(path)
    tensors, about = checkpoint.load(path, KIND)
    for damaged in ({**about, "config": {"layers": 3}}, {**about, "recipe": None}, {"step": 3}):
        checkpoint.save(path, KIND, tensors, damaged)
        with pytest.raises(ValueError, match=r"checkpoint\.safetensors: its description"):
            Training.resumed(path, lambda recipe: pieces)
    other = {**about, "vocabulary": {**about["vocabulary"], "longest_wait": 95}}
    checkpoint.save(path, KIND, tensors, other)
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors: its model has 1122 tokens and its vocabulary 1121"):
        load_model(path)
    checkpoint.save(path, KIND, {n: t for n, t in tensors.items() if n != "random.data"}, about)
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors: its random state"):
        Training.resumed(path, lambda recipe: pieces)
    checkpoint.save(
        path, KIND, {n: t for n, t in tensors.items() if not (n.startswith("optimizer") and "norm.bias" in n)}, about
    )
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors: the optimiser's state is missing"):
        Training.resumed(path, lambda recipe: pieces)


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
        patch.setattr("models.musenet.training.bits_per_token", lambda model, *excerpt: torch.tensor(float("nan")))
        with pytest.raises(ValueError, match="loss is nan after 0 steps"):
            next(run.run(2))
    assert all(torch.equal(weight, before[name]) for name, weight in run.model.state_dict().items())
    monkeypatch.setattr(run, "evaluate", lambda: float("nan"))
    with pytest.raises(ValueError, match="held-out loss is nan after 1 steps"):
        next(run.run(1))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("length", 0),
        ("batch", -1),
        ("accumulate", 3),
        ("accumulate", 0),
        ("precision", "float16"),
        ("ema", 1.0),
        ("ema", -0.1),
        ("drop", 1.1),
        ("drop", float("nan")),
        ("rate", float("nan")),
        ("clip", 0.0),
        ("weight_decay", -0.1),
    ],
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
    folder = run.invoke(application(), ["train", "musenet", *out, "--resume", "--steps", "5", "--data", str(tmp_path)])
    assert "--data can't be given with --resume" in str(folder.exception)
    assert "was trained on the chorales" in str(folder.exception)


def test_the_command_trains_on_a_folder_of_midi_files(tmp_path: Path) -> None:
    music, out = tmp_path / "music", ["--out", str(tmp_path / "run")]
    for place in range(6):
        notes = [Note(12 * i, 12, "piano", 50 + (place + 5 * i) % 24) for i in range(40)]
        write_midi(notes, music / ("bach", "satie")[place % 2] / f"{place}.mid", tempos=[Tempo(240, 90)])
    (music / "broken.mid").write_bytes(b"a letter")
    arguments = [*(a for a in TINY if a not in ("--pieces", "4")), "--held-out", "1"]
    run = CliRunner()
    strict = run.invoke(application(), ["train", "musenet", *arguments, *out, "--data", str(music), "--strict"])
    assert "broken.mid: not a whole MIDI file" in str(strict.exception)
    first = run.invoke(application(), ["train", "musenet", *arguments, *out, "--data", str(music), "--steps", "2"])
    assert first.exit_code == 0, first.output
    assert f"passed over {music / 'broken.mid'}: not a whole MIDI file" in first.output
    assert "1 passed over as they can't be played" in first.output
    assert re.search(r"step 2: \S+ bits per token, held out (\S+) \(bigrams (\S+)\)", first.output)
    assert re.search(r"Held out: \S+ bits per token; bigrams of the same pieces: \S+", first.output)
    model, vocabulary, corpus = load_model(tmp_path / "run" / "checkpoint.safetensors")
    assert vocabulary == replace(GENERAL, composers=("bach", "satie"))
    assert model.config.places == ("elapsed", "chord", "part", "countdown")
    assert corpus is not None
    assert corpus.length == 0.5

    music.rename(tmp_path / "moved")
    resume = ["train", "musenet", *out, "--resume", "--steps", "3"]
    assert "there is no such folder" in str(run.invoke(application(), resume).exception)
    resumed = run.invoke(application(), [*resume, "--data", str(tmp_path / "moved")])
    assert resumed.exit_code == 0, resumed.output
    (tmp_path / "moved" / "satie" / "1.mid").unlink()
    other = run.invoke(
        application(), ["train", "musenet", *out, "--resume", "--steps", "4", "--data", str(tmp_path / "moved")]
    )
    assert "was trained on other pieces" in str(other.exception)


@pytest.mark.gpu
def test_a_gpu_trains_and_resumes(pieces: list[Piece], tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    whole = Training(CONFIG, RECIPE, CHORALES, pieces, device="cuda")
    expected = [done.scalars[TRAINING] for done in whole.run(6)]
    first = Training(CONFIG, RECIPE, CHORALES, pieces, device="cuda")
    before = [done.scalars[TRAINING] for done in first.run(3)]
    first.save(path)
    resumed = Training.resumed(path, lambda recipe: pieces, device="cuda")
    after = [done.scalars[TRAINING] for done in resumed.run(6)]
    assert before + after == pytest.approx(expected, rel=1e-4)


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
