"""spectral_norm: the same as torch's, and state dicts of three kinds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from gdl_kernels import spectral_norm
from gdl_kernels.nn.spectral_norm import SpectralNorm

theirs = parametrizations.spectral_norm

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(7, 5),
    "Conv1d": lambda: nn.Conv1d(3, 4, 5),
    "Conv2d": lambda: nn.Conv2d(3, 4, 3),
    "Conv3d": lambda: nn.Conv3d(2, 3, 2),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(3, 4, 3),
    "Embedding": lambda: nn.Embedding(6, 4),
    "Conv2d, channels last": lambda: nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last),
    "BatchNorm1d": lambda: nn.BatchNorm1d(5),  # its weight has one dimension
}


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # layers this small only wait for a second one
    yield
    torch.set_num_threads(threads)


def pair(make: Callable[[], nn.Module], **options: Any) -> tuple[nn.Module, nn.Module]:
    """The same layer under ours and under torch's."""
    layers = []
    for norm in (spectral_norm, theirs):
        torch.manual_seed(1)
        layers.append(norm(make(), **options))
    return layers[0], layers[1]


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    ours, expected = a.state_dict(), b.state_dict()
    assert list(ours) == list(expected)
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("options", [{}, {"n_power_iterations": 3, "eps": 1e-3}, {"dim": -1}], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_same_as_torchs(layer: str, options: dict[str, Any]) -> None:
    ours, expected = pair(LAYERS[layer], **options)
    assert_same_state(ours, expected)  # from the same seed
    for training in (True, False, True):
        ours.train(training)
        expected.train(training)
        weight, its = ours.weight, expected.weight
        torch.testing.assert_close(weight, its, rtol=1e-4, atol=1e-5)
        assert weight.stride() == its.stride()
        cotangent = torch.randn(weight.shape)
        gradients = [
            torch.autograd.grad(w, m.parametrizations.weight.original, cotangent)[0]
            for w, m in ((weight, ours), (its, expected))
        ]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
        assert_same_state(ours, expected)


def network(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(
        norm(nn.Conv2d(3, 8, 3)), nn.ReLU(), norm(nn.ConvTranspose2d(8, 6, 3)), nn.ReLU(), nn.Flatten(),
        norm(nn.Linear(6 * 64, 5)),
    )  # fmt: skip


def test_a_hundred_steps_of_training() -> None:
    """As D is trained: two forward passes before a backward pass."""
    networks = [network(norm) for norm in (spectral_norm, theirs)]
    optimizers = [torch.optim.Adam(m.parameters(), 1e-3) for m in networks]
    for _ in range(100):
        real, fake = torch.randn(2, 4, 3, 8, 8)
        losses = []
        for module, optimizer in zip(networks, optimizers):
            loss = torch.relu(1 - module(real)).mean() + torch.relu(1 + module(fake)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    # Adam divides by the square root of gradients that are as good as 0.
    for p, q in zip(networks[0].state_dict().values(), networks[1].state_dict().values()):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    ours, expected = pair(lambda: nn.Linear(30, 20).to(dtype))
    assert ours.parametrizations.weight[0]._u.dtype == dtype
    tolerance = {} if dtype == torch.float64 else {"rtol": 0.05, "atol": 0.02}  # torch rounds each product
    torch.testing.assert_close(ours.weight, expected.weight, **tolerance)


def test_a_weight_that_was_changed_has_no_gradient() -> None:
    for module in pair(lambda: nn.Linear(4, 3)):
        loss = module(torch.randn(2, 4)).square().sum()
        with torch.no_grad():
            module.parametrizations.weight.original.mul_(3)
        with pytest.raises(RuntimeError, match=r"in ?place"):
            loss.backward()


def test_checkpoints_go_both_ways() -> None:
    ours, expected = network(spectral_norm), network(theirs)
    for giver, taker in ((ours, expected), (expected, ours)):
        giver(torch.randn(2, 3, 8, 8))
        taker.load_state_dict(giver.state_dict())
        assert_same_state(giver, taker)


@pytest.mark.parametrize("layer", ["Linear", "ConvTranspose2d"])
def test_the_older_form_loads(layer: str) -> None:
    old = nn.Sequential(nn.utils.spectral_norm(LAYERS[layer]()))
    old[0].train()
    for _ in range(20):
        for hook in old[0]._forward_pre_hooks.values():
            hook(old[0], ())
    ours = nn.Sequential(spectral_norm(LAYERS[layer]()))
    given = old.state_dict()
    assert "0.weight_orig" in given
    ours.load_state_dict(given)
    ours.eval()
    torch.testing.assert_close(ours[0].weight, old[0].weight, rtol=1e-4, atol=1e-5)
    assert "0.weight_orig" in given  # the dict is the caller's
    norm = ours[0].parametrizations.weight[0]
    assert torch.equal(norm._v, old[0].weight_v)
    # The first version had no v, and the normalised weight besides.
    given["0.weight"] = old[0].weight.detach()
    del given["0.weight_v"]
    ours.load_state_dict(given)
    torch.testing.assert_close(norm._v, old[0].weight_v, rtol=1e-2, atol=1e-2)


def test_biggans_form_loads() -> None:
    """``weight``, ``u0`` (1, out) and ``sv0`` (1), with u the last of a power method."""
    ours = nn.Sequential(OrderedDict(blocks=nn.Sequential(spectral_norm(nn.Conv2d(3, 4, 3)))))
    weight = torch.randn(4, 3, 3, 3)
    left, sigma, right = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    u, v = left[:, 0], right[0]
    given = {"weight": weight, "bias": torch.randn(4), "u0": u[None], "sv0": sigma[:1]}
    ours.load_state_dict({f"blocks.0.{name}": value for name, value in given.items()})
    ours.eval()
    torch.testing.assert_close(ours.blocks[0].weight, weight / sigma[0])
    torch.testing.assert_close(ours.blocks[0].parametrizations.weight[0]._v, v)


def test_missing_keys_are_missed() -> None:
    ours = nn.Sequential(spectral_norm(nn.Linear(3, 4)))
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*parametrizations.weight.original"):
        ours.load_state_dict(nn.Sequential(nn.Linear(3, 4)).state_dict())
    state = ours.state_dict()
    parametrize.remove_parametrizations(ours[0], "weight")
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*0.weight"):
        ours.load_state_dict(state)
    ours.load_state_dict(nn.Sequential(nn.Linear(3, 4)).state_dict())


def test_removal_leaves_the_weight() -> None:
    layer = spectral_norm(nn.Linear(3, 4)).eval()
    weight = layer.weight.detach().clone()
    original = layer.parametrizations.weight.original
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is nn.Linear
    assert layer.weight is original
    assert torch.equal(layer.weight, weight)


def test_among_other_parametrizations() -> None:
    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    layers = []
    for norm in (spectral_norm, theirs):
        torch.manual_seed(3)
        layer = nn.Linear(4, 5)
        parametrize.register_parametrization(layer, "weight", Double())
        layers.append(norm(layer))
    torch.testing.assert_close(layers[0].weight, layers[1].weight)
    ours = layers[0].state_dict()
    assert list(ours) == list(layers[1].state_dict())
    layers[0].load_state_dict(ours)


def test_on_the_meta_device() -> None:
    layer = spectral_norm(nn.Linear(3, 4, device="meta"))
    assert layer.weight.shape == (4, 3)


def test_compiles_into_one_graph() -> None:
    layer, same = spectral_norm(nn.Linear(6, 5)), spectral_norm(nn.Linear(6, 5))
    same.load_state_dict(layer.state_dict())
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(2, 6)
        compiled(x).square().sum().backward()
        same(x).square().sum().backward()
    torch.testing.assert_close([p.grad for p in layer.parameters()], [p.grad for p in same.parameters()])
    assert_same_state(layer, same)


def test_the_repr_says_what_it_does() -> None:
    layer = spectral_norm(nn.ConvTranspose1d(2, 3, 4), n_power_iterations=2)
    assert "SpectralNorm(n_power_iterations=2, dim=1, semantics='torch')" in repr(layer)
    assert isinstance(layer.parametrizations.weight[0], SpectralNorm)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: spectral_norm(nn.ReLU()), ValueError, r"name must be that of a parameter.*ReLU\(\), got 'weight'"),
        (lambda: spectral_norm(nn.Linear(2, 3), "w"), ValueError, "name must be that of a parameter.*got 'w'"),
        (lambda: spectral_norm(nn.Linear(2, 3), n_power_iterations=0), ValueError, "must be positive, got 0"),
        (lambda: spectral_norm(nn.Linear(2, 3), dim=2), IndexError, r"dim must be in \[-2, 1\].*got 2"),
        (lambda: spectral_norm(nn.Linear(2, 3), dim=-3), IndexError, r"dim must be in \[-2, 1\].*got -3"),
    ],
)
def test_bad_input(call: Callable[[], nn.Module], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_weight_that_is_not_finite_is_refused() -> None:
    layer = spectral_norm(nn.Linear(2, 3))
    with torch.no_grad():
        layer.parametrizations.weight.original[0, 0] = torch.nan
    with pytest.raises(ValueError, match="weight must be finite, and so must its spectral norm, which is nan"):
        layer(torch.ones(1, 2))
