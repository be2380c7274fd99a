"""BigGAN's losses, noise and training, by tiny models."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import gdl_kernels
from models import checkpoint
from models.__main__ import application
from models.biggan.config import BigganConfig
from models.biggan.model import Biggan
from models.compare import TOLERANCES, errors
from models.gans import model as gan_model
from models.gans.comparison import problem, real_images
from models.gans.data import Batch
from models.gans.training import Recipe, Training, load_model
from models.training import Progress

TINY = BigganConfig(size=16, latent=6, width=2, embedding=3, attention_at=8, channels=1, classes=10)
RECIPE = replace(Biggan.recipe, batch=8, evaluate=3, scored=20)


@pytest.fixture(autouse=True)
def few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics to sample with, of few images: 16 times 64 would be most of what these tests do."""
    monkeypatch.setattr(gan_model, "PASSES", 2)
    monkeypatch.setattr(gan_model, "STANDING", 8)


def fakes(gan: Biggan, count: int = 4) -> Batch:
    return gan.fakes(gan.latents(count), gan.labels(count))


def test_the_recipe_is_the_papers() -> None:
    recipe = Biggan.recipe
    assert (recipe.generator_rate, recipe.discriminator_rate) == (5e-5, 2e-4)
    assert (recipe.beta1, recipe.beta2, recipe.discriminator_steps, recipe.ema) == (0.0, 0.999, 2, 0.9999)
    assert BigganConfig().penalty == 1e-4


@pytest.mark.parametrize("gram", ["columns", "rows"])
@pytest.mark.parametrize("deep", [False, True])
def test_the_generator_is_drawn_to_orthogonal_weights(gram: str, deep: bool) -> None:
    gan = Biggan(replace(TINY, gram=gram, penalty=0.3, deep=deep))
    terms = gan.generator_terms(fakes(gan))
    assert list(terms) == ["hinge", "orthogonality"]
    expected = torch.zeros(())
    for name, parameter in gan.generator.named_parameters():
        if parameter.dim() > 1 and name != "shared.weight":
            matrix = parameter.detach().flatten(1)
            product = matrix.T @ matrix if gram == "columns" else matrix @ matrix.T
            expected = expected + 0.3 * (product - product.diag().diag()).square().sum()
    torch.testing.assert_close(terms["orthogonality"], expected, rtol=1e-4, atol=1e-5)
    terms["orthogonality"].backward()
    touched = {name for name, p in gan.generator.named_parameters() if p.grad is not None}
    assert touched == {name for name, p in gan.generator.named_parameters() if ".original" in name}


def test_no_penalty_is_no_term() -> None:
    gan = Biggan(replace(TINY, penalty=0.0))
    assert list(gan.generator_terms(fakes(gan))) == ["hinge"]


def test_truncated_noise() -> None:
    gan = Biggan(TINY)
    torch.manual_seed(1)
    plain = gan.latents(500)
    assert plain.shape == (500, 6)
    assert plain.abs().max() > 2
    assert gan.latents(500, truncation=0.3).abs().max() <= 0.3
    with pytest.raises(ValueError, match="threshold must be positive, got 0"):
        gan.latents(3, truncation=0)


def test_statistics_to_sample_with_are_of_the_truncation() -> None:
    gan = Biggan(TINY).eval()
    latents, labels = torch.randn(2, 6), torch.tensor([3, 4])
    images = []
    for truncation in (None, 0.2, 0.2):
        gan.settle(gan.generator, truncation=truncation)
        with torch.no_grad():
            images.append(gan.generate(gan.generator, latents, labels))
    assert torch.equal(images[1], images[2])
    assert (images[0] - images[1]).abs().max() > 1e-3


@pytest.mark.parametrize("deep", [False, True])
def test_our_kernels_take_the_same_step_as_plain_pytorch(deep: bool) -> None:
    """Images, scores, and the gradients of both losses and the penalty, where attention has a say."""
    config = replace(TINY, deep=deep, penalty=0.1)
    real = real_images("digits", config, 6, grey=False, conditional=True, seed=0)
    found = []
    for backend in ("cpu", "reference"):
        with gdl_kernels.backend(backend):
            step = problem(Biggan, config, real, torch.float64, "cpu", 0)
            with torch.no_grad():
                for name, parameter in step.model.named_parameters():
                    if name.endswith("gamma"):
                        parameter.fill_(1.0)
            output = step.forward().detach()
            step.loss().backward()
            assert {dict(e.verdicts)[backend] for e in step.explain()} == {"chosen"}
        gradients = {name: p.grad for name, p in step.model.named_parameters() if p.grad is not None}
        assert len(gradients) == len(list(step.model.parameters()))
        found.append({"output": output, **gradients})
    output_error, gradient_error, worst = errors(*found)
    allowed = TOLERANCES[torch.float64]
    assert (output_error <= allowed[0], gradient_error <= allowed[1]) == (True, True), worst


def scalars(done: list[Progress]) -> list[dict[str, float]]:
    return [{k: v for k, v in p.scalars.items() if not k.startswith("speed/")} for p in done]


RESUMED = {
    "accumulated": (TINY, replace(RECIPE, accumulate=2)),
    "deep, bfloat16": (replace(TINY, deep=True, latent=5), replace(RECIPE, precision="bfloat16")),
}


@pytest.mark.parametrize(("config", "recipe"), RESUMED.values(), ids=RESUMED)
def test_a_resumed_run_is_the_same_to_the_bit(config: BigganConfig, recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    straight = Training.begun(Biggan, config, recipe)
    whole = list(straight.run(3))
    first = Training.begun(Biggan, config, recipe)
    before = list(islice(first.run(3), 1))
    first.save(path)
    torch.manual_seed(99)  # what happens in between has no say
    resumed = Training.resumed(Biggan, path)
    assert scalars(before) + scalars(list(resumed.run(3))) == scalars(whole)
    for name, tensor in straight.ema.state_dict().items():
        assert torch.equal(tensor, resumed.ema.state_dict()[name]), name
    with pytest.raises(ValueError, match="latent must be a multiple of 3"):
        replace(TINY, latent=5)


def test_the_command_line(tmp_path: Path) -> None:
    """Train, go on, and draw everything that there is to draw."""
    run = CliRunner().invoke
    out, path = str(tmp_path / "run"), str(tmp_path / "run" / "checkpoint.safetensors")
    shape = ["--width", "1", "--latent", "6", "--embedding", "3"]
    scale = ["--batch", "4", "--scored", "10", "--evaluate", "5"]
    result = run(application(), ["train", "biggan", "--out", out, "--steps", "1", *shape, *scale])
    assert result.exit_code == 0, result.output
    assert "BigGAN: generator" in result.output
    result = run(application(), ["train", "biggan", "--out", out, "--steps", "2", "--resume"])
    assert result.exit_code == 0, result.output
    for picture in ("samples", "interpolation", "truncation"):
        png = tmp_path / f"{picture}.png"
        command = ["sample", "biggan", "--checkpoint", path, "--picture", picture, "--out", str(png)]
        result = run(application(), [*command, "--rows", "2", "--columns", "3"])
        assert result.exit_code == 0, result.output
        assert png.read_bytes().startswith(b"\x89PNG")
    for option, message in (
        (["--truncation", "0"], "truncation must be positive, got 0.0"),
        (["--label", "10"], "label must be from 0 to 9, got 10"),
    ):
        result = run(application(), ["sample", "biggan", "--checkpoint", path, *option])
        assert str(result.exception) == message


def test_what_fits_no_biggan_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.save(path, "gdl_kernels.sagan.1", {"weight": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match=r"its kind must be 'gdl_kernels.biggan.1', got 'gdl_kernels.sagan.1'"):
        load_model(Biggan, path)
    run = CliRunner().invoke
    for option, message in (
        (["--no-conditional"], "classes must be at least 1, got 0"),
        (["--size", "24"], "size must be one of 16, 32, 64, 128, 256, 512, got 24"),
    ):
        result = run(application(), ["train", "biggan", "--out", str(tmp_path / "run"), *option])
        assert str(result.exception).startswith(message)
