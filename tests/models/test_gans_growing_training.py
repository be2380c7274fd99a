"""Runs of ProGAN and StyleGAN: they grow by themselves, go on exactly in the middle of it, and learn."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import gdl_kernels
from models.gans.comparison import problem, real_images
from models.gans.growing import GrowingConfig, GrowingGan, GrowingRecipe
from models.gans.model import Stage
from models.gans.resampling import upsample
from models.gans.training import Training, load_model
from models.progan.model import Progan
from models.stylegan.model import Stylegan, StyleganConfig
from models.training import Progress

CONFIGS: dict[type[GrowingGan], GrowingConfig] = {
    Progan: GrowingConfig(size=8, latent=6, capacity=32, widest=6, channels=1),
    Stylegan: StyleganConfig(size=16, latent=6, capacity=64, widest=6, channels=1, style=5, mapping_layers=2),
}
RECIPE = GrowingRecipe(batch=4, fade=12, stable=8, evaluate=100, scored=10, ema=0.5)

both = pytest.mark.parametrize("gan", CONFIGS, ids=lambda gan: gan.name)


def begun(gan: type[GrowingGan], **changes: object) -> Training:
    return Training.begun(gan, CONFIGS[gan], replace(RECIPE, **changes))  # type: ignore[arg-type]


def scalars(done: list[Progress]) -> list[dict[str, float]]:
    return [{k: v for k, v in p.scalars.items() if not k.startswith("speed/")} for p in done]


@both
def test_a_run_grows_by_itself(gan: type[GrowingGan]) -> None:
    run = begun(gan)
    stages, said = [], []
    for done in run.run(7):
        stages.append((done.scalars["stage/resolution"], done.scalars["stage/alpha"]))
        said.append(done.said or "")
    small, large = CONFIGS[gan].FIRST, CONFIGS[gan].size
    grown = [(large, alpha) for alpha in (0.0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0, 1.0)]
    assert stages == [(small, 1.0), (small, 1.0), *grown]
    assert [f"grown to {large}×{large}" in line for line in said] == [False, False, True, *[False] * 4]
    assert run.shown == 28


@both
def test_images_stay_channels_last_from_end_to_end(gan: type[GrowingGan], monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU: also those in one channel, of which torch can't tell how they lie."""
    run = begun(gan)
    seen: list[bool] = []
    convolved = F.conv2d

    def noted(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        y = convolved(x, *args, **kwargs)
        if y.shape[1] > 1 and y.shape[2] > 1:
            seen.append(y.is_contiguous(memory_format=torch.channels_last))
        return y

    monkeypatch.setattr(F, "conv2d", noted)
    for _ in range(3):  # the last is of more pixels
        run._train()
    assert len(seen) > 50
    assert all(seen)
    for name, network in run.networks.items():
        for parameter in network.parameters():
            state = run.optimizers[name].state[parameter]
            assert parameter.dim() < 4 or parameter.is_contiguous(memory_format=torch.channels_last)
            assert all(s.stride() == parameter.stride() for s in state.values() if s.dim())


@both
@pytest.mark.parametrize("steps", [2, 4])  # before growth, and while a resolution fades in
def test_a_run_resumed_in_any_phase_is_the_same_to_the_bit(gan: type[GrowingGan], steps: int, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    straight = begun(gan)
    whole = list(straight.run(7))
    first = begun(gan)
    before = list(islice(first.run(7), steps))
    first.save(path)
    torch.manual_seed(99)  # what happens in between has no say
    resumed = Training.resumed(gan, path)
    after = list(resumed.run(7))
    assert scalars(before) + scalars(after) == scalars(whole)
    for ours, theirs in ((straight.gan, resumed.gan), (straight.ema, resumed.ema)):
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, theirs.state_dict()[name]), name
    assert torch.equal(whole[-1].images["samples"], after[-1].images["samples"])


@both
def test_growth_keeps_all_weights_and_changes_images_only_as_it_fades_in(gan: type[GrowingGan]) -> None:
    run = begun(gan)
    list(run.run(2))
    model, latents = run.gan, run.gan.latents(4)
    generator = model.generator.eval()
    for name, parameter in generator.named_parameters():
        if "noise_weight" in name:
            torch.nn.init.zeros_(parameter)  # or every call would draw other images
    with torch.no_grad():
        before = model.generate(generator, latents, None)
        model.stage = model.stage_at(run.shown, run.recipe)
        assert (model.stage.resolution, model.stage.alpha) == (before.shape[-1] * 2, 0.0)
        torch.testing.assert_close(model.generate(generator, latents, None), upsample(before))


@both
def test_the_smoothed_generator_follows_the_trained_one(gan: type[GrowingGan]) -> None:
    run = begun(gan)
    list(run.run(1))
    first = {name: p.detach().clone() for name, p in run.gan.generator.named_parameters()}
    list(run.run(2))
    smoothed = dict(run.ema.module.named_parameters())
    for name, parameter in run.gan.generator.named_parameters():
        torch.testing.assert_close(smoothed[name], (first[name] + parameter) / 2)


@both
def test_rates_and_batches_are_those_of_the_resolution(gan: type[GrowingGan]) -> None:
    small = {"latent": 2, "capacity": 1024, "widest": 1}
    model = gan(replace(CONFIGS[gan], size=1024, **small))
    recipe = GrowingRecipe(fade=1, stable=1, generator_rate=1e-3, discriminator_rate=2e-3)
    factors = {
        Progan: {1024: 1.5},
        Stylegan: {128: 1.5, 256: 2.0, 512: 3.0, 1024: 3.0},
    }[gan]  # type: ignore[index]
    resolution, shown = CONFIGS[gan].FIRST, 0
    while resolution <= 1024:
        factor = factors.get(resolution, 1.0)
        rates = (pytest.approx(1e-3 * factor), pytest.approx(2e-3 * factor))
        assert model.stage_at(shown, recipe) == Stage(resolution, recipe.batches(model.config)[resolution], rates, 1.0)
        resolution, shown = 2 * resolution, shown + 2


@both
def test_a_new_model_is_of_its_full_size(gan: type[GrowingGan], tmp_path: Path) -> None:
    model = gan(CONFIGS[gan])
    assert (model.stage.resolution, model.stage.alpha) == (CONFIGS[gan].size, 1.0)
    run = begun(gan)
    list(run.run(1))
    run.save(tmp_path / "checkpoint.safetensors")
    saved = load_model(gan, tmp_path / "checkpoint.safetensors")
    assert saved.stage.resolution == CONFIGS[gan].FIRST  # where its training stands


def test_checkpoints_of_each_other_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    run = begun(Progan)
    list(run.run(1))
    run.save(path)
    expected = r"checkpoint\.safetensors: not a checkpoint of this model: its kind must be 'gdl_kernels\.stylegan\.1'"
    for load in (load_model, Training.resumed):
        with pytest.raises(ValueError, match=expected):
            load(Stylegan, path)


@both
def test_a_recipe_that_does_not_fit_is_refused(gan: type[GrowingGan]) -> None:
    with pytest.raises(ValueError, match=r"^batch must be a multiple .* got 6 at \d+×\d+ in 1 parts with a group_size"):
        begun(gan, batch=6)
    with pytest.raises(ValueError, match=r"^fade must be a whole number of at least 1, got 0"):
        begun(gan, fade=0)


@both
def test_our_kernels_and_the_reference_take_the_same_step(gan: type[GrowingGan]) -> None:
    real = real_images("digits", CONFIGS[gan], 4, grey=False, conditional=False, seed=0)
    sides = []
    for backend in ("auto", "reference"):
        with gdl_kernels.backend(backend):
            found = problem(gan, CONFIGS[gan], real, torch.float64, "cpu", 0)
            for name, parameter in found.model.named_parameters():  # noise has weight 0 at first
                if "noise_weight" in name or "bias" in name:
                    torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
            output = found.forward()
            loss = found.loss()
            loss.backward()
            gradients = {name: p.grad for name, p in found.model.named_parameters() if p.grad is not None}
            sides.append((output, loss, gradients))
            ops = {explanation.op for explanation in found.explain()}
            assert ops == {"pixel_norm", "minibatch_stddev"} | ({"style_epilogue"} if gan is Stylegan else set())
    (output, loss, gradients), (expected_output, expected_loss, expected_gradients) = sides
    # Drawn noise is float32's on every backend, to rounding.
    close = {"rtol": 1e-4, "atol": 1e-5} if gan is Stylegan else {"rtol": 1e-8, "atol": 1e-9}
    torch.testing.assert_close(output, expected_output, **close)
    torch.testing.assert_close(loss, expected_loss, **close)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], **close, msg=lambda text, n=name: f"{n}: {text}")
