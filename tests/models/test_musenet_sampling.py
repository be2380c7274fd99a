"""Sampling."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from models import checkpoint
from models.__main__ import application
from models.musenet.data import Piece
from models.musenet.midi import read_midi, write_midi
from models.musenet.model import Config, MuseNet
from models.musenet.pianoroll import draw_piano_roll
from models.musenet.sampling import draw, sample
from models.musenet.tokens import CHORALES, TICKS_PER_BEAT, Note
from models.musenet.training import KIND, Recipe


@pytest.fixture
def model() -> MuseNet:
    torch.manual_seed(7)
    return MuseNet(Config(vocabulary=40, context=64, layers=2, heads=2, width=32, stride=32, summary=16)).eval()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_likeliest_tokens_are_those_of_the_full_forward(model: MuseNet) -> None:
    tokens = [3, 1, 4, 1, 5]
    drawn = list(sample(model, tokens, temperature=0))
    assert len(drawn) == 64 - 5 + 1  # the last token drawn has no place in the context, and needs none
    for token in drawn[:20]:
        with torch.no_grad():
            assert int(model(torch.tensor([tokens]))[0, -1].argmax()) == token
        tokens.append(token)


def test_a_seed_decides_the_piece(model: MuseNet) -> None:
    first, again, other = (list(islice(sample(model, [0], generator=seeded(s)), 30)) for s in (1, 1, 2))
    assert first == again != other


def test_drawing_follows_temperature_and_top_k() -> None:
    logits = torch.tensor([0.3, 2.0, -1.0, 1.2, 0.7])
    for temperature, top_k in ((1.0, 5), (0.5, 3), (2.0, 2)):
        weights: Tensor = (logits / temperature).softmax(0)
        weights[weights < weights.topk(top_k).values[-1]] = 0
        generator = seeded(0)
        counts = torch.zeros(5)
        for _ in range(4000):
            counts[draw(logits, temperature, top_k, generator)] += 1
        # Four standard deviations of a share of 4000 draws.
        torch.testing.assert_close(counts / 4000, weights / weights.sum(), rtol=0, atol=0.032)
        assert (counts > 0).sum() == top_k


@pytest.mark.parametrize("temperature", [1e-5, 1e-38, 1e-320])
def test_the_lowest_temperatures_draw_the_likeliest(temperature: float) -> None:
    logits = torch.tensor([30.0, -50.0, 90.0, 89.9])
    assert {draw(logits, temperature, 4, seeded(seed)) for seed in range(20)} == {2}


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_model_that_has_diverged_draws_nothing(temperature: float, wrong: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        draw(torch.tensor([0.5, wrong, 1.0]), temperature, 2, seeded(0))


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"prompt": []}, "prompt"), ({"prompt": [0] * 64}, "prompt"), ({"prompt": [40]}, "prompt"),
        ({"temperature": -0.1}, "temperature"), ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"), ({"top_k": 41}, "top_k"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_before_a_token_is_drawn(model: MuseNet, arguments: dict, what: str) -> None:
    with pytest.raises(ValueError, match=f"^{what} must"):
        sample(model, **{"prompt": [0], **arguments})


def test_the_command_writes_music_and_its_picture(tmp_path: Path) -> None:
    out = tmp_path / "new" / "piece.one"
    arguments = ["sample", "musenet", "--untrained", "--out", str(out), "--length", "150", "--top-k", "900"]
    result = CliRunner().invoke(application(), arguments)
    assert result.exit_code == 0, result.output
    assert "noise, not music" in result.output
    assert sorted(path.name for path in out.parent.iterdir()) == ["piece.one.mid", "piece.one.png"]
    notes = read_midi(out.with_name("piece.one.mid")).notes
    assert f"{len(notes)} notes" in result.output
    with Image.open(out.with_name("piece.one.png")) as picture:
        assert min(picture.size) > 300


def test_a_prompt_is_gone_on_with(pieces: list[Piece], tmp_path: Path) -> None:
    opening = [note for note in pieces[1].notes if note.end <= 8 * TICKS_PER_BEAT]
    write_midi(opening, tmp_path / "opening.mid")
    arguments = ["sample", "musenet", "--untrained", "--prompt", str(tmp_path / "opening.mid")]
    out = ["--out", str(tmp_path / "whole"), "--top-k", "900"]
    result = CliRunner().invoke(application(), [*arguments, *out])
    assert result.exit_code == 0, result.output
    notes = read_midi(tmp_path / "whole.mid").notes
    ended = max(note.end for note in opening)
    assert [note for note in notes if note.start < ended] == sorted(opening)
    assert any(note.start >= ended for note in notes)

    room = 512 - (len(CHORALES.encode(opening)) - 1) + 1
    longer = CliRunner().invoke(application(), [*arguments, *out, "--length", str(room + 1)])
    assert f"at most the {room} tokens that the context of 512 leaves" in str(longer.exception)


def test_a_prompt_that_can_not_be_gone_on_with_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def drawing(*_: object, **__: object) -> None:
        raise AssertionError("drawing has begun")

    monkeypatch.setattr("models.musenet.sampling.sample", drawing)
    path = tmp_path / "prompt.mid"

    def why() -> str:
        arguments = ["sample", "musenet", "--untrained", "--prompt", str(path), "--out", str(tmp_path / "out")]
        result = CliRunner().invoke(application(), arguments)
        assert isinstance(result.exception, ValueError), result.output
        assert not list(tmp_path.glob("out*"))
        return str(result.exception)

    assert why() == f"{path}: there is no such file"
    path.write_bytes(b"")
    assert why() == f"{path}: the file is empty"
    path.write_bytes(b"a letter")
    assert why().startswith(f"{path}: not a whole MIDI file")
    write_midi([Note(0, 24, "bass", 48), Note(0, 24, "drums", 36)], path)
    assert why() == f"{path}: a note's instrument must be one of soprano, alto, tenor, bass, got 'drums'"
    write_midi([Note(24 * i, 24, "bass", 48 + i % 2) for i in range(171)], path)  # 3 tokens each, and start
    assert why() == f"{path}: must have fewer tokens than the context, 512, but has 514"


@pytest.mark.parametrize("typed", ["piece.mid", "piece.png"])
def test_a_typed_suffix_is_not_doubled(tmp_path: Path, typed: str) -> None:
    arguments = ["sample", "musenet", "--untrained", "--out", str(tmp_path / typed), "--length", "80"]
    result = CliRunner().invoke(application(), arguments)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["piece.mid", "piece.png"]


@pytest.mark.parametrize("length", [[], ["--length", "64"]], ids=["default", "all"])
def test_a_small_context_is_filled(model: MuseNet, tmp_path: Path, length: list[str]) -> None:
    config = replace(model.config, vocabulary=len(CHORALES))
    path = tmp_path / "small.safetensors"
    about = {"step": 1, "config": asdict(config), "vocabulary": asdict(CHORALES), "recipe": asdict(Recipe())}
    endless = MuseNet(config)
    with torch.no_grad():  # a logit of about -81
        endless.norm.bias[0] = 9
        endless.embedding.weight[CHORALES.end, 0] = -9
    checkpoint.save(path, KIND, checkpoint.prefixed(endless.state_dict(), "model"), about)
    arguments = ["sample", "musenet", "--checkpoint", str(path), "--out", str(tmp_path / "piece"), "--top-k", "900"]
    result = CliRunner().invoke(application(), [*arguments, *length])
    assert result.exit_code == 0, result.output
    assert "64 tokens, cut at --length" in result.output
    longer = CliRunner().invoke(application(), [*arguments, "--length", "65"])
    assert "length must be at most the 64 tokens that the context of 64 leaves, got 65" in str(longer.exception)


def test_music_without_its_picture_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "piece.mid").write_text("old")
    arguments = ["sample", "musenet", "--untrained", "--out", str(tmp_path / "piece"), "--length", "80"]
    for part in ("pianoroll.draw_piano_roll", "midi.write_midi"):
        with monkeypatch.context() as patch:
            patch.setattr(f"models.musenet.{part}", failing)
            result = CliRunner().invoke(application(), arguments)
        assert isinstance(result.exception, OSError)
        assert [path.name for path in tmp_path.iterdir()] == ["piece.mid"]
        assert (tmp_path / "piece.mid").read_text() == "old"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "one of --checkpoint PATH and --untrained"),
        (
            ["--untrained", "--length", "100000"],
            "length must be at most the 512 tokens that the context of 512 leaves, got 100000",
        ),
        (["--untrained", "--length", "0"], "length must be at least 1"),
        (["--untrained", "--tempo", "3.9"], "tempo must be from 4 to 1000, got 3.9"),
        (["--untrained", "--tempo", "nan"], "tempo must be from 4 to 1000, got nan"),
        (["--checkpoint", "absent"], "absent: there is no such file"),
        (["--untrained", "--temperature", "-1"], "temperature must be"),
    ],
)
def test_what_the_command_can_not_do_it_says(tmp_path: Path, arguments: list[str], why: str) -> None:
    result = CliRunner().invoke(application(), ["sample", "musenet", "--out", str(tmp_path / "x"), *arguments])
    assert isinstance(result.exception, ValueError)
    assert why in str(result.exception)
    assert not list(tmp_path.iterdir())


def shares(notes: list[Note], path: Path) -> dict[str, int]:
    """How many pixels of a piece's picture have about the colour of each instrument."""
    draw_piano_roll(notes, path)
    with Image.open(path) as picture:
        colours = picture.convert("RGB").getcolors(maxcolors=2**24)
    assert colours is not None
    return {
        name: sum(n for n, c in colours if sum(abs(a - b) for a, b in zip(c, wanted)) < 45)
        for name, wanted in {
            "soprano": (0xD1, 0x49, 0x5B),
            "bass": (0x2E, 0x5E, 0x8C),
            "other": (0x7B, 0x5E, 0xA7),
        }.items()
    }


def test_voices_that_sound_a_pitch_at_once_share_its_height(tmp_path: Path) -> None:
    notes = [Note(0, 96, "bass", 60, 127), Note(0, 96, "soprano", 60, 127), Note(0, 48, "kazoo", 64, 127)]
    together = shares(notes, tmp_path / "roll.png")
    assert together["soprano"] / together["bass"] == pytest.approx(1, rel=0.15)
    assert together["soprano"] / together["other"] == pytest.approx(1, rel=0.15)


def test_the_picture_shows_every_note(pieces: list[Piece], tmp_path: Path) -> None:
    """Each voice's colour covers about the share of the picture that its notes have."""
    notes = [Note(0, 48, "soprano", 72, 127), Note(48, 24, "bass", 60, 127), Note(72, 24, "kazoo", 66, 127)]
    path = tmp_path / "roll.png"
    near = shares(notes, path)
    assert near["soprano"] / near["bass"] == pytest.approx(2, rel=0.15)
    assert near["other"] / near["bass"] == pytest.approx(1, rel=0.15)
    with pytest.raises(ValueError, match="at least one"):
        draw_piano_roll([], path)
    draw_piano_roll(pieces[0].notes, path, title=pieces[0].name)
