"""orthogonal_norm and init_orthogonal_: layers, state dicts, training, errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from gdl_kernels import init_orthogonal_, orthogonal_norm, orthogonalize


def gram(weight: Tensor, dim: int = 0) -> Tensor:
    matrix = weight.detach().double().movedim(dim, 0).flatten(1)
    return matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix


def assert_orthogonal(weight: Tensor, dim: int = 0, gain: float = 1.0) -> None:
    found = gram(weight, dim)
    torch.testing.assert_close(found, gain**2 * torch.eye(len(found), dtype=torch.float64), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("layer", "dim"),
    [
        (nn.Linear(12, 20), 0),
        (nn.Conv2d(5, 8, 3), 0),
        (nn.ConvTranspose2d(8, 5, 3), 1),
        (nn.Conv1d(3, 40, 2), 0),
        (nn.Embedding(10, 6), 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["polar", "bjorck"])
def test_weights_are_orthogonal_and_train(layer: nn.Module, dim: int, method: Any) -> None:
    layer = copy.deepcopy(layer)
    start = layer.weight.detach().clone()
    assert orthogonal_norm(layer, method=method) is layer
    expected = orthogonalize([start.movedim(dim, 0)], method=method)[0].movedim(0, dim)
    torch.testing.assert_close(layer.weight, expected)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    target = torch.randn_like(start)
    losses = []
    for _ in range(5):
        loss = (layer.weight - target).square().sum()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert_orthogonal(layer.weight, dim)
    assert losses[-1] < losses[0]


def test_as_torch_where_it_computes_the_same() -> None:
    """Of an orthogonal weight both keep it; torch's spans a convolution another way."""
    weight = nn.init.orthogonal_(torch.empty(6, 10))
    ours, theirs = (f(nn.Linear(10, 6)) for f in (orthogonal_norm, parametrizations.orthogonal))
    with torch.no_grad():
        for layer in (ours, theirs):
            layer.weight = weight
            torch.testing.assert_close(layer.weight, weight, rtol=0, atol=2e-6)


def test_state_dict_copies_and_undoing() -> None:
    layer, other = (orthogonal_norm(nn.Conv2d(3, 7, 3)) for _ in range(2))
    assert set(layer.state_dict()) == {"bias", "parametrizations.weight.original"}
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, layer.weight)
    assert torch.equal(copy.deepcopy(layer).weight, layer.weight)
    weight = layer.weight.detach().clone()
    parametrize.remove_parametrizations(layer, "weight")
    assert torch.equal(layer.weight, weight)
    assert repr(other.parametrizations.weight[0]) == "OrthogonalNorm(steps=None, method='polar', dim=0)"


def test_five_steps() -> None:
    layer = orthogonal_norm(nn.Linear(10, 6), steps=5)
    original = layer.parametrizations.weight.original
    torch.testing.assert_close(layer.weight, orthogonalize([original], steps=5)[0])


@pytest.mark.parametrize(
    ("module", "call", "error", "message"),
    [
        ("layer", {}, TypeError, "module must be a torch.nn.Module, got str"),
        (nn.Linear(2, 3), {"name": "wait"}, ValueError, "name must be that of a tensor of Linear, got 'wait'"),
        (nn.Linear(2, 3), {"name": "bias"}, ValueError, r"bias must have two dimensions or more, got shape \(3,\)"),
        (nn.Linear(2, 3), {"dim": 2}, ValueError, "dim must be from -2 to 1, got 2"),
        (nn.Linear(2, 3), {"steps": 0}, ValueError, "steps must be positive, got 0"),
        (nn.Linear(2, 3), {"steps": 1.5}, TypeError, "steps must be an integer or None, got float"),
        (nn.Linear(2, 3), {"method": "svd"}, ValueError, "method must be one of 'polar', 'bjorck', got 'svd'"),
    ],
)
def test_bad_input(module: Any, call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        orthogonal_norm(module, **call)


def test_initialisation() -> None:
    shared = nn.Linear(8, 8)
    root = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ConvTranspose2d(16, 4, 2), shared, nn.Sequential(shared),
        nn.Embedding(30, 5), parametrizations.spectral_norm(nn.Linear(9, 7)), nn.Linear(6, 6, dtype=torch.bfloat16),
    )  # fmt: skip
    biases = {name: p.clone() for name, p in root.named_parameters() if p.dim() < 2}
    assert init_orthogonal_(root, gain=2.0) is root
    for name, parameter in root.named_parameters():
        if name in biases:
            assert torch.equal(parameter, biases[name])
        elif parameter.dtype == torch.float32:
            assert_orthogonal(parameter / 2)
    torch.testing.assert_close(gram(root[7].weight), 4 * torch.eye(6, dtype=torch.float64), rtol=0, atol=0.1)


def test_initialisation_draws_from_the_generator() -> None:
    first, second, third = (
        init_orthogonal_(nn.Linear(5, 9), generator=torch.Generator().manual_seed(seed)).weight for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.allclose(first, third)


def test_initialisation_is_uniform() -> None:
    """Every element of a random orthogonal matrix has mean 0 and mean square 1/n."""
    weights = torch.stack([init_orthogonal_(nn.Linear(4, 4)).weight.detach() for _ in range(300)])
    assert weights.mean(0).abs().max() < 5 * (0.25 / 300) ** 0.5
    assert (weights.square().mean(0) - 0.25).abs().max() < 0.1
