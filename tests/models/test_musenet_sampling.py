"""Sampling."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner
from typer.testing import Result as CliResult

from models import checkpoint
from models.__main__ import application
from models.drawing import Drawing, streams
from models.musenet.data import Piece
from models.musenet.midi import read_midi, write_midi
from models.musenet.model import Config, MuseNet
from models.musenet.pianoroll import draw_piano_roll
from models.musenet.places import batched, of_piece
from models.musenet.recipe import Recipe
from models.musenet.sampling import sample
from models.musenet.statistics import Statistics
from models.musenet.tokens import CHORALES, TICKS_PER_BEAT, Note, Tempo, Vocabulary
from models.musenet.training import KIND, Trained

#: 264 tokens: start, end, six waits, and the beginnings and ends of 128 pitches.
TINY = Vocabulary(instruments=("flute",), longest_wait=6)


@pytest.fixture(autouse=True)
def no_synthesizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is installed on this machine is the affair of the tests of audio."""
    monkeypatch.setattr("models.musenet.audio.shutil.which", lambda program: None)


@pytest.fixture
def model() -> MuseNet:
    torch.manual_seed(7)
    config = Config(vocabulary=len(TINY), context=64, layers=2, heads=2, width=32, stride=32, summary=16)
    return MuseNet(config).eval()


def alone(model: MuseNet, prompt: list[int], seed: int = 0, **arguments: Any) -> Iterator[int]:
    """The tokens of one piece."""
    return (step[0] for step in sample(model, TINY, prompt, generators=streams(seed, 1), **arguments))


def test_the_likeliest_tokens_are_those_of_the_full_forward(model: MuseNet) -> None:
    tokens = [3, 1, 4, 1, 5]
    with torch.no_grad():
        model.embedding.weight[TINY.end] = 0  # never the likeliest
    drawn = list(alone(model, tokens, drawing=Drawing(temperature=0)))
    assert len(drawn) == 64 - 5 + 1  # the last token drawn has no place in the context, and needs none
    for token in drawn[:20]:
        with torch.no_grad():
            assert int(model(torch.tensor([tokens]))[0, -1].argmax()) == token
        tokens.append(token)


def test_a_seed_decides_the_piece(model: MuseNet) -> None:
    first, again, other = (list(islice(alone(model, [0], seed), 30)) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("places", [False, True])
def test_a_piece_is_the_same_whatever_others_are_drawn_beside_it(model: MuseNet, places: bool) -> None:
    """Each ends by itself, and the rest go on in a smaller batch; so in float64, where no rounding turns a draw."""
    if places:
        model = MuseNet(replace(model.config, elapsed=True, chord=True, part=True, countdown=True)).eval()
        for table in model.places.parameters():
            torch.nn.init.normal_(table)
    model.double()
    with torch.no_grad():  # ends as likely as one of twenty
        model.norm.bias[0] = 4
        model.embedding.weight[TINY.end, 0] = 0.75
    together: list[list[int]] = [[] for _ in range(5)]
    for step in sample(model, TINY, [0, 5, 9], generators=streams(11, 5), length=40):
        for piece, token in step.items():
            together[piece].append(token)
    for piece, tokens in enumerate(together):
        assert tokens == list(alone(model, [0, 5, 9], 11 + piece, length=40))
        assert (tokens[-1] == TINY.end) == (len(tokens) < 64 - 3 + 1)
        assert TINY.end not in tokens[:-1]
    assert len({len(tokens) for tokens in together}) > 2


def test_the_places_of_what_is_drawn_are_those_of_a_whole_piece(model: MuseNet) -> None:
    model = MuseNet(replace(model.config, elapsed=True, chord=True, part=True, countdown=True)).eval()
    for table in model.places.parameters():
        torch.nn.init.normal_(table)
    tokens = [0, 5, 20, 30]
    drawn = list(islice(alone(model, tokens, drawing=Drawing(temperature=0), length=33), 20))
    whole = torch.tensor([*tokens, *drawn])
    with torch.no_grad():
        logits = model(whole[None], places=batched([of_piece(TINY, whole, length=33)]))[0]
    assert logits.argmax(-1)[len(tokens) - 1 : -1].tolist() == drawn


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"prompt": []}, "prompt"), ({"prompt": [0] * 64}, "prompt"), ({"prompt": [len(TINY)]}, "prompt"),
        ({"drawing": Drawing(top_k=len(TINY) + 1)}, "top_k"), ({"generators": []}, "generators"),
        ({"length": 0}, "length"), ({"vocabulary": CHORALES}, "vocabulary"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_before_a_token_is_drawn(model: MuseNet, arguments: dict, what: str) -> None:
    with pytest.raises(ValueError, match=f"^{what} must"):
        sample(model, **{"vocabulary": TINY, "prompt": [0], "generators": streams(0, 1), **arguments})


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


def test_several_pieces_are_those_of_their_seeds(tmp_path: Path) -> None:
    arguments = ["sample", "musenet", "--untrained", "--length", "60", "--top-k", "900", "--top-p", "0.95"]

    def written(name: str, *more: str) -> CliResult:
        result = CliRunner().invoke(application(), [*arguments, "--out", str(tmp_path / name), *more])
        assert result.exit_code == 0, result.output
        return result

    result = written("many.mid", "--pieces", "3")
    names = [f"many-{piece}.{kind}" for piece in (1, 2, 3) for kind in ("mid", "png")]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert all(str(tmp_path / name) in result.output for name in names)
    written("one")
    assert read_midi(tmp_path / "one.mid") == read_midi(tmp_path / "many-1.mid") != read_midi(tmp_path / "many-2.mid")


def test_a_piece_without_a_note_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    music = CHORALES.encode([Note(0, 24, "bass", 48)])[1:]

    def draw(*_: object, **__: object) -> Iterator[dict[int, int]]:
        yield {0: CHORALES.end, 1: music[0]}
        yield from ({1: token} for token in music[1:])

    monkeypatch.setattr("models.musenet.sampling.sample", draw)
    arguments = ["sample", "musenet", "--untrained", "--pieces", "2", "--out", str(tmp_path / "piece")]
    result = CliRunner().invoke(application(), arguments)
    assert result.exit_code == 0, result.output
    assert "piece 1: not one note in 1 tokens" in result.output
    assert "1 notes, 1 beats, 4 tokens, ended by itself" in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["piece-2.mid", "piece-2.png"]


def test_conditions_are_what_a_piece_begins_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Composer, instruments and tempo, of a checkpoint that knows them; of a prompt its own instruments."""
    vocabulary = Vocabulary(
        instruments=("piano", "strings"), tempos=(60, 90, 120), composers=("bach", "satie"), instrumentation=True
    )
    config = Config(vocabulary=len(vocabulary), context=64, layers=1, heads=2, width=16, stride=32, summary=16)
    monkeypatch.setattr(
        "models.musenet.training.load_model", lambda path: Trained(MuseNet(config).eval(), vocabulary, corpus)
    )
    corpus = Statistics(in_key=0.87, pitch_class_entropy=2.96, length=1.25, length_entropy=1.5)
    begun = []

    def draw(*arguments: Any, **_: object) -> Iterator[dict[int, int]]:
        begun.append([vocabulary.name(token) for token in arguments[2]])
        yield from ({0: token} for token in vocabulary.encode([Note(0, 24, "piano", 48)])[1:])

    monkeypatch.setattr("models.musenet.sampling.sample", draw)
    arguments = ["sample", "musenet", "--checkpoint", "x", "--out", str(tmp_path / "piece"), "--composer", "satie"]
    instruments = ["--instrument", "strings", "--instrument", "piano"]
    result = CliRunner().invoke(application(), [*arguments, *instruments, "--tempo", "100"])
    assert result.exit_code == 0, result.output
    assert begun.pop() == ["start", "by:satie", "with:piano", "with:strings", "tempo:90"]
    assert "in C major 100% (87%), beats a note 1.00 (1.25); entropies: pitch classes 0.00 (2.96)" in result.output
    assert read_midi(tmp_path / "piece.mid").tempos == [Tempo(0, pytest.approx(90))]

    write_midi([Note(0, 24, "strings", 60)], tmp_path / "prompt.mid", beats_per_minute=61)
    for tempo, said in (([], "tempo:60"), (["--tempo", "200"], "tempo:120")):
        result = CliRunner().invoke(application(), [*arguments, "--prompt", str(tmp_path / "prompt.mid"), *tempo])
        assert result.exit_code == 0, result.output
        assert begun.pop()[:4] == ["start", "by:satie", "with:strings", said]


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
    about = {
        "config": asdict(config),
        "vocabulary": asdict(CHORALES),
        "recipe": asdict(Recipe()),
        "corpus": None,
    }
    endless = MuseNet(config)
    with torch.no_grad():  # a logit of about -81
        endless.norm.bias[0] = 9
        endless.embedding.weight[CHORALES.end, 0] = -9
    checkpoint.save(path, KIND, checkpoint.prefixed(endless.state_dict(), "average.module"), about)
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
        (["--untrained", "--top-p", "1.2"], "top_p must be above 0 and at most 1, got 1.2"),
        (["--untrained", "--top-k", "100000"], "top_k must be from 1 to"),
        (["--untrained", "--pieces", "0"], "pieces must be at least 1, got 0"),
        (["--untrained", "--composer", "bach"], "composer must be one of none"),
        (["--untrained", "--instrument", "tuba"], "instruments can't be asked for"),
        (["--untrained", "--prompt", "x.mid", "--instrument", "tuba"], "--instrument can't be given with --prompt"),
        (["--untrained", "--soundfont", "absent.sf2"], "absent.sf2: there is no such soundfont"),
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
