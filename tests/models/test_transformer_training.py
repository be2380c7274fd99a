"""The objective, training, going on with it, and the commands."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from typer.testing import CliRunner, Result

from models import checkpoint
from models.__main__ import application
from models.musenet.data import Piece
from models.musenet.midi import read_midi, write_midi
from models.musenet.tokens import Note
from models.training import Progress
from models.transformer.accuracy import measure
from models.transformer.harmony import PAD, VOCABULARY, Batches, harmonies
from models.transformer.model import Config
from models.transformer.objective import smoothed_cross_entropy, warmed_up_rate
from models.transformer.training import KIND, Recipe, Training, load_model

CONFIG = Config(
    VOCABULARY, VOCABULARY, encoder_layers=1, decoder_layers=1, heads=2, width=16, hidden=32
)  # fmt: skip
RECIPE = Recipe(length=40, batch=2, warmup=4, evaluate=4)
TINY = [
    "--encoder-layers", "1", "--decoder-layers", "1", "--heads", "2", "--width", "16", "--hidden", "16",
    "--batch", "1", "--length", "24", "--pieces", "4",
]  # fmt: skip


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(application(), [str(argument) for argument in arguments])


def test_the_loss_is_smoothed_and_leaves_padding_out() -> None:
    logits = torch.randn(2, 3, 7, dtype=torch.float64)
    targets = torch.tensor([[4, 2, PAD], [1, PAD, PAD]])
    log_p = logits.log_softmax(-1)
    each = [0.9 * -log_p[i, j, t] + 0.1 * -log_p[i, j].mean() for i, j, t in ((0, 0, 4), (0, 1, 2), (1, 0, 1))]
    torch.testing.assert_close(smoothed_cross_entropy(logits, targets, 0.1, PAD), sum(each) / 3)
    plain = F.cross_entropy(logits[targets != PAD], targets[targets != PAD])
    torch.testing.assert_close(smoothed_cross_entropy(logits, targets, 0.0, PAD), plain)


def test_the_rate_rises_in_a_line_and_falls_with_the_root() -> None:
    rate = [warmed_up_rate(step, width=512, warmup=4000) for step in range(1, 16001)]
    assert rate[0] == pytest.approx(512**-0.5 * 4000**-1.5)
    assert rate[1999] == pytest.approx(rate[3999] / 2)
    assert max(rate) == rate[3999] == pytest.approx(1 / math.sqrt(512 * 4000))  # 7e-4, as published
    assert rate[15999] == pytest.approx(rate[3999] / 2)


def told(done: list[Progress]) -> list[tuple[int, dict[str, float], str | None]]:
    return [(p.step, dict(p.scalars), p.said) for p in done]


def test_a_resumed_run_has_the_same_losses_to_the_bit(pieces: list[Piece], tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    whole = told(list(Training(CONFIG, RECIPE, pieces).run(9)))
    first = Training(CONFIG, RECIPE, pieces)
    before = told(list(first.run(5)))
    assert before[4][2] is not None  # the last step of a run is measured
    first.save(path)
    torch.manual_seed(99)  # what happens in between has no say
    torch.rand(10)
    resumed = Training.resumed(path, lambda limit: pieces)
    after = told(list(resumed.run(9)))
    assert before[:4] + after == whole[:4] + whole[5:]
    assert before[4][1]["loss/training"] == whole[4][1]["loss/training"]
    assert [step for step, _, said in whole if said is not None] == [4, 8, 9]


def test_the_optimiser_is_the_papers(pieces: list[Piece]) -> None:
    run = Training(CONFIG, replace(RECIPE, rate=2.0), pieces)
    done = list(run.run(3))
    group = run.optimizer.param_groups[0]
    assert isinstance(run.optimizer, torch.optim.Adam)
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.98), 1e-9, 0)
    assert [p.scalars["learning rate"] for p in done] == [2 * warmed_up_rate(s, width=16, warmup=4) for s in (1, 2, 3)]


def test_it_learns(pieces: list[Piece]) -> None:
    """A few lines by heart, which it then writes alone, better than by either rule."""
    own = [replace(piece, held_out=held_out) for held_out in (False, True) for piece in pieces[1:2]]
    recipe = replace(RECIPE, rate=0.3, warmup=20, evaluate=150, smoothing=0.0, transpose=False, forget=0.0)
    run = Training(replace(CONFIG, width=32, hidden=64, norm="pre", dropout=0.0), recipe, own)
    run.training = run.held_out = [harmony.excerpt(0, 16) for harmony in run.training]
    run.batches = iter(Batches(run.training, 16, 2, run.generator, transpose=False))
    list(run.run(100))
    run.model.eval()
    forced, rows = measure(run.model, run.training, run.held_out, beams=2, alpha=0.6)
    assert forced.bits < 1
    for alone in ("the model alone, greedy", "the model alone, 2 beams", "given Bach's bass so far: the model"):
        for rule in ("the most frequent bass note, always", "the most frequent under each melody note"):
            assert rows[alone].sounding > rows[rule].sounding
        assert rows[alone].begun > 0.8


def test_a_saved_model_is_the_trained_one(pieces: list[Piece], tmp_path: Path) -> None:
    run = Training(CONFIG, RECIPE, pieces)
    list(run.run(2))
    run.save(tmp_path / "checkpoint.safetensors")
    model = load_model(tmp_path / "checkpoint.safetensors")
    melody, bass = harmonies(pieces)[0].melody[None], harmonies(pieces)[0].bass[None]
    with torch.no_grad():
        assert torch.equal(model(melody, bass), run.model.eval()(melody, bass))


def test_a_damaged_description_is_named(pieces: list[Piece], tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    run = Training(CONFIG, RECIPE, pieces)
    list(run.run(1))
    run.save(path)
    tensors, about = checkpoint.load(path, KIND)
    other = {**about["config"], "source_vocabulary": 99, "target_vocabulary": 99}
    for damaged in ({**about, "config": {"layers": 3}}, {**about, "recipe": None}, {"step": 3}):
        checkpoint.save(path, KIND, tensors, damaged)
        with pytest.raises(ValueError, match=r"checkpoint\.safetensors: its description is not one of a Transformer"):
            Training.resumed(path, lambda limit: pieces)
    checkpoint.save(path, KIND, tensors, {**about, "config": other})
    with pytest.raises(ValueError, match="must have harmony's 118 tokens, got 99 and 99"):
        load_model(path)
    checkpoint.save(path, KIND, tensors, {**about, "config": {**about["config"], "width": 32}})
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors: .* must have shape"):
        load_model(path)
    checkpoint.save(path, KIND, {n: t for n, t in tensors.items() if n != "random.data"}, about)
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors: its random state"):
        Training.resumed(path, lambda limit: pieces)
    checkpoint.save(path, "gdl_kernels.musenet.1", tensors, about)
    with pytest.raises(ValueError, match=r"its kind must be 'gdl_kernels.transformer.1', got 'gdl_kernels.musenet.1'"):
        load_model(path)


def test_no_step_is_made_of_numbers_that_are_not_finite(pieces: list[Piece], monkeypatch: pytest.MonkeyPatch) -> None:
    run = Training(CONFIG, RECIPE, pieces)
    before = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    poison = run.model.target_embedding.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(ValueError, match=r"norm of the gradients is (inf|nan) after 0 steps"):
        next(run.run(2))
    poison.remove()
    with monkeypatch.context() as patch:
        patch.setattr("models.transformer.training.smoothed_cross_entropy", lambda *_: torch.tensor(float("nan")))
        with pytest.raises(ValueError, match="loss is nan after 0 steps"):
            next(run.run(2))
    assert all(torch.equal(weight, before[name]) for name, weight in run.model.state_dict().items())


@pytest.mark.parametrize(
    ("field", "value"),
    [("length", 0), ("batch", -1), ("warmup", 0), ("rate", float("nan")), ("smoothing", 1.0), ("forget", -0.1)],
)
def test_a_recipe_that_makes_no_sense_is_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{field} must"):
        replace(RECIPE, **{field: value})


def test_a_run_that_can_not_be_is_refused(pieces: list[Piece]) -> None:
    with pytest.raises(ValueError, match="pieces must be some to train on and some to hold out, got 0 and 1"):
        Training(CONFIG, RECIPE, pieces[:1])
    with pytest.raises(ValueError, match="the vocabularies must have harmony's 118 tokens, got 9 and 9"):
        Training(replace(CONFIG, source_vocabulary=9, target_vocabulary=9), RECIPE, pieces)


def test_the_command_trains_resumes_and_tells_how_well(tmp_path: Path) -> None:
    out = ["--out", tmp_path / "run", "--save-every", "2"]
    first = invoke("train", "transformer", *TINY, *out, "--steps", 2)
    assert first.exit_code == 0, first.output
    for row in ("the most frequent under each melody note", "the model alone, greedy", "the model alone, 4 beams"):
        assert row in first.output
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert any(name.startswith("events.out.tfevents") for name in files)
    assert not any(name.endswith(".part") for name in files)
    resumed = invoke("train", "transformer", *out, "--resume", "--steps", 3)
    assert resumed.exit_code == 0, resumed.output
    assert "step 3:" in resumed.output
    assert checkpoint.load(tmp_path / "run" / "checkpoint.safetensors", KIND)[1]["step"] == 3

    assert "--resume goes on with it" in str(invoke("train", "transformer", *TINY, *out, "--steps", 2).exception)
    other = invoke("train", "transformer", *out, "--resume", "--smoothing", "0.2")
    assert "--smoothing can't be given with --resume" in str(other.exception)
    fewer = invoke("train", "transformer", *out, "--resume", "--steps", 3)
    assert "steps must be more than the 3" in str(fewer.exception)


def test_a_run_that_diverges_ends_and_leaves_its_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = invoke("train", "transformer", *TINY, "--out", out, "--rate", "1e38", "--warmup", 1, "--steps", 9)
    assert isinstance(result.exception, ValueError), result.output
    assert "diverged" in str(result.exception)
    assert "try a lower rate" in str(result.exception)
    assert not (out / "checkpoint.safetensors").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, pieces: list[Piece]) -> Path:
    """A checkpoint of a model that has hardly learnt, but no longer ends at once."""
    path = tmp_path_factory.mktemp("trained") / "checkpoint.safetensors"
    run = Training(CONFIG, replace(RECIPE, rate=1.0, evaluate=1000, seed=3), pieces)
    list(run.run(12))
    run.save(path)
    return path


def test_sample_writes_a_bass_for_a_melody(trained: Path, tmp_path: Path) -> None:
    melody = [Note(24 * i, 24, "soprano", 67 + i % 5) for i in range(8)]
    write_midi(melody, tmp_path / "song.mid")
    out = tmp_path / "new" / "piece.one"
    result = invoke("sample", "transformer", "--checkpoint", trained, "--melody", tmp_path / "song.mid", "--out", out)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.parent.iterdir()) == ["piece.one.mid", "piece.one.png"]
    notes = read_midi(out.with_name("piece.one.mid")).notes
    assert [note for note in notes if note.instrument == "soprano"] == melody
    bass = [note for note in notes if note.instrument == "bass"]
    assert f"8 notes of melody, {len(bass)} of bass, 8 beats" in result.output
    assert bass
    assert max(note.end for note in bass) <= 8 * 24
    with Image.open(out.with_name("piece.one.png")) as picture:
        assert min(picture.size) > 300


def test_sample_harmonises_a_chorale(
    trained: Path, tmp_path: Path, pieces: list[Piece], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.musenet.data.chorales", lambda: pieces)
    common = ["sample", "transformer", "--checkpoint", trained, "--out", tmp_path / "piece.mid"]
    named = invoke(*common, "--piece", pieces[1].name, "--beams", 1)
    assert named.exit_code == 0, named.output
    assert f"{pieces[1].name}, which it has learnt from" in named.output
    assert "of the eighths have the pitch of Bach's bass" in named.output
    drawn = invoke(*common)
    assert drawn.exit_code == 0, drawn.output
    assert f"{next(p.name for p in pieces if p.held_out)}, held out" in drawn.output
    wrong = invoke(*common, "--piece", "bwv0")
    assert f"piece must be one of the 4 chorales, such as {pieces[0].name}, got 'bwv0'" in str(wrong.exception)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--melody", "{tmp}/a.mid", "--piece", "bwv269"], "--melody PATH and --piece NAME may be given, got both"),
        (["--melody", "{tmp}/absent.mid"], "absent.mid: there is no such file"),
        (["--beams", "0"], "beams must be at least 1, got 0"),
        (["--alpha", "-1"], "alpha must be 0 or more, got -1.0"),
        (["--tempo", "3.9"], "tempo must be from 4 to 1000, got 3.9"),
        (["--checkpoint", "absent"], "absent: there is no such file"),
        (["--out", "."], "can't be written (it is a folder)"),
        (["--out", "/dev/null/x"], "can't be written"),
    ],
)  # fmt: skip
def test_what_sample_can_not_do_it_says(trained: Path, tmp_path: Path, arguments: list[str], why: str) -> None:
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    result = invoke("sample", "transformer", "--checkpoint", trained, "--out", tmp_path / "x", *given)
    assert isinstance(result.exception, ValueError), result.output
    assert why in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_compare_agrees_on_chorales(tmp_path: Path) -> None:
    size = ["--length", 60, "--batch", 2, "--layers", 1, "--heads", 2, "--width", 32, "--hidden", 32]
    result = invoke("compare", "transformer", *size, "--repetitions", 1, "--json", tmp_path / "figures.json")
    assert result.exit_code == 0, result.output
    figures: dict[str, Any] = json.loads((tmp_path / "figures.json").read_text())
    assert figures["agree"]
    assert figures["model"] == "transformer"
    assert {op: of["cpu"] for op, of in figures["backends"].items()} == {
        "sparse_attention": "chosen", "positional_embedding": "chosen"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--batch", "0"], "batch and length must be at least 1, got 0 and 1024"),
        (["--width", "30"], "width must be a multiple of twice the 8 heads, got 30"),
        (["--norm", "no"], "norm must be one of post, pre, got 'no'"),
        (["--dtype", "int8"], "dtype must be one of"),
    ],
)
def test_what_compare_can_not_do_it_says(arguments: list[str], why: str) -> None:
    assert why in str(invoke("compare", "transformer", *arguments).exception)
