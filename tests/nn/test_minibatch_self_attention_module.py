"""MinibatchSelfAttention2d, against the layers of public code, written out here in plain PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gdl_kernels
from gdl_kernels.nn import MinibatchSelfAttention2d

C = 16


@pytest.fixture(autouse=True)
def _surroundings() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # layers as small as these are slower on several
    yield
    torch.set_num_threads(threads)


class Peer(nn.Module):
    """A public layer: the names of its convolutions (query, key, value, and out if it has one) and of its factor."""

    def __init__(self, names: tuple[str, ...], factor: str, pool: int, spectral: bool, bias: bool) -> None:
        super().__init__()
        self.names, self.factor, self.pool = names, factor, pool
        value = C // 2 if len(names) == 4 else C
        sizes = (C, C // 8), (C, C // 8), (C, value), (value, C)
        for name, (inputs, outputs) in zip(names, sizes):
            layer = nn.Conv2d(inputs, outputs, 1, bias=bias)
            self.add_module(name, nn.utils.spectral_norm(layer) if spectral else layer)
        self.register_parameter(factor, nn.Parameter(torch.tensor([0.7])))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value, *out = (getattr(self, name) for name in self.names)
        q = query(x).flatten(2)
        k, v = (F.max_pool2d(layer(x), self.pool).flatten(2) for layer in (key, value))
        attended = (v @ (q.transpose(1, 2) @ k).softmax(-1).transpose(1, 2)).unflatten(2, x.shape[2:])
        return x + getattr(self, self.factor) * (out[0](attended) if out else attended)


PEERS = {
    "BigGAN-PyTorch, plain": (("theta", "phi", "g", "o"), "gamma", 2, False, False),
    "pytorch-pretrained-BigGAN": (
        ("snconv1x1_theta", "snconv1x1_phi", "snconv1x1_g", "snconv1x1_o_conv"), "gamma", 2, True, False,
    ),
    "voletiv": (("snconv1x1_theta", "snconv1x1_phi", "snconv1x1_g", "snconv1x1_attn"), "sigma", 2, True, True),
    "query_conv": (("query_conv", "key_conv", "value_conv"), "gamma", 1, False, True),
}  # fmt: skip


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("peer", PEERS)
def test_loads_and_is_a_public_layer(peer: str, nested: bool) -> None:
    names, factor, pool, spectral, bias = PEERS[peer]
    theirs = Peer(names, factor, pool, spectral, bias).double()
    ours = MinibatchSelfAttention2d(
        C, pool=pool, spectral_norm=spectral, bias=bias, out_conv=len(names) == 4, dtype=torch.float64
    )
    x = torch.randn(2, C, 6, 10, dtype=torch.float64, requires_grad=True)
    theirs(x)  # a step of the power method, where there is spectral norm
    if nested:
        nn.Sequential(nn.ReLU(), ours).load_state_dict(nn.Sequential(nn.ReLU(), theirs).state_dict())
    else:
        ours.load_state_dict(theirs.state_dict())
    weight = torch.randn_like(x)
    found, expected = ours.eval()(x), theirs.eval()(x)
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(found, [x, *ours.parameters()], weight)
    expected_gradients = torch.autograd.grad(expected, [x, *theirs.parameters()], weight)
    assert len(gradients) == len(expected_gradients)
    for grad, expected_grad in zip(gradients, expected_gradients):
        torch.testing.assert_close(grad, expected_grad.reshape(grad.shape))


def test_loads_the_spectral_norm_of_biggan_pytorch() -> None:
    """Each layer has its weight, u0 (1, outputs) and sv0; eval mode takes a fresh v, as our hook does at loading."""
    state = {"gamma": torch.tensor(0.7)}
    u = {}
    for name, (inputs, outputs) in {"theta": (C, 2), "phi": (C, 2), "g": (C, C // 2), "o": (C // 2, C)}.items():
        u[name] = F.normalize(torch.randn(1, outputs))
        state |= {f"{name}.weight": torch.randn(outputs, inputs, 1, 1), f"{name}.u0": u[name]}
        state[f"{name}.sv0"] = torch.ones(1)
    ours = MinibatchSelfAttention2d(C, spectral_norm=True).eval()
    ours.load_state_dict(dict(state))
    for name, expected in u.items():
        matrix = state[f"{name}.weight"].flatten(1)
        sigma = (expected @ matrix).norm()
        layer = getattr(ours, name)
        torch.testing.assert_close(layer.weight.flatten(1), matrix / sigma)
        torch.testing.assert_close(layer.parametrizations.weight[0]._u, expected[0])


def test_own_state_dict_round_trip() -> None:
    first, second = (MinibatchSelfAttention2d(C, spectral_norm=True, bias=True) for _ in range(2))
    nn.init.normal_(first.gamma)
    second.load_state_dict(first.state_dict())
    x = torch.randn(2, C, 4, 4)
    assert torch.equal(first.eval()(x), second.eval()(x))


def test_starts_as_the_identity_with_both_conventions() -> None:
    x = torch.randn(2, 32, 6, 6)
    code, paper = MinibatchSelfAttention2d(32), MinibatchSelfAttention2d(32, value_channels=32 // 8)
    assert (code.theta.out_channels, code.g.out_channels, paper.g.out_channels) == (4, 16, 4)
    for layer in (code, paper):
        assert layer.gamma.shape == ()
        assert torch.equal(layer(x), x)
        (grad,) = torch.autograd.grad(layer(x).square().sum(), layer.gamma)
        assert grad.abs() > 0  # or it would never leave


@pytest.mark.parametrize("score", ["dot", "l2"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradients_of_both_orders(backend: str, score: str) -> None:
    layer = MinibatchSelfAttention2d(4, key_channels=2, value_channels=3, score=score, scale=0.4, dtype=torch.float64)
    nn.init.normal_(layer.gamma)
    x = torch.randn(1, 4, 4, 2, dtype=torch.float64, requires_grad=True)
    with gdl_kernels.backend(backend):
        torch.autograd.gradcheck(layer, x)
        torch.autograd.gradgradcheck(layer, x)


def test_gradient_penalty_reaches_every_parameter() -> None:
    layer = MinibatchSelfAttention2d(C, spectral_norm=True, dtype=torch.float64)
    nn.init.normal_(layer.gamma)
    x = torch.randn(2, C, 6, 6, dtype=torch.float64, requires_grad=True)

    def penalty(backend: str) -> list[Tensor]:
        with gdl_kernels.backend(backend):
            (slope,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
            return list(torch.autograd.grad(slope.square().sum(), layer.parameters()))

    layer.eval()  # so that both see the same weights
    for (name, _), ours, plain in zip(layer.named_parameters(), penalty("auto"), penalty("reference")):
        assert ours.abs().max() > 0, name
        torch.testing.assert_close(ours, plain, atol=1e-9 * plain.abs().max().item(), rtol=1e-6)


@pytest.mark.parametrize("semantics", ["torch", "biggan"])
def test_spectral_norm_all_over_it(semantics: str) -> None:
    layer = nn.Sequential(nn.Conv2d(3, C, 3, padding=1), MinibatchSelfAttention2d(C))
    nn.init.normal_(layer[1].gamma)
    gdl_kernels.spectral_norm_all(layer, semantics=semantics, n_power_iterations=20)
    x = torch.randn(2, 3, 6, 6)
    layer(x).sum().backward()
    layer.eval()
    for name in ("theta", "phi", "g", "o"):
        convolution = getattr(layer[1], name)
        assert convolution.parametrizations.weight.original.grad.abs().max() > 0
        largest = torch.linalg.matrix_norm(convolution.weight.flatten(1), 2)
        torch.testing.assert_close(largest, torch.ones(()), rtol=0.05, atol=0.05)
    assert not any(p.isnan().any() for p in layer.parameters())


def test_training_steps_the_power_method_and_evaluation_does_not() -> None:
    layer = MinibatchSelfAttention2d(C, spectral_norm=True)
    x = torch.randn(2, C, 4, 4)
    u = layer.g.parametrizations.weight[0]._u
    before = u.clone()
    layer.eval()(x)
    assert torch.equal(u, before)
    layer.train()(x)
    assert not torch.equal(u, before)


def test_copies_are_independent() -> None:
    layer = MinibatchSelfAttention2d(C, spectral_norm=True).eval()
    nn.init.normal_(layer.gamma)
    x = torch.randn(2, C, 4, 4)
    expected = layer(x)
    other = copy.deepcopy(layer)
    assert torch.equal(other(x), expected)
    with torch.no_grad():
        other.gamma.mul_(2)
    assert torch.equal(layer(x), expected)
    other.load_state_dict({"sigma" if n == "gamma" else n: t for n, t in layer.state_dict().items()})
    assert torch.equal(other(x), expected)


@pytest.mark.parametrize("out_conv", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_autocast_and_memory_formats(memory_format: torch.memory_format, out_conv: bool) -> None:
    layer = MinibatchSelfAttention2d(C, out_conv=out_conv).to(memory_format=memory_format)
    nn.init.normal_(layer.gamma)
    x = torch.randn(2, C, 6, 6).to(memory_format=memory_format)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = layer(x)
    high = layer(x)
    assert low.dtype == torch.float32  # the residual is not rounded
    assert low.is_contiguous(memory_format=memory_format)
    assert high.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(low, high, rtol=0.05, atol=0.05 * (high - x).abs().max().item())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"channels": 8.0}, TypeError, "channels must be an integer, got float"),
        ({"channels": 0}, ValueError, "channels must be at least 1, got 0"),
        ({"channels": 8, "key_channels": 0}, ValueError, "key_channels must be at least 1, got 0"),
        ({"channels": 8, "value_channels": "4"}, TypeError, "value_channels must be an integer, got str"),
        (
            {"channels": 8, "value_channels": 4, "out_conv": False},
            ValueError,
            "value_channels must be the 8 channels where out_conv is False, got 4",
        ),
    ],
)
def test_bad_arguments(call: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MinibatchSelfAttention2d(**call)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, C, 4), {}, r"x must be \(batch, 16, height, width\), got shape \(2, 16, 4\)"),
        ((2, 8, 4, 4), {}, r"x must be \(batch, 16, height, width\), got shape \(2, 8, 4, 4\)"),
        ((2, C, 5, 4), {}, r"pool=2 needs maps of even height and width, got \(5, 4\)"),
        ((2, C, 4, 4), {"pool": 3}, "pool must be 1 or 2, got 3"),
        ((2, C, 4, 4), {"score": "cosine"}, "score must be one of 'dot', 'l2', got 'cosine'"),
    ],
)
def test_bad_images(shape: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MinibatchSelfAttention2d(C, **options)(torch.randn(shape))
