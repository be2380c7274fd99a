"""Checkpoints, whole and not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from models import checkpoint


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "model.safetensors"
    checkpoint.save(path, "kind.1", {"weight": torch.randn(6, 5), "step": torch.tensor(3.0)}, {"words": ["a"]})
    return path


def test_what_is_loaded_is_what_was_saved(path: Path) -> None:
    tensors = {"a": torch.randn(3, 4).T, "b": torch.randn(2, dtype=torch.float64), "c": torch.tensor(2)}
    checkpoint.save(path, "kind.1", tensors, {"n": 1})
    found, about = checkpoint.load(path, "kind.1")
    assert about == {"n": 1}
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype


@pytest.mark.parametrize("kept", [0, 5, 60, 150, -1])
def test_a_cut_off_file_is_named(path: Path, kept: int) -> None:
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="not a whole safetensors file") as error:
        checkpoint.load(path, "kind.1")
    assert str(path) in str(error.value)


def test_a_foreign_file_is_named(path: Path) -> None:
    with pytest.raises(ValueError, match=r"'other\.1', got 'kind\.1'"):
        checkpoint.load(path, "other.1")
    with pytest.raises(ValueError, match=r"another version, as 'kind\.1'; this one reads 'kind\.2': train anew"):
        checkpoint.load(path, "kind.2")
    save_file({"weight": torch.randn(2)}, path)
    with pytest.raises(ValueError, match=r"'kind\.1', got none") as error:
        checkpoint.load(path, "kind.1")
    assert str(path) in str(error.value)
    with pytest.raises(ValueError, match="no such file"):
        checkpoint.load(path.with_name("absent"), "kind.1")
    with pytest.raises(ValueError, match=r"run: can't be read \(Is a directory\)"):
        checkpoint.load(path.parent, "kind.1")


def test_weights_of_another_model_are_refused(path: Path) -> None:
    model = nn.Linear(5, 6)
    before = model.weight.clone()
    tensors, _ = checkpoint.load(path, "kind.1")
    with pytest.raises(ValueError, match="bias, step"):
        checkpoint.load_weights(path, model, tensors)
    with pytest.raises(ValueError, match=r"bias must have shape \(6,\), got \(5,\)"):
        checkpoint.load_weights(path, model, {"weight": tensors["weight"], "bias": torch.randn(5)})
    assert torch.equal(model.weight, before)


def test_an_optimisers_state_lies_as_its_parameters_do(path: Path) -> None:
    """A fused optimiser walks both by address: in another order each weight would get another's moments."""
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 5, 5)

    def new() -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), fused=True)

    def step(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
        optimizer.zero_grad()
        model(images).square().sum().backward()
        optimizer.step()
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    straight = new()
    before = step(straight)
    checkpoint.save(path, "kind.1", checkpoint.optimizer_tensors(model, straight), {})
    expected = step(straight)
    model.load_state_dict(before)
    resumed = new()
    checkpoint.load_optimizer(path, model, resumed, checkpoint.load(path, "kind.1")[0])
    assert resumed.state[model.weight]["exp_avg"].stride() == model.weight.stride()
    for name, parameter in step(resumed).items():
        assert torch.equal(parameter, expected[name]), name
