"""The commands that GANs have, by the example of SAGAN."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from models.__main__ import application
from models.gans.comparison import observed, problem, real_images
from models.gans.data import Batch
from models.gans.pictures import Request
from models.gans.training import Training, load_model
from models.sagan.model import Sagan, SaganConfig

TINY = ["--size", "16", "--latent", "8", "--width", "4", "--attention-at", "8"]
QUICK = ["--batch", "4", "--evaluate", "1000", "--scored", "10"]


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(application(), list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("sagan")
    said = invoke("train", "sagan", "--out", str(folder), "--steps", "2", *TINY, *QUICK)
    assert "10 classes" in said
    assert "untrained: Fréchet distance" in said
    assert "seed 0" in said
    assert "images/s" in said
    with Image.open(folder / "samples" / "0000002.png") as picture:
        assert picture.size == (10 * 68 - 4, 8 * 68 - 4)  # a column for each class
    return folder / "checkpoint.safetensors"


def test_training_goes_on_with_its_options(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(trained.read_bytes())
    said = invoke("train", "sagan", "--out", str(tmp_path), "--steps", "3", "--resume")
    assert "Going on after step 2" in said
    run = Training.resumed(Sagan, path)
    assert (run.step, run.shown) == (3, 12)
    assert run.recipe.batch == 4
    assert run.gan.config == SaganConfig(size=16, latent=8, width=4, attention_at=8, channels=1, classes=10)
    with pytest.raises(ValueError, match="--width can't be given with --resume"):
        invoke("train", "sagan", "--out", str(tmp_path), "--steps", "4", "--resume", "--width", "8")


def test_a_folder_says_channels_and_classes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for n in range(3):
            Image.new("RGB", (20, 18), (40 * n, 0, 255)).save(tmp_path / "data" / name / f"{n}.png")
    where = ("--data", str(tmp_path / "data"))
    said = invoke("train", "sagan", "--out", str(tmp_path / "run"), "--steps", "1", *where, *TINY, *QUICK)
    assert "2 classes" in said
    assert "Fréchet" not in said
    path = tmp_path / "run" / "checkpoint.safetensors"
    assert load_model(Sagan, path).config.channels == 3
    (tmp_path / "data" / "b" / "1.png").write_bytes(b"")
    invoke("train", "sagan", "--out", str(tmp_path / "on"), "--steps", "2", *where, *TINY, *QUICK, "--on-error", "skip")
    with pytest.raises(ValueError, match=r"b/1\.png: can't be decoded"):
        invoke("train", "sagan", "--out", str(tmp_path / "off"), "--steps", "2", *where, *TINY, *QUICK)


def test_broken_images_are_summed_up(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for n in range(3):
        Image.new("L", (8, 8), n).save(data / f"{n}.png")
    (data / "2.png").write_bytes(b"")
    out = tmp_path / "run"
    said = invoke(
        "train", "sagan", "--out", str(out), "--data", str(data), "--on-error", "skip", "--steps", "2",
        "--size", "8", "--attention-at", "0", "--width", "2", "--no-conditional", *QUICK,
    )  # fmt: skip
    assert said.count("2.png: can't be decoded") == 1


@pytest.mark.parametrize(
    ("picture", "size"), [("samples", (3 * 68 - 4, 2 * 68 - 4)), ("interpolation", (3 * 68 - 4, 2 * 68 - 4))]
)
def test_pictures_are_drawn(trained: Path, tmp_path: Path, picture: str, size: tuple[int, int]) -> None:
    out = tmp_path / "drawn.png"
    draw = ("sample", "sagan", "--checkpoint", str(trained), "--picture", picture, "--rows", "2", "--columns", "3")
    assert "6 images" in invoke(*draw, "--out", str(out))
    with Image.open(out) as found:
        assert found.size == size
    first = out.read_bytes()
    invoke(*draw, "--out", str(out))
    assert out.read_bytes() == first
    invoke(*draw, "--out", str(out), "--seed", "1")
    assert out.read_bytes() != first


def test_an_interpolation_goes_from_one_sample_to_another(trained: Path) -> None:
    model = load_model(Sagan, trained)
    images, columns = model.pictures()["interpolation"](model, Request(2, 4, 3, None, 7))
    assert (images.shape, columns) == ((8, 1, 16, 16), 4)
    ends = model.latents(4, generator=torch.Generator().manual_seed(7))
    model.settle(model.generator, seed=7)
    with torch.no_grad():
        expected = model.generator(ends, torch.full((4,), 3))
    torch.testing.assert_close(images[[0, 4, 3, 7]], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--picture", "portrait"], "picture must be one of samples, interpolation, got 'portrait'"),
        (["--label", "10"], "label must be from 0 to 9, got 10"),
        (["--rows", "0"], "rows and columns must be at least 1, got 0 and 10"),
        (["--device", "tpu"], "device must be cpu, cuda or cuda:N, got 'tpu'"),
        (["--out", "/dev/null/x.png"], "/dev/null/x.png: can't be written"),
    ],
)
def test_what_can_t_be_drawn_is_named(trained: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        invoke("sample", "sagan", "--checkpoint", str(trained), *arguments)


def test_truncation_is_no_option_where_there_is_none(trained: Path) -> None:
    result = CliRunner().invoke(application(), ["sample", "sagan", "--checkpoint", "x", "--truncation", "0.5"])
    assert result.exit_code == 2
    assert "No such option" in result.output


def test_another_model_s_checkpoint_is_named(tmp_path: Path) -> None:
    from models import checkpoint

    path = tmp_path / "checkpoint.safetensors"
    checkpoint.save(path, "gdl_kernels.musenet.1", {}, {})
    with pytest.raises(ValueError, match=r"its kind must be 'gdl_kernels\.sagan\.1', got 'gdl_kernels\.musenet\.1'"):
        invoke("sample", "sagan", "--checkpoint", str(path))
    with pytest.raises(ValueError, match=r"its kind must be 'gdl_kernels\.sagan\.1', got 'gdl_kernels\.musenet\.1'"):
        invoke("train", "sagan", "--out", str(tmp_path), "--resume")


def test_both_sides_of_a_comparison_agree(tmp_path: Path) -> None:
    """In float64, where no kink is met by accident: to the strict tolerance."""
    path = tmp_path / "figures.json"
    said = invoke(
        "compare", "sagan", *TINY, "--batch", "4", "--dtype", "float64", "--repetitions", "1", "--json", str(path)
    )
    assert said.count("agrees") == 2
    figures = json.loads(path.read_text())
    assert figures["gradient_tolerance"] == 1e-11
    assert figures["model"] == "sagan"
    assert set(figures["backends"]) == {"spectral_normalize", "conditional_batch_norm", "minibatch_self_attention"}


def test_a_problem_has_the_gradients_of_both_updates() -> None:
    """The discriminator's are those of its own loss alone: the generator's loss adds nothing to them."""
    config = SaganConfig(size=16, latent=8, width=4, attention_at=8, channels=1, classes=10)
    real = real_images("digits", config, 4, grey=False, conditional=True, seed=0)
    whole = problem(Sagan, config, real, torch.float64, "cpu", 0)
    whole.loss().backward()
    assert all(p.requires_grad and p.grad is not None for p in whole.model.parameters())
    torch.manual_seed(0)
    model = Sagan(config).double()
    latents, labels = model.latents(4).double(), model.labels(4)
    fake = model.fakes(latents, labels)
    shown = Batch(real.images.double(), real.labels)
    of_discriminator = model.discriminator_terms(shown, Batch(fake.images.detach(), labels))["hinge"]
    gradients = torch.autograd.grad(of_discriminator, list(model.discriminator.parameters()))
    for (name, parameter), gradient in zip(whole.model.discriminator.named_parameters(), gradients):
        torch.testing.assert_close(parameter.grad, gradient, msg=name)


def test_who_serves_is_observed() -> None:
    norm = torch.nn.BatchNorm2d(2)
    assert observed(lambda: norm(torch.randn(2, 2, 4, 4))) == []
