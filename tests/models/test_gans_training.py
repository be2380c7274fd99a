"""The adversarial loop, and going on with it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from models import checkpoint
from models.gans.data import Batches
from models.gans.training import Recipe, Training, load_model
from models.sagan.model import Sagan, SaganConfig
from models.training import Progress

CONFIG = SaganConfig(size=16, latent=8, width=4, attention_at=8, channels=1, classes=10)
RECIPE = Recipe(batch=8, evaluate=2, scored=80)


def scalars(done: list[Progress]) -> list[dict[str, float]]:
    return [{k: v for k, v in p.scalars.items() if not k.startswith("speed/")} for p in done]


def test_a_resumed_run_is_the_same_to_the_bit(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    straight = Training.begun(Sagan, CONFIG, RECIPE)
    whole = list(straight.run(5))
    first = Training.begun(Sagan, CONFIG, RECIPE)
    before = list(islice(first.run(5), 3))
    first.save(path)
    torch.manual_seed(99)  # what happens in between has no say
    resumed = Training.resumed(Sagan, path)
    after = list(resumed.run(5))
    assert scalars(before) + scalars(after) == scalars(whole)
    assert resumed.untrained == straight.untrained
    assert [p.step for p in whole if "scores/Fréchet distance" in p.scalars] == [2, 4, 5]
    for name, tensor in straight.ema.state_dict().items():
        assert torch.equal(tensor, resumed.ema.state_dict()[name]), name
    for name, tensor in straight.gan.state_dict().items():
        assert torch.equal(tensor, resumed.gan.state_dict()[name]), name
    assert torch.equal(whole[-1].images["samples"], after[-1].images["samples"])


def test_a_batch_in_parts_has_the_gradient_of_the_whole() -> None:
    """Without batch statistics: of the discriminator, spectral norm and all, and of the generator in eval mode."""
    gradients = []
    for parts in (1, 4):
        run = Training.begun(Sagan, CONFIG, replace(RECIPE, accumulate=parts, conditional=True))
        run.gan.double()
        run.gan.generator.eval()
        found = {}
        for name, terms in (("discriminator", run._discriminator_terms), ("generator", run._generator_terms)):
            torch.manual_seed(5)
            rates = run.optimizers[name].param_groups[0]
            rates["lr"] = 0.0
            with doubles():
                run._update(name, terms)
            network = run.networks[name]
            found |= {f"{name}.{n}": p.grad for n, p in network.named_parameters() if p.grad is not None}
            found |= {f"{name}.{n}": b for n, b in network.named_buffers() if n.endswith(("_u", "_v"))}
        gradients.append(found)
    whole, parts_of_it = gradients
    assert whole.keys() == parts_of_it.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(parts_of_it[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@contextmanager
def doubles() -> Iterator[None]:
    """New tensors, and real images, in float64."""
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Batches, "__next__", lambda self, usual=Batches.__next__: double(usual(self)))
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def double(batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return batch[0].double(), batch[1]


def test_a_step_is_so_many_updates_and_then_the_average() -> None:
    run = Training.begun(Sagan, CONFIG, replace(RECIPE, discriminator_steps=3, ema=0.75, evaluate=100))
    updates = {"generator": 0, "discriminator": 0}
    for name, optimizer in run.optimizers.items():
        optimizer.register_step_post_hook(lambda *_, n=name: updates.__setitem__(n, updates[n] + 1))
    average: dict[str, torch.Tensor] = {}
    steps = iter(run._train, None)
    for step in range(1, 4):
        next(steps)
        assert updates == {"generator": step, "discriminator": 3 * step}
        assert run.shown == run.batches.taken == 8 * 3 * step
        for name, parameter in run.gan.generator.named_parameters():
            now = parameter.detach().clone()
            average[name] = now if step == 1 else 0.75 * average[name] + 0.25 * now
    for name, parameter in run.ema.module.named_parameters():
        torch.testing.assert_close(parameter, average[name])
    for name, buffer in run.ema.module.named_buffers():
        assert torch.equal(buffer, run.gan.generator.get_buffer(name)), name


def test_rates_are_each_network_s_own() -> None:
    run = Training.begun(Sagan, CONFIG, replace(RECIPE, generator_rate=1e-3, discriminator_rate=2e-3))
    run._train()
    assert [o.param_groups[0]["lr"] for o in run.optimizers.values()] == [1e-3, 2e-3]


def test_measuring_leaves_a_run_as_it_is() -> None:
    """What is measured and how often has no say in what is learnt."""
    ends = []
    for evaluate in (1, 100):
        run = Training.begun(Sagan, CONFIG, replace(RECIPE, evaluate=evaluate, scored=evaluate + 1))
        list(run.run(3))
        ends.append(run.gan.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_bfloat16_computes_in_bfloat16() -> None:
    run = Training.begun(Sagan, replace(CONFIG, attention_at=0), replace(RECIPE, precision="bfloat16", evaluate=100))
    seen = set()
    run.gan.discriminator.blocks[1].register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    scalars_of_it = run._train()
    assert seen == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in run.gan.parameters())
    exact = Training.begun(Sagan, replace(CONFIG, attention_at=0), replace(RECIPE, evaluate=100))._train()
    assert scalars_of_it["loss/discriminator"] == pytest.approx(exact["loss/discriminator"], rel=0.05)
    assert scalars_of_it["loss/discriminator"] != exact["loss/discriminator"]


def test_a_saved_model_samples_from_the_average(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    run = Training.begun(Sagan, CONFIG, replace(RECIPE, evaluate=100))
    run._train(), run._train()
    run.save(path)
    model = load_model(Sagan, path)
    assert not model.generator.training
    for name, parameter in run.ema.module.named_parameters():
        assert torch.equal(parameter, model.generator.get_parameter(name))
    assert any(not torch.equal(p, run.gan.generator.get_parameter(n)) for n, p in model.generator.named_parameters())


def test_a_run_that_diverges_says_so_and_gives_out_no_step() -> None:
    run = Training.begun(Sagan, CONFIG, replace(RECIPE, evaluate=100))
    steps = run.run(9)
    assert next(steps).step == 1
    with torch.no_grad():
        run.gan.discriminator.linear.bias.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"training has diverged: the loss of the discriminator is .* after 1 steps"):
        next(steps)


class Other(Sagan):
    name = "other"


def test_a_checkpoint_that_is_another_s_or_damaged_is_named(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    Training.begun(Sagan, CONFIG, RECIPE).save(path)
    for load in (Training.resumed, load_model):
        with pytest.raises(ValueError, match=r"its kind must be 'gdl_kernels\.other\.1', got 'gdl_kernels\.sagan\.1'"):
            load(Other, path)
    tensors, about = checkpoint.load(path, Sagan.kind())
    config = {**about["config"], "width": 8}
    damages = {
        "its description is not one of a SAGAN": {**about, "recipe": {"colour": 3}},
        "must have shape": {**about, "config": config},
        "its state of training is damaged": {key: value for key, value in about.items() if key != "shown"},
        "its stage is damaged": {**about, "stage": None},
    }
    for message, damaged in damages.items():
        checkpoint.save(path, Sagan.kind(), tensors, damaged)
        load = load_model if "stage" in message else Training.resumed
        with pytest.raises(ValueError, match=rf"checkpoint\.safetensors: .*{message}"):
            load(Sagan, path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"accumulate": 3}, "accumulate must divide the batch of 8, got 3"),
        ({"generator_rate": 0.0}, "generator_rate must be positive and finite, got 0.0"),
        ({"discriminator_rate": math.inf}, "discriminator_rate must be positive and finite, got inf"),
        ({"beta2": 1.0}, "beta2 must be from 0 to below 1, got 1.0"),
        ({"ema": -0.1}, "ema must be from 0 to below 1, got -0.1"),
        ({"workers": -1}, "workers must not be negative, got -1"),
        ({"on_error": "shrug"}, "on_error must be raise or skip, got 'shrug'"),
        ({"precision": "float8"}, "precision must be one of float32, bfloat16, float16, got 'float8'"),
        ({"scored": 1}, "scored must be at least 2, got 1"),
        ({"evaluate": 0}, "evaluate must be at least 1, got 0"),
        ({"discriminator_steps": 0}, "discriminator_steps must be at least 1, got 0"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(RECIPE, **settings)


def test_a_run_that_can_t_be_is_refused() -> None:
    with pytest.raises(ValueError, match="precision must not be float16 on cpu"):
        Training.begun(Sagan, CONFIG, replace(RECIPE, precision="float16"))
    with pytest.raises(ValueError, match="data must have the model's 3 channels and 10 classes, got 1 and 10"):
        Training.begun(Sagan, replace(CONFIG, channels=3), RECIPE)
    with pytest.raises(ValueError, match="data must have the model's 1 channels and 10 classes, got 1 and 0"):
        Training.begun(Sagan, CONFIG, replace(RECIPE, conditional=False))
